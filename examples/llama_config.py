"""The shape of a Llama-family decoder, from and to Hugging Face's config.json."""

import dataclasses
from typing import Any

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position": "max_position_embeddings",
}  # numbers that every config.json has
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}  # by model_type; what is not here is not read
LARGEST = 2**31  # of any number, for arrays are indexed by int32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of long wavelengths of the rotary embedding."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Config:
    """What shapes the decoder; hashable, so that it may be a static argument."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # the head is the embedding, transposed
    attention_bias: bool = False  # of q, k and v, as in Qwen2
    sliding_window: int | None = None  # tokens that a token sees, itself among them
    max_position: int = 2048  # tokens
    model_type: str = "llama"
    bos_id: int | None = None
    eos_id: int | None = None


def config_from_json(found: dict[str, Any]) -> Config:
    """What a config.json says, as transformers 4 or 5 writes it.

    Raises:
      ValueError: in one line, for what is missing, malformed or not implemented.
    """
    _check_implemented(found)
    model_type = found["model_type"]
    numbers = {ours: _number(found, theirs) for ours, theirs in KEYS.items()}
    theta, scaling = _rope(found, numbers["max_position"])
    heads = numbers["num_heads"]
    if found.get("head_dim") is None and numbers["hidden_size"] % heads:
        raise ValueError(
            f"hidden_size {numbers['hidden_size']} is no multiple of the "
            f"{heads} num_attention_heads, and there is no head_dim"
        )
    kv_default = heads if model_type == "llama" else None
    config = Config(
        **numbers,
        num_kv_heads=_number(found, "num_key_value_heads", kv_default),
        head_dim=_number(found, "head_dim", numbers["hidden_size"] // heads),
        rms_norm_eps=_number(found, "rms_norm_eps", 1e-6, float),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=_flag(found, "tie_word_embeddings"),
        attention_bias=model_type == "qwen2",
        sliding_window=_window(found),
        model_type=model_type,
        bos_id=_token(found, "bos_token_id"),
        eos_id=_token(found, "eos_token_id"),
    )
    check(config)
    return config


def config_to_json(config: Config) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read; `config_from_json` inverts it."""
    found: dict[str, Any] = {
        "architectures": [CLASSES[config.model_type]],
        "model_type": config.model_type,
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        length = scaling.pop("original_max_position")
        found["rope_scaling"] = {
            "rope_type": "llama3",
            **scaling,
            "original_max_position_embeddings": length,
        }
    if config.model_type == "mistral":
        found["sliding_window"] = config.sliding_window
    if config.model_type == "qwen2":
        found["use_sliding_window"] = False
    return found


def check(config: Config) -> None:
    """ValueError for heads that cannot be grouped or cannot be rotated."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} "
            "key-value heads evenly"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotation, got {config.head_dim}")


def _check_implemented(found: dict[str, Any]) -> None:
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES:
        known = ", ".join(CLASSES)
        raise ValueError(f"model_type must be one of {known}, got {model_type!r}")
    if found.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantized weights are not read")
    for key in ("attention_bias", "mlp_bias"):
        if _flag(found, key) and model_type == "llama":
            raise ValueError(f"{key}: its biases are not implemented")
    if found.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {found['hidden_act']!r}")
    if model_type == "qwen2" and _slides(found):
        raise ValueError("use_sliding_window is not implemented for qwen2")


def _slides(found: dict[str, Any]) -> bool:
    """Whether a layer of a Qwen2 has a window: those from max_window_layers on."""
    if not _flag(found, "use_sliding_window") or found.get("sliding_window", 1) is None:
        return False
    kinds = found.get("layer_types")
    if kinds is not None:
        return "sliding_attention" in str(kinds)
    if found.get("max_window_layers") == 0:
        return True
    first = _number(found, "max_window_layers", 28)
    return first < _number(found, "num_hidden_layers")


def _window(found: dict[str, Any]) -> int | None:
    """Mistral's; the others have none, whatever `sliding_window` says."""
    if found["model_type"] != "mistral":
        return None
    if found.get("sliding_window", 4096) is None:
        return None
    return _number(found, "sliding_window", 4096)


def _rope(found: dict[str, Any], length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling: of rope_parameters, or of rope_theta and rope_scaling."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(found.get(key) or {}, dict):
            raise ValueError(f"{key} must be an object, got {found[key]!r}")
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    theta = _number({"rope_theta": 10_000.0, **found, **rope}, "rope_theta", kind=float)
    for partial in (found, rope):
        if partial.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError("partial_rotary_factor other than 1 is not implemented")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type must be 'default' or 'llama3', got {kind!r}")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factors = [_number(rope, name, kind=float) for name in names]
    if factors[1] >= factors[2]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    original = found.get("original_max_position_embeddings") or length
    return theta, RopeScaling(
        *factors, _number(rope, "original_max_position_embeddings", original)
    )


def _number(found: dict[str, Any], key: str, default=None, kind: type = int):
    """A number above zero; `default` where it is absent or null."""
    value = found.get(key)
    value = default if value is None else value
    kinds = int if kind is int else int | float
    known = isinstance(value, kinds) and not isinstance(value, bool)
    if not known or not 0 < value < LARGEST:
        noun = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key} must be {noun} above zero, got {value!r:.40}")
    return kind(value)


def _flag(found: dict[str, Any], key: str) -> bool:
    value = found.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)


def _token(found: dict[str, Any], key: str) -> int | None:
    """A token's number; the first where there are several."""
    value = found.get(key)
    value = value[0] if isinstance(value, list) and value else value
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} must be a token's number, got {found[key]!r}")
    if value is not None and not 0 <= value < found["vocab_size"]:
        raise ValueError(f"{key} {value} is not in a vocabulary of {found['vocab_size']}")
    return value
