"""Parameter shapes of language models, from the config.json of Hugging Face."""

from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

MOST_LAYERS = 10_000

# What Hugging Face's classes take for fields that a file may lack.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
    },
}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The shape of every parameter, by name; ValueError if the config does not tell."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type must be one of {known}, got {kind!r}")
    return FAMILIES[kind](config)


def _llama(config: Mapping[str, Any]) -> Shapes:
    """Llama and what has its shape: Mistral, Mixtral, Phi-3, Qwen, Gemma."""
    kind = config["model_type"]
    config = {**DEFAULTS.get(kind, {}), **config}
    width, words = _size(config, "hidden_size"), _size(config, "vocab_size")
    layer = {**_attention(config), **_mlp(config)}
    for name in ("attention", "mlp"):
        layer[f"{name}_norm/scale"] = (width,)
        if kind in ("gemma2", "gemma3_text"):
            layer[f"after_{name}_norm/scale"] = (width,)
    tied = config.get("tie_word_embeddings", kind.startswith("gemma"))
    head = {} if tied else {"head/kernel": (width, words)}
    return {
        "embed/embedding": (words, width),
        **_layers(config, "num_hidden_layers", layer),
        "norm/scale": (width,),
        **head,
    }


def _attention(config: Mapping[str, Any]) -> Shapes:
    kind, width = config["model_type"], _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", width // heads)
    inputs = {"query": heads * head, "key": kv_heads * head, "value": kv_heads * head}
    if kind == "phi3":
        inputs = {"qkv": sum(inputs.values())}
    shapes: Shapes = {"attention/out/kernel": (heads * head, width)}
    for name, size in inputs.items():
        shapes[f"attention/{name}/kernel"] = (width, size)
        if kind == "qwen2" or config.get("attention_bias"):
            shapes[f"attention/{name}/bias"] = (size,)
    if config.get("attention_bias"):
        shapes["attention/out/bias"] = (width,)
    if kind in ("qwen3", "gemma3_text"):
        shapes["attention/query_norm/scale"] = (head,)
        shapes["attention/key_norm/scale"] = (head,)
    return shapes


def _mlp(config: Mapping[str, Any]) -> Shapes:
    """Gate, up and down; of Mixtral for all experts together."""
    kind, width = config["model_type"], _size(config, "hidden_size")
    inner = _size(config, "intermediate_size")
    inputs = {"gate_up": 2 * inner} if kind == "phi3" else {"gate": inner, "up": inner}
    kernels: Shapes = {name: (width, size) for name, size in inputs.items()}
    kernels["down"] = (inner, width)
    if kind == "mixtral":
        experts = _size(config, "num_local_experts")
        of_experts = {f"experts/{x}/kernel": (experts, *s) for x, s in kernels.items()}
        return {"router/kernel": (width, experts), **of_experts}
    shapes = {f"mlp/{name}/kernel": shape for name, shape in kernels.items()}
    if config.get("mlp_bias"):
        shapes.update({f"mlp/{x}/bias": shape[-1:] for x, shape in kernels.items()})
    return shapes


def _gemma3(config: Mapping[str, Any]) -> Shapes:
    """Gemma 3 for texts and images: SigLIP's encoder before the language model."""
    text, vision = (_part(config, f"{name}_config") for name in ("text", "vision"))
    width, patch = _size(vision, "hidden_size"), _size(vision, "patch_size")
    patches = (_size(vision, "image_size") // patch) ** 2
    parts = {
        "text": _llama({**text, "model_type": "gemma3_text"}),
        "vision": {
            "patches/kernel": (patch, patch, 3, width),
            "patches/bias": (width,),
            "positions/embedding": (patches, width),
            **_layers(vision, "num_hidden_layers", _encoder_layer(vision)),
            **_norm("norm", width),
        },
        "projector": {
            "kernel": (width, _size(text, "hidden_size")),
            "norm/scale": (width,),
        },
    }
    return {
        f"{part}/{name}": shape
        for part, shapes in parts.items()
        for name, shape in shapes.items()
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
    width = _size(config, "hidden_size")
    return {
        "embed/embedding": (_size(config, "vocab_size"), width),
        "positions/embedding": (_size(config, "max_position_embeddings"), width),
        "types/embedding": (_size(config, "type_vocab_size", 2), width),
        **_norm("norm", width),
        **_layers(config, "num_hidden_layers", _encoder_layer(config)),
        **_linear("pooler", width, width),
    }


def _encoder_layer(config: Mapping[str, Any]) -> Shapes:
    """Of BERT and of SigLIP."""
    width, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    return {
        **_linear("attention/query", width, width),
        **_linear("attention/key", width, width),
        **_linear("attention/value", width, width),
        **_linear("attention/out", width, width),
        **_norm("attention_norm", width),
        **_linear("mlp/up", width, inner),
        **_linear("mlp/down", inner, width),
        **_norm("mlp_norm", width),
    }


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "phi3": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _llama,
    "gemma2": _llama,
    "gemma3_text": _llama,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "bert": _bert,
}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _layers(config: Mapping[str, Any], field: str, layer: Shapes) -> Shapes:
    count = _size(config, field)
    if count > MOST_LAYERS:
        raise ValueError(f"{field} must be at most {MOST_LAYERS:,}, got {count:,}")
    return {
        f"layers/{number}/{name}": shape
        for number in range(count)
        for name, shape in layer.items()
    }


def _size(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A positive number of the config; null stands for the default."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a positive integer, got {value!r}")
    return value


def _part(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    part = config.get(field)
    if not isinstance(part, Mapping):
        raise ValueError(f"{field} must be an object, got {part!r}")
    return part
