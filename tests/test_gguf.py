"""examples/gguf_file.py: GGUF files hold the models and tokenizers they were made from.

If it fails, the default model is not SmolLM2, or a file is refused without saying why.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama
import llama_cases
import llama_files
import llama_saving
from gguf_cases import ARCHES, KINDS, TOKENS, gguf, write
from llama_cases import assert_same


@pytest.mark.parametrize("name", ARCHES)
def test_the_file_is_the_folder(name, tmp_path):
    folder = llama_files.load(llama_cases.write_folder(tmp_path / "folder", name))
    loaded = llama_files.load(write(tmp_path / "model.gguf", name))
    bos = loaded.config.bos_id
    assert loaded.config == folder.config.__class__(
        **{**vars(folder.config), "bos_id": bos}
    )
    assert bos == 1
    assert_same(loaded.params, folder.params)


def test_weights_are_dequantized(tmp_path):
    exact = llama_files.load(write(tmp_path / "exact.gguf")).params
    low = llama_files.load(write(tmp_path / "low.gguf", kind="BF16"), jnp.bfloat16)
    assert_same(low.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_a_saved_file_is_a_folder(tmp_path):
    loaded = llama_files.load(write(tmp_path / "model.gguf", "llama2"))
    llama_saving.save(tmp_path / "out", *loaded)
    again = llama_files.load(tmp_path / "out")
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)
    assert again.tokenizer.to_str() == loaded.tokenizer.to_str()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<s>"
    assert settings["chat_template"] == "{{ messages }}"


def test_chat_templates_with_names_are_kept(tmp_path):
    fields = {"tokenizer.chat_template.tools": "{{ tools }}"}
    source = llama_files.load(write(tmp_path / "model.gguf", fields=fields)).source
    assert json.loads(source.files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tools", "template": "{{ tools }}"},
    ]


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("abc ab12", {}, ["abc", "Ġab", "1", "2"]),
        ("ab12", {"pre": "gpt-2"}, ["ab", "12"]),
        ("ab12", {"pre": "qwen2"}, ["ab", "1", "2"]),
        ("ab12", {"pre": "llama-bpe"}, ["<s>", "ab", "12"]),
        ("ab", {"pre": "llama-bpe", "add_bos_token": False}, ["ab"]),
        ("ba", {"pre": "llama-bpe", "add_bos_token": False}, ["ba"]),  # without a merge
        ("ba", {"pre": "gpt-2"}, ["b", "a"]),
        ("ab", {"add_bos_token": True}, ["<s>", "ab"]),
        ("ab", {"add_eos_token": True}, ["ab", "</s>"]),
        ("e\u0301", {"pre": "qwen2"}, ["Ã", "©"]),  # to one character, then to bytes
        ("ab</s>ab", {}, ["ab", "</s>", "ab"]),
        ("ab<tool>", {}, ["ab", "<tool>"]),
    ],
)
def test_texts_to_tokens(text, fields, expected, tmp_path):
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    tokenizer = llama_files.load(write(tmp_path / "model.gguf", fields=fields)).tokenizer
    found = tokenizer.encode(text)
    assert found.tokens == expected
    assert found.ids == [TOKENS.index(token) for token in expected]
    shown = text.replace("</s>", "").replace("e\u0301", "\u00e9")
    assert tokenizer.decode(found.ids) == shown  # special tokens are not words


REFUSED = {
    "rope.scaling.factor is not implemented": {"llama.rope.scaling.factor": 8.0},
    "rope.scaling.type is not implemented": {"llama.rope.scaling.type": "linear"},
    "rope.scale_linear is not implemented": {"llama.rope.scale_linear": 2.0},
    "expert_count must be at most 1, got 8": {"llama.expert_count": 8},
    "split.count must be at most 1, got 2": {"split.count": 2},
    "dimension_count must be the heads' size 4": {"llama.rope.dimension_count": 2},
    "there is no llama.block_count": {"llama.block_count": None},
    "model must be 'gpt2'": {"tokenizer.ggml.model": "llama"},
    "pre must be one of .* got 'tekken'": {"tokenizer.ggml.pre": "tekken"},
    "there is no tokenizer.ggml.merges": {"tokenizer.ggml.merges": None},
    "'a' and 'q' are not all in tokens": {"tokenizer.ggml.merges": ["a q"]},
    "'aq' is no pair": {"tokenizer.ggml.merges": ["aq"]},
    "bos_token_id 99 is not in a vocabulary of 37": {"tokenizer.ggml.bos_token_id": 99},
    "37 kinds of 38 tokens": {"tokenizer.ggml.tokens": [*TOKENS, "x"]},
    "a token 37, but vocab_size is 37": {
        "tokenizer.ggml.tokens": [*TOKENS, "x"],
        "tokenizer.ggml.token_type": [*KINDS, 1],
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_fields_that_are_refused(said, tmp_path):
    refuse(write(tmp_path / "model.gguf", fields=REFUSED[said]), said)


def test_no_scaling_may_be_said(tmp_path):
    fields = {"llama.rope.scaling.type": "none"}
    config = llama_files.load(write(tmp_path / "model.gguf", fields=fields)).config
    assert config.rope_scaling is None


def refuse(path, said):
    with pytest.raises(ValueError, match=said) as error:
        llama_files.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_tensors_that_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    ropes = {"rope_freqs.weight": np.ones(2, np.float32)}
    refuse(write(file, tensors=ropes), "rope_freqs.weight .scaled rotary embedding")
    refuse(write(file, drop=["blk.2.ffn_up.weight"]), "has no tensor blk.2.ffn_up.weight")
    refuse(write(file, drop=["token_embd.weight"]), "is no tensor token_embd.weight")
    norm = {"output_norm.weight": np.ones(23, np.float32)}
    refuse(write(file, tensors=norm), r"output_norm.weight has the shape \(23,\)")
    bias = {"blk.0.attn_q.bias": np.ones(24, np.float32)}
    refuse(write(file, tensors=bias), "has no place for: blk.0.attn_q.bias")


@pytest.mark.parametrize("size", [3, 100, 4000, -100])
def test_damaged_files_are_refused(size, tmp_path):
    file = write(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:size])
    refuse(file, "model.gguf: this is no whole GGUF file")


def test_other_architectures_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(file, "general.architecture must be one of llama, qwen2, got 'gemma3'")


def test_logits_of_a_file(tmp_path):
    """To 1e-5 those of transformers for the model that it was made from."""
    loaded = llama_files.load(write(tmp_path / "model.gguf", "mistral"))
    found = jax.jit(llama.logits, static_argnums=0)(
        loaded.config, loaded.params, jnp.array(llama_cases.TOKENS)
    )
    expected = llama_cases.reference("mistral")["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
