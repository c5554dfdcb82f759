"""The window of past sparse gradients: a ring of ``window - 1`` slots in every row.

A row holds its slots one after another, ``(window - 1) * k`` entries. The newest
gradient is not among them until its step is over: the slot that a step will
overwrite is never read by it, so one slot fewer is stored.

The ages of the slots, a permutation of 1 to ``window - 1``, are kept in the state,
so its shapes alone tell its window.
"""

import jax
import jax.numpy as jnp


def first(slots: int) -> jax.Array:
    """The ages before the first step, int32 ``(slots,)``: slot 0 is the oldest.

    Slots not yet written hold zeros; their age is meaningless and harmless.
    """
    return jnp.arange(slots, 0, -1, dtype=jnp.int32)


def valid(ages: jax.Array) -> jax.Array:
    """The ages; those before the first step if all are 0, as in a state of zeros."""
    return jnp.where(jnp.any(ages > 0), ages, first(ages.size))


def older(ages: jax.Array) -> jax.Array:
    """The ages one step later: the oldest slot has been written and is the newest."""
    return ages % ages.size + 1


def start(ages: jax.Array, k: int) -> jax.Array:
    """Where the ``k`` entries of a step go in a row: the oldest slot, int32 scalar."""
    return jnp.argmax(ages).astype(jnp.int32) * k
