"""A small Llama with random weights, as a Hugging Face folder."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


def tokenizer() -> Tokenizer:
    """Bytes, and one token each for beginning and end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {x: i for i, x in enumerate([*letters, "<s>", "</s>"])}
    made = Tokenizer(models.BPE(numbers, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def shapes(config):
    width, inner, words = (
        config[x] for x in ("hidden_size", "intermediate_size", "vocab_size")
    )
    some = width * config["num_key_value_heads"] // config["num_attention_heads"]
    yield "model.embed_tokens", (words, width)
    yield "model.norm", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head", (words, width)
    for i in range(config["num_hidden_layers"]):
        lead = f"model.layers.{i}"
        yield f"{lead}.input_layernorm", (width,)
        yield f"{lead}.post_attention_layernorm", (width,)
        for name, rows in (("q", width), ("k", some), ("v", some), ("o", width)):
            yield f"{lead}.self_attn.{name}_proj", (rows, width)
        yield f"{lead}.mlp.gate_proj", (inner, width)
        yield f"{lead}.mlp.up_proj", (inner, width)
        yield f"{lead}.mlp.down_proj", (width, inner)


def write(folder, seed=0, **changes):
    """The folder, with a config.json that may be changed."""
    config, rng = CONFIG | changes, np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config):
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.05, shape)
        weights[f"{name}.weight"] = values.astype(np.float32)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
