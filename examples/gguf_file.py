"""Llama-family models in GGUF files, dequantized by the package `gguf`."""

import pathlib
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer

from gguf_tokenizer import TokenizerFields, build_tokenizer, tokenizer_config
from llama import Params
from llama_config import Config, config_from_json
from llama_weights import Source, assemble, check_tensors, weights

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2"}  # by architecture
NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attention_norm": "blk.{}.attn_norm.weight",
    "layers/q": "blk.{}.attn_q.weight",
    "layers/k": "blk.{}.attn_k.weight",
    "layers/v": "blk.{}.attn_v.weight",
    "layers/o": "blk.{}.attn_output.weight",
    "layers/q_bias": "blk.{}.attn_q.bias",
    "layers/k_bias": "blk.{}.attn_k.bias",
    "layers/v_bias": "blk.{}.attn_v.bias",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/gate": "blk.{}.ffn_gate.weight",
    "layers/up": "blk.{}.ffn_up.weight",
    "layers/down": "blk.{}.ffn_down.weight",
}
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}  # keys of config.json, and of GGUF after the architecture's name
OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}


def open_reader(path: pathlib.Path) -> gguf.GGUFReader:
    """The file's fields and tensors, mapped into memory; ValueError if it is damaged."""
    try:
        return gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"this is no whole GGUF file: {error}") from None


def describe(
    reader: gguf.GGUFReader, path: pathlib.Path
) -> tuple[Config, Tokenizer, Source]:
    """Config, tokenizer and what is saved with them; ValueError for what is not read."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = config_json(
        fields, {tensor.name: _shape(tensor) for tensor in reader.tensors}
    )
    config = config_from_json(found)
    tokens = TokenizerFields.of(fields)
    files = {"tokenizer_config.json": tokenizer_config(tokens, fields, config)}
    tokenizer = build_tokenizer(tokens)
    files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    return config, tokenizer, Source(str(path), found, files)


def config_json(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The config.json of the model, as transformers would write it."""
    arch = fields.get("general.architecture")
    if arch not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"general.architecture must be one of {known}, got {arch!r}")
    _check_implemented(fields, arch, shapes)
    found: dict[str, Any] = {"model_type": MODEL_TYPES[arch], "hidden_act": "silu"}
    for key, name in FIELDS.items():
        value = fields.get(f"{arch}.{name}")
        if value is None and name not in OPTIONAL:
            raise ValueError(f"there is no {arch}.{name}")
        if value is not None:
            found[key] = _shortest(value) if isinstance(value, float) else value
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    if NAMES["embed"] not in shapes:
        raise ValueError(f"there is no tensor {NAMES['embed']}")
    found["vocab_size"] = shapes[NAMES["embed"]][0]
    found["tie_word_embeddings"] = NAMES["head"] not in shapes
    if fields.get(f"{arch}.attention.sliding_window") and arch == "llama":
        found["model_type"] = "mistral"
        found["sliding_window"] = fields[f"{arch}.attention.sliding_window"]
    for key in ("bos", "eos"):
        found[f"{key}_token_id"] = fields.get(f"tokenizer.ggml.{key}_token_id")
    return found


def _check_implemented(fields: dict[str, Any], arch: str, shapes) -> None:
    for key, value in fields.items():
        scaled = key.startswith(f"{arch}.rope.scal")
        if scaled and (key, value) != (f"{arch}.rope.scaling.type", "none"):
            raise ValueError(
                f"{key} is not implemented; load the model's Hugging Face folder"
            )
    for name in shapes:
        if name.startswith("rope_"):
            raise ValueError(
                f"the tensor {name} (scaled rotary embedding) is not implemented; load "
                "the model's Hugging Face folder"
            )
    for key in (f"{arch}.expert_count", "split.count"):
        if (fields.get(key) or 0) > 1:
            raise ValueError(f"{key} must be at most 1, got {fields[key]}")
    head_dim = _head_dim(fields, arch)
    for name in ("rope.dimension_count", "attention.value_length"):
        value = fields.get(f"{arch}.{name}")
        if head_dim is not None and value not in (None, head_dim):
            raise ValueError(
                f"{arch}.{name} must be the heads' size {head_dim}, got {value}"
            )


def _head_dim(fields: dict[str, Any], arch: str) -> int | None:
    size = fields.get(f"{arch}.attention.key_length")
    hidden = fields.get(f"{arch}.embedding_length")
    heads = fields.get(f"{arch}.attention.head_count")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        return hidden // heads
    return size


def read_params(
    reader: gguf.GGUFReader, config: Config, dtype, place, show: bool
) -> Params:
    """Its parameters, as `llama_weights.assemble` makes them."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = {x.name: x.shape for x in weights(config, NAMES)}
    check_tensors("the file", {x: _shape(t) for x, t in tensors.items()}, expected)

    def read(name: str) -> np.ndarray:
        array = _dequantized(tensors[name]).reshape(_shape(tensors[name]))
        interleaved = config.model_type != "qwen2" and ".attn_" in name
        if interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            return _halves(array, config.head_dim)
        return array

    return assemble(config, NAMES, read, dtype, place, show)


def _halves(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows from pairs that are turned together, side by side, to half a head apart."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _dequantized(tensor) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise ValueError(f"{tensor.name} is of {kind}, which is not read") from None


def _shape(tensor) -> tuple[int, ...]:
    """Outermost axis first."""
    return tuple(int(x) for x in reversed(tensor.shape))


def _shortest(value: float) -> float:
    """The shortest decimal of a float32."""
    return float(str(np.float32(value)))
