"""Which leaves keep Adam's dense moments instead of being compressed."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from microadam_optax import _checks

DENSE, COMPRESSED = "dense", "compressed"


def smaller_than(size: int) -> Callable[[Any, Any], bool]:
    """A ``dense`` for `microadam`: leaves of fewer than `size` elements.

    Args:
      size: number of elements.

    Returns:
      A function of a leaf's path and the leaf.

    Raises:
      TypeError: `size` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from microadam_optax import microadam, smaller_than
      >>> tx = microadam(1e-3, dense=smaller_than(4096))
      >>> params = {"w": jnp.zeros((256, 64)), "b": jnp.zeros(64)}
      >>> state = tx.init(params)[0].inner_states
      >>> state["compressed"].inner_state.codes["w"].shape
      (8, 1, 8, 128)
      >>> state["dense"].inner_state.mu["b"].shape
      (64,)
    """
    _checks.check_size(size)

    def dense(path: Any, leaf: Any) -> bool:
        del path
        return int(np.prod(np.shape(leaf))) < size

    return dense


def matching(pattern: str) -> Callable[[Any, Any], bool]:
    """A ``dense`` for `microadam`: leaves with `pattern` in their path.

    Args:
      pattern: a regular expression, sought in the path with its names joined by
        slashes, ``"blocks/0/norm/scale"``.

    Returns:
      A function of a leaf's path and the leaf.

    Raises:
      re.error: `pattern` is not a regular expression.

    Example:
      >>> import jax
      >>> from microadam_optax import matching
      >>> dense = matching(r"embed|norm|bias")
      >>> params = {"embed": 0.0, "mlp": {"kernel": 0.0, "bias": 0.0}}
      >>> jax.tree_util.tree_map_with_path(dense, params)
      {'embed': True, 'mlp': {'bias': True, 'kernel': False}}
    """
    compiled = re.compile(pattern)

    def dense(path: Any, leaf: Any) -> bool:
        del leaf
        return compiled.search(_checks.key(path)) is not None

    return dense


def partition(
    compressed: optax.GradientTransformation,
    adam: optax.GradientTransformation,
    dense: Any,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the leaves that `dense` names and one for the others."""

    def labels(params: Any) -> Any:
        tree: Any
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        choices = _checks.check_dense(dense, params, leaves)
        return tree.unflatten(DENSE if x else COMPRESSED for x in choices)

    return optax.partition({COMPRESSED: compressed, DENSE: adam}, labels)
