"""How many bytes an optimizer's state takes, before anything is allocated."""

import math
from typing import Any

import jax
import optax

from microadam_optax._sharding import state_shardings


def optimizer_bytes(
    tx: optax.GradientTransformation, params: Any, shardings: Any = None
) -> int:
    """Bytes of the state of any optax transformation.

    Args:
      tx: the transformation. Only shapes are computed, nothing is allocated.
      params: the parameters or their shapes, anything with ``shape`` and ``dtype``.
      shardings: None for the whole state; a tree of shardings like `params`, or a
        prefix of it, for the share of one device, as `state_shardings` places it.

    Returns:
      A number of bytes.

    Raises:
      ValueError: see `state_shardings`, as for the other errors of `shardings`.
      TypeError: see `state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from microadam_optax import microadam, memory
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> memory.optimizer_bytes(optax.adam(1e-3), params) / 4096**2
      8.000000238418579
      >>> memory.optimizer_bytes(microadam(1e-3), params) / 4096**2
      0.7031254768371582
    """
    state = jax.eval_shape(tx.init, params)
    if shardings is None:
        return array_bytes(state)
    return array_bytes(state, state_shardings(tx, params, shardings))


def array_bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes of all arrays of a tree, or of one device's shards of them."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        places = jax.tree.leaves(shardings)
        shapes = [x.shard_shape(s) for x, s in zip(places, shapes, strict=True)]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize
        for shape, leaf in zip(shapes, leaves, strict=True)
    )
