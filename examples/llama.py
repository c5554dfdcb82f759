"""A Llama-family decoder, its layers stacked: Llama 2 and 3, Mistral, Qwen2, SmolLM2.

Pure functions of a dict of parameters, and `Llama`, the same as a Flax NNX module::

    {"embed": [vocab, hidden], "norm": [hidden], "head": [hidden, vocab], "layers": {
        "attention_norm", "mlp_norm": [layers, hidden],
        "q": [layers, hidden, heads * head_dim], "k", "v": the same of the kv heads,
        "o": [layers, heads * head_dim, hidden],
        "gate", "up": [layers, hidden, intermediate],
        "down": [layers, intermediate, hidden]}}

There is no head where it is tied to the embedding, and Qwen2 has `q_bias`, `k_bias` and
`v_bias`, too. All are computed in the parameters' dtype, norms, rotation and softmax in
float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_config import Config

Params = dict[str, Any]
DEVIATION = 0.02  # of initial weights


def param_shapes(config: Config) -> Params:
    """The shape of each parameter, in a tree like that of the parameters."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    wide, narrow = config.num_heads * head, config.num_kv_heads * head
    layer = {
        "attention_norm": (hidden,),
        "q": (hidden, wide),
        "k": (hidden, narrow),
        "v": (hidden, narrow),
        "o": (wide, hidden),
        "mlp_norm": (hidden,),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    if config.attention_bias:
        layer |= {"q_bias": (wide,), "k_bias": (narrow,), "v_bias": (narrow,)}
    shapes = {
        "embed": (config.vocab_size, hidden),
        "layers": {name: (config.num_layers, *shape) for name, shape in layer.items()},
        "norm": (hidden,),
    }
    return shapes if config.tied else {**shapes, "head": (hidden, config.vocab_size)}


def init_params(config: Config, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random weights, norms of one and biases of zero, all of `dtype`."""
    shapes, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config), _is_shape)
    keys = jax.random.split(key, len(shapes))
    leaves = [
        _initial(path[-1].key, shape, leaf_key, dtype)
        for (path, shape), leaf_key in zip(shapes, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _initial(name: str, shape: tuple[int, ...], key: jax.Array, dtype) -> jax.Array:
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return DEVIATION * jax.random.normal(key, shape, dtype)


def rotary(config: Config, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation, float32 ``(length, head_dim / 2)`` each."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    positions = jnp.arange(length, dtype=jnp.float32)[:, None]
    angles = positions * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _stretched(frequencies: np.ndarray, scaling) -> np.ndarray:
    """Llama 3.1: long waves are stretched, short ones kept, and between a blend."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def causal_mask(config: Config, length: int) -> jax.Array:
    """Which token (row) sees which (column): bool ``(length, length)``."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    mask = distance >= 0
    if config.sliding_window is not None:
        mask &= distance < config.sliding_window
    return mask


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Of integer tokens ``(batch, length)``: ``(batch, length, hidden)``."""
    return params["embed"][tokens]


def block(
    config: Config,
    layer: Params,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """One layer, whose parameters have no leading axis, of ``(batch, length, hidden)``.

    Args:
      config: the model's.
      layer: its parameters.
      x: hidden states, in the dtype of all that is computed.
      cos: of `rotary`.
      sin: of `rotary`.
      mask: of `causal_mask`, or bool ``(batch, length, length)``.

    Returns:
      An array like `x`.
    """
    normed = _norm(x, layer["attention_norm"], config.rms_norm_eps)
    x = x + _attention(config, layer, normed, cos, sin, mask)
    normed = _norm(x, layer["mlp_norm"], config.rms_norm_eps)
    gated = jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])
    return x + gated @ layer["down"]


def _attention(config: Config, layer: Params, x, cos, sin, mask) -> jax.Array:
    q, k, v = (_heads(config, layer, name, x) for name in ("q", "k", "v"))
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return attended.reshape(*x.shape[:2], -1) @ layer["o"]


def _heads(config: Config, layer: Params, name: str, x: jax.Array) -> jax.Array:
    """Queries, keys or values ``(batch, length, heads, head_dim)``."""
    projected = x @ layer[name]
    if config.attention_bias:
        projected += layer[f"{name}_bias"]
    return projected.reshape(*x.shape[:2], -1, config.head_dim)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads ``(batch, length, heads, head_dim)``, halves turned against each other."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.square(wide).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + eps)).astype(x.dtype) * scale


def head_logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """Final norm and head: float32 ``(batch, length, vocab)``."""
    x = _norm(x, params["norm"], config.rms_norm_eps)
    head = params["embed"].T if config.tied else params["head"]
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def logits(
    config: Config, params: Params, tokens: jax.Array, *, remat: bool = False
) -> jax.Array:
    """Of integer tokens ``(batch, length)``: float32 ``(batch, length, vocab)``.

    With `remat`, a layer's inner values are computed anew for the gradient.
    """
    cos, sin = rotary(config, tokens.shape[1])
    mask = causal_mask(config, tokens.shape[1])
    one = functools.partial(block, config)
    one = jax.checkpoint(one) if remat else one

    def step(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return one(layer, x, cos, sin, mask), None

    x, _ = jax.lax.scan(step, embed(params, tokens), params["layers"])
    return head_logits(config, params, x)


def num_params(config: Config) -> int:
    """Parameters, a tied head counted once."""
    shapes = jax.tree.leaves(param_shapes(config), is_leaf=_is_shape)
    return sum(math.prod(shape) for shape in shapes)


class Llama(nnx.Module):
    """The decoder with its parameters, initially random."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self._set(config, init_params(config, rngs.params(), dtype))

    def _set(self, config: Config, params: Params) -> None:
        self.config = config
        self.embed = nnx.Param(params["embed"])
        layers = {name: nnx.Param(x) for name, x in params["layers"].items()}
        self.layers = nnx.Dict(layers)
        self.norm = nnx.Param(params["norm"])
        if not config.tied:
            self.head = nnx.Param(params["head"])

    @classmethod
    def from_params(cls, config: Config, params: Params) -> "Llama":
        """The module that holds the arrays of `params`, not copies."""
        shapes = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def params(self) -> Params:
        """The arrays as the functions of this file take them, not copies."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Of integer tokens ``(batch, length)``: float32 ``(batch, length, vocab)``."""
        return logits(self.config, self.params(), tokens)
