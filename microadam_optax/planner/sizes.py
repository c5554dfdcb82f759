"""Sizes of published models, as their config.json files have them."""

from typing import Any


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
