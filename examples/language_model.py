"""A byte-level transformer language model in Flax NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Block(nnx.Module):
    """Causal attention and an MLP, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = (batch, length, 3, self.heads, width // self.heads)
        qkv = self.query_key_value(self.norm_attention(x)).reshape(heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class LanguageModel(nnx.Module):
    """Next-byte logits for a batch of byte sequences."""

    def __init__(self, length: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.bytes(text) + self.positions(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def mean_loss(graph: nnx.GraphDef, params: nnx.State, text: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats a byte of sequences ``(batch, length + 1)``."""
    logits = nnx.merge(graph, params)(text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean()
