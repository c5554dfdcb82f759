"""A BERT encoder in Flax NNX that loads Hugging Face checkpoints from a local folder."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

FILES = "config.json", "model.safetensors", "tokenizer.json"
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}  # what is implemented; a config may leave the last two out

# Our modules under their names in Hugging Face's checkpoints.
NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


class Config(NamedTuple):
    """The fields of a config.json that shape the encoder."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1


class Layer(nnx.Module):
    """Attention and an MLP, each followed by a norm of its sum with the input."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        eps = config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, drop) -> jax.Array:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (part(x).reshape(heads) for part in (self.query, self.key, self.value))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.attention_norm(x + drop(self.attention_out(attended.reshape(x.shape))))
        inner = nnx.gelu(self.up(x), approximate=False)
        return self.norm(x + drop(self.down(inner)))


class Encoder(nnx.Module):
    """Hidden states of the last layer, ``(batch, length, hidden_size)``."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dropout = config.hidden_dropout_prob
        self.words = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.types = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Layer(config, rngs) for _ in layers])
        self.pooler = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Of tokens ``(batch, length)``, where `mask` is true; with a key, dropout."""
        drop = _dropout(self.dropout, key)
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = drop(self.norm(x + self.types(jnp.zeros_like(tokens))))
        for layer in self.layers:
            x = layer(x, mask, drop)
        return x


class Classifier(nnx.Module):
    """Logits of classes, from the encoder's mean or from its first token's pooler."""

    def __init__(self, encoder: Encoder, classes: int, pooling: str, rngs: nnx.Rngs):
        self.encoder, self.pooling = encoder, pooling
        width = encoder.norm.num_features
        self.head = nnx.Linear(width, classes, rngs=rngs)
        if pooling == "mean":
            del self.encoder.pooler

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        states = self.encoder(tokens, mask, key)
        if self.pooling == "mean":
            return self.head(mean_of(states, mask))
        return self.head(jnp.tanh(self.encoder.pooler(states[:, 0])))


def mean_of(states: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean hidden state of the tokens that are not padding."""
    weights = mask[..., None].astype(states.dtype)
    return (states * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def _dropout(rate: float, key: jax.Array | None):
    """Drops a share of an array's entries, each time others; nothing without a key."""
    if key is None or not rate:
        return lambda x: x
    keys = nnx.Rngs(key)

    def drop(x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(keys(), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return drop


def load_config(folder: pathlib.Path) -> Config:
    """The folder's config.json; ValueError if it is not that of such an encoder."""
    found = json.loads((folder / "config.json").read_text())
    for field, value in FIXED.items():
        if found.get(field, None if field == "model_type" else value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: {field} must be {value!r}, "
                f"got {found.get(field)!r}"
            )
    missing = [x for x in Config._fields[:6] if not isinstance(found.get(x), int)]
    if missing:
        raise ValueError(f"{folder / 'config.json'} has no number {missing[0]}")
    return Config(**{x: found[x] for x in Config._fields if x in found})


def load_encoder(folder: pathlib.Path) -> Encoder:
    """The encoder with the folder's weights; ValueError if they do not fit it."""
    config, file = load_config(folder), folder / "model.safetensors"
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    weights = {name.removeprefix("bert."): array for name, array in weights.items()}
    shapes = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))
    graph, params = nnx.split(shapes)

    def weight(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        *module, kind = (str(getattr(x, "key", x)) for x in path if hasattr(x, "key"))
        name = _published_name(module, kind)
        if name not in weights:
            raise ValueError(f"{file} has no {name}")
        array = weights[name].T if kind == "kernel" else weights[name]
        if array.shape != leaf.shape:
            raise ValueError(
                f"{file}: {name} has the shape {array.shape}, not {leaf.shape}"
            )
        return jnp.asarray(array, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(weight, params))


def _published_name(module: list[str], kind: str) -> str:
    """A parameter's name in the checkpoint: linear weights lie there transposed."""
    suffix = "bias" if kind == "bias" else "weight"
    if module[0] == "layers":
        return f"encoder.layer.{module[1]}.{LAYER_NAMES[module[2]]}.{suffix}"
    return f"{NAMES[module[0]]}.{suffix}"


class Tokens:
    """Texts to token numbers and a mask, both ``(texts, length)``."""

    def __init__(self, folder: pathlib.Path, length: int):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = self.tokenizer.encode_batch(texts)
        tokens = np.array([x.ids for x in found], np.int32)
        return tokens, np.array([x.attention_mask for x in found], bool)


def check_folder(folder: pathlib.Path) -> None:
    """FileNotFoundError that names the first file that is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(2, "No such file", str(folder / name))
