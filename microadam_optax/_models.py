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


def _qwen3(
    width: int, inner: int, layers: int, heads: int, tied: bool = False
) -> dict[str, Any]:
    sizes = _decoder("qwen3", width, inner, layers, heads, 8, 151936)
    return {**sizes, "head_dim": 128, "tie_word_embeddings": tied}


def _gemma3_like(
    width: int, inner: int, layers: int, heads: int, head: int = 256
) -> dict[str, Any]:
    text = _decoder("gemma3_text", width, inner, layers, heads, heads // 2, 262208)
    vision = _like(
        "siglip_vision_model",
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        image_size=896,
        patch_size=14,
    )
    return {
        "model_type": "gemma3",
        "text_config": {**text, "head_dim": head},
        "vision_config": vision,
    }


# The sizes of the published config.json files.
MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": _decoder("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _decoder("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _decoder("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _decoder("llama", 8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, 32, 8, 32000),
    "mixtral-8x7b": {
        **_decoder("mixtral", 4096, 14336, 32, 32, 8, 32000),
        "num_local_experts": 8,
    },
    "phi3-mini": _decoder("phi3", 3072, 8192, 32, 32, 32, 32064),
    "phi3-medium": _decoder("phi3", 5120, 17920, 40, 40, 10, 32064),
    "qwen2-7b": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "gemma-2b": {**_decoder("gemma", 2048, 16384, 18, 8, 1, 256000), "head_dim": 256},
    "gemma-7b": {**_decoder("gemma", 3072, 24576, 28, 16, 16, 256000), "head_dim": 256},
    "gemma2-9b": {**_decoder("gemma2", 3584, 14336, 42, 16, 8, 256000), "head_dim": 256},
    "gemma3-1b": {
        **_decoder("gemma3_text", 1152, 6912, 26, 4, 1, 262144),
        "head_dim": 256,
    },
    "gemma3-4b": _gemma3_like(2560, 10240, 34, 8),
    "gemma3-12b": _gemma3_like(3840, 15360, 48, 16),
    "gemma3-27b": _gemma3_like(5376, 21504, 62, 32, head=128),
    "gpt2": _gpt2_like(768, 12),
    "gpt2-medium": _gpt2_like(1024, 24),
    "gpt2-large": _gpt2_like(1280, 36),
    "gpt2-xl": _gpt2_like(1600, 48),
    "bert-base": _bert_like(768, 12),
    "bert-large": _bert_like(1024, 24),
}
