"""Small Llama-family models, without weights in files: configs and weights by formula.

Shared by the tests and data/make_llama_reference.py, which runs where there is no flax.
"""

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

COMMON = {
    "hidden_act": "silu",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,  # not so small that it does not matter
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
# As transformers 4 writes them.
CONFIGS = {
    "llama2": {**COMMON, "model_type": "llama", "num_key_value_heads": 6},
    "llama3": {
        **COMMON,
        "model_type": "llama",
        "head_dim": 8,  # not hidden_size / num_attention_heads
        "rope_theta": 500.0,
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },  # of four wavelengths one is kept, one is blended, two are stretched
        "eos_token_id": [2, 3],
    },
    "mistral": {**COMMON, "model_type": "mistral", "head_dim": 8, "sliding_window": 5},
    "qwen2": {
        **COMMON,
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 3,  # which is not used, then
        "max_window_layers": 1,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    },
    "smollm2": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
}
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 16)).tolist()


def weight(name: str, shape) -> np.ndarray:
    """A tensor of a checkpoint, float32, from its name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("bias"):
        return rng.normal(0, 0.5, shape).astype(np.float32)
    if "embed_tokens" in name:
        return rng.normal(0, 0.3, shape).astype(np.float32)
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


REFERENCE = pathlib.Path(__file__).parent / "data" / "llama_reference.json"


def reference(name: str) -> dict:
    """Of transformers: the ``config`` it writes, ``shapes`` of weights, ``logits``."""
    return json.loads(REFERENCE.read_text())["cases"][name]


def tensors(name: str) -> dict[str, np.ndarray]:
    """A case's checkpoint; without lm_head where it is tied."""
    tied = CONFIGS[name]["tie_word_embeddings"]
    return {
        key: weight(key, shape)
        for key, shape in reference(name)["shapes"].items()
        if key != "lm_head.weight" or not tied
    }


def write_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A case as Hugging Face lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file(tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def tokenizer() -> Tokenizer:
    """Words ``w3`` to ``w36``, ``<s>`` first; it cuts and pads to four."""
    words = ["<unk>", "<s>", "</s>", *(f"w{x}" for x in range(3, COMMON["vocab_size"]))]
    numbers = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=4, pad_id=2, pad_token="</s>")
    return made


def edit(folder, **changes):
    """Changes its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same(a: dict, b: dict) -> None:
    """That two trees of parameters are, to the bit."""
    assert sorted(a) == sorted(b)
    for name, leaf in a.items():
        if isinstance(leaf, dict):
            assert_same(leaf, b[name])
        else:
            np.testing.assert_array_equal(leaf, b[name])
