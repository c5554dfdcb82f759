"""The window of past sparse gradients: a ring of ``window - 1`` slots in every row.

A row holds its slots one after another, ``(window - 1) * k`` entries. The newest
gradient is not among them until its step is over: the slot that a step will
overwrite is never read by it, so one slot fewer is stored.
"""

import jax
import jax.numpy as jnp


def start(count: jax.Array, slots: int, k: int) -> jax.Array:
    """Where the entries of a step go in a row: the oldest slot, int32 scalar.

    Args:
      count: int32, steps done before this one.
      slots: ``window - 1``.
      k: entries in a slot.
    """
    return (count % slots) * k


def ages(count: jax.Array, slots: int) -> jax.Array:
    """Steps since each slot was written, int32 ``(slots,)``: 1 for the newest.

    Slots not yet written hold zeros; their age is meaningless and harmless.
    """
    return (count - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots + 1
