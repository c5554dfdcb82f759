"""Parameter shapes of language models, from the config.json of Hugging Face."""

from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The shape of every parameter, by name; ValueError if the config does not tell."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type must be one of {known}, got {kind!r}")
    return FAMILIES[kind](config)


def _llama(config: Mapping[str, Any]) -> Shapes:
    """Llama and what has its shape: Mistral, Qwen2, Gemma."""
    kind = config["model_type"]
    width, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", width // heads)
    words, queries, keys = _size(config, "vocab_size"), heads * head, kv_heads * head
    layer: Shapes = {
        "attention/query/kernel": (width, queries),
        "attention/key/kernel": (width, keys),
        "attention/value/kernel": (width, keys),
        "attention/out/kernel": (queries, width),
        "mlp/gate/kernel": (width, inner),
        "mlp/up/kernel": (width, inner),
        "mlp/down/kernel": (inner, width),
        "attention_norm/scale": (width,),
        "mlp_norm/scale": (width,),
    }
    if kind == "qwen2" or config.get("attention_bias"):
        for name, size in {"query": queries, "key": keys, "value": keys}.items():
            layer[f"attention/{name}/bias"] = (size,)
    if config.get("attention_bias"):
        layer["attention/out/bias"] = (width,)
    if config.get("mlp_bias"):
        for name, size in {"gate": inner, "up": inner, "down": width}.items():
            layer[f"mlp/{name}/bias"] = (size,)
    if kind == "gemma2":
        layer["after_attention_norm/scale"] = (width,)
        layer["after_mlp_norm/scale"] = (width,)
    tied = config.get("tie_word_embeddings", kind in ("gemma", "gemma2"))
    head_shape = {} if tied else {"head/kernel": (width, words)}
    return {
        "embed/embedding": (words, width),
        **_layers(config, "num_hidden_layers", layer),
        "norm/scale": (width,),
        **head_shape,
    }


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    width = _size(config, "n_embd")
    inner = _size(config, "n_inner", 4 * width)
    layer = {
        **_linear("attention/qkv", width, 3 * width),
        **_linear("attention/out", width, width),
        **_linear("mlp/up", width, inner),
        **_linear("mlp/down", inner, width),
        **_norm("attention_norm", width),
        **_norm("mlp_norm", width),
    }
    return {
        "embed/embedding": (_size(config, "vocab_size"), width),
        "positions/embedding": (_size(config, "n_positions"), width),
        **_layers(config, "n_layer", layer),
        **_norm("norm", width),
    }


def _bert(config: Mapping[str, Any]) -> Shapes:
    width, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    layer = {
        **_linear("attention/query", width, width),
        **_linear("attention/key", width, width),
        **_linear("attention/value", width, width),
        **_linear("attention/out", width, width),
        **_norm("attention_norm", width),
        **_linear("mlp/up", width, inner),
        **_linear("mlp/down", inner, width),
        **_norm("mlp_norm", width),
    }
    return {
        "embed/embedding": (_size(config, "vocab_size"), width),
        "positions/embedding": (_size(config, "max_position_embeddings"), width),
        "types/embedding": (_size(config, "type_vocab_size", 2), width),
        **_norm("norm", width),
        **_layers(config, "num_hidden_layers", layer),
        **_linear("pooler", width, width),
    }


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gemma": _llama,
    "gemma2": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _layers(config: Mapping[str, Any], count: str, layer: Shapes) -> Shapes:
    return {
        f"layers/{number}/{name}": shape
        for number in range(_size(config, count))
        for name, shape in layer.items()
    }


def _size(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A positive number of the config; null stands for the default."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a positive integer, got {value!r}")
    return value


def _like(kind: str, **sizes: int) -> dict[str, Any]:
    return {"model_type": kind, **sizes}


def _decoder(
    kind: str, width: int, inner: int, layers: int, heads: int, kv: int, words: int
) -> dict[str, Any]:
    return _like(
        kind,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=words,
    )


def _gpt2_like(width: int, layers: int) -> dict[str, Any]:
    sizes = {"vocab_size": 50257, "n_positions": 1024}
    return _like("gpt2", n_embd=width, n_layer=layers, **sizes)


def _bert_like(width: int, layers: int, words: int = 30522) -> dict[str, Any]:
    return _like(
        "bert",
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        max_position_embeddings=512,
    )


# The sizes of the published config.json files.
MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": _decoder("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _decoder("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _decoder("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _decoder("llama", 8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, 32, 8, 32000),
    "qwen2-7b": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "gemma-2b": {**_decoder("gemma", 2048, 16384, 18, 8, 1, 256000), "head_dim": 256},
    "gemma-7b": {**_decoder("gemma", 3072, 24576, 28, 16, 16, 256000), "head_dim": 256},
    "gemma2-9b": {**_decoder("gemma2", 3584, 14336, 42, 16, 8, 256000), "head_dim": 256},
    "gpt2": _gpt2_like(768, 12),
    "gpt2-medium": _gpt2_like(1024, 24),
    "gpt2-large": _gpt2_like(1280, 36),
    "gpt2-xl": _gpt2_like(1600, 48),
    "bert-base": _bert_like(768, 12),
    "bert-large": _bert_like(1024, 24),
}
