"""Updates of bfloat16 parameters that do not vanish in rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from microadam_optax._paths import shown


def apply_updates_stochastic(params: Any, updates: Any, key: jax.Array) -> Any:
    """`optax.apply_updates` with bfloat16 parameters rounded up or down at random.

    A bfloat16 has 8 significant bits: an update below 1/512 of a parameter is lost by
    ordinary rounding, each time. Rounded at random, to either neighbour with the
    probability that makes it right on average, updates add up. No master weights are
    kept.

    Args:
      params: the parameters; leaves other than bfloat16 are rounded as by optax.
      updates: a tree like `params`, of any floating-point dtypes; better float32, as
        an update in bfloat16 was rounded before.
      key: a PRNG key, another one for each step.

    Returns:
      The new parameters, in the shapes and dtypes of `params`.

    Raises:
      ValueError: `updates` is not a tree like `params`.
      TypeError: `updates` has None for a parameter. Where the parameter itself is None,
        as optax's trees may have it, it stays None.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from microadam_optax import apply_updates_stochastic
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> updates = jnp.full(10_000, 1e-3)
      >>> float(optax.apply_updates(params, updates).mean())
      1.0
      >>> new = apply_updates_stochastic(params, updates, jax.random.key(0))
      >>> 1.0009 < float(new.astype(jnp.float32).mean()) < 1.0011
      True
    """
    pairs, tree = _pairs(params, updates)
    new = [
        _apply(leaf, update, jax.random.fold_in(key, number))
        for number, (leaf, update) in enumerate(pairs)
    ]
    return jax.tree.unflatten(tree, new)


def lost_updates(params: Any, updates: Any) -> jax.Array:
    """The share of the updates that ordinary rounding loses.

    Args:
      params: the parameters before the step, of any shapes and floating-point dtypes.
      updates: what is added to them, a tree like `params`.

    Returns:
      float32 scalar: of the entries whose update is not 0, the share that
      `optax.apply_updates` leaves as they are; 0 if nothing moves.

    Raises:
      ValueError: `updates` is not a tree like `params`.
      TypeError: `updates` has None for a parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from microadam_optax import lost_updates
      >>> float(lost_updates(jnp.ones(4, jnp.bfloat16), jnp.array([0, 1e-3, 1e-3, 1e-2])))
      0.6666666865348816
    """
    lost = moving = jnp.float32(0)
    for leaf, update in _pairs(params, updates)[0]:
        if leaf is not None:
            same = optax.apply_updates(leaf, update) == leaf
            lost += _count((update != 0) & same)
            moving += _count(update != 0)
    return lost / jnp.maximum(moving, 1)


def _pairs(params: Any, updates: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Leaves with their updates, and the structure; where a leaf is None it is kept."""
    tree: Any
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_none)
    given = tree.flatten_up_to(updates)
    for (path, leaf), update in zip(leaves, given, strict=True):
        if update is None and leaf is not None:
            raise TypeError(f"`updates` has None for {shown(path)}, which is an array.")
    return [(leaf, u) for (_, leaf), u in zip(leaves, given, strict=True)], tree


def _is_none(x: Any) -> bool:
    return x is None


def _apply(leaf: Any, update: Any, key: jax.Array) -> Any:
    if leaf is None or jnp.result_type(leaf) != jnp.bfloat16:
        return optax.apply_updates(leaf, update)
    exact = jnp.asarray(leaf, jnp.float32) + jnp.asarray(update, jnp.float32)
    return _rounded(exact, key)


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16, unbiased."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise
    cut = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _count(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)
