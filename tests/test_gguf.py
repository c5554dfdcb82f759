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
from llama_cases import assert_same

gguf = pytest.importorskip("gguf")

WORDS = [
    "a",
    "b",
    "c",
    "Ġ",
    "1",
    "2",
    "Ã",
    "©",
    "ab",
    "abc",
    "Ġa",
    "Ġab",
    "12",
    "ba",
    "<tool>",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = SPECIAL + WORDS + [f"[{x}]" for x in range(19)]
KINDS = [3] * 3 + [1] * 14 + [4] + [5] * 19
MERGES = ["a b", "ab c", "Ġ a", "Ġ ab", "1 2"]
ARCHES = {"llama2": "llama", "mistral": "llama", "smollm2": "llama", "qwen2": "qwen2"}
FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}


def write(path, name="smollm2", kind="F32", drop=(), tensors=None, **changes):
    """A case as a GGUF file, its fields changed; dots in their names are underscores."""
    config, arch = llama_cases.CONFIGS[name], ARCHES[name]
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        **{f"{arch}.{ours}": config.get(key) for ours, key in FIELDS.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        **changes.get("fields", {}),
    }
    if name == "mistral":
        fields["llama.attention.sliding_window"] = config["sliding_window"]
    for key, value in fields.items():
        if value is not None and key not in drop:
            writer.add_key_value(key, value, *_type(value))
    for key, array in {**_tensors(name, arch), **(tensors or {})}.items():
        if key not in drop:
            _add(writer, key, array, kind if array.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value):
    types = gguf.GGUFValueType
    if isinstance(value, list):
        of = types.STRING if isinstance(value[0], str) else types.INT32
        return types.ARRAY, of
    kinds = {str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32}
    return (kinds[type(value)],)


def _add(writer, name, array, kind):
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _tensors(name, arch):
    """Under gguf's own names, queries and keys as llama.cpp's converter turns them."""
    config = llama_cases.CONFIGS[name]
    kinds = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(kinds[arch], config["num_hidden_layers"])
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    found = {}
    for key, array in llama_cases.tensors(name).items():
        ending = ".".join(key.split(".")[-2:])
        if arch == "llama" and ending in heads:
            halves = array.reshape(heads[ending], 2, -1, array.shape[1])
            array = halves.transpose(0, 2, 1, 3).reshape(array.shape)
        found[names.get_name(key, try_suffixes=(".weight", ".bias"))] = array
    return found


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
    "bos_token_id 99 is no token": {"tokenizer.ggml.bos_token_id": 99},
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
