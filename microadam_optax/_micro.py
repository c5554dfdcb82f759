"""Micro-batches: what `accumulate` tells each MicroAdam of the transformation it calls.

In the place of the count of its state, so that no transformation in between can drop it,
and one that is jitted or vmapped by itself has it as an argument.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_optax._state import MicroAdamState


class MicroBatch(NamedTuple):
    """One of the micro-batches whose mean gradient makes a step; all of one shape."""

    count: jax.Array  # type: ignore[assignment]  # int32, steps done
    number: jax.Array  # int32, from 0
    last: jax.Array  # bool, whether the step is taken with it
    share: jax.Array  # float32, of one of them in the mean


def tell(state: Any, number: jax.Array, every: int) -> Any:
    """The state of a transformation, with the micro-batch in that of each MicroAdam."""
    of = number, number >= every - 1, jnp.float32(1 / every)

    def count(count: jax.Array) -> MicroBatch:
        return MicroBatch(count, *(jnp.broadcast_to(x, jnp.shape(count)) for x in of))

    return _with_counts(count, state)


def untell(state: Any) -> Any:
    """The inverse of `tell`."""
    return _with_counts(lambda x: x.count if isinstance(x, MicroBatch) else x, state)


def of(state: MicroAdamState) -> tuple[jax.Array, MicroBatch | None]:
    """The steps done, and the micro-batch that gradients are of, if they are of one."""
    count: Any = state.count
    return (count.count, count) if isinstance(count, MicroBatch) else (count, None)


def counted(count: jax.Array, micro: MicroBatch | None) -> Any:
    """The count of a new state, in the form that the old one had."""
    return count if micro is None else micro._replace(count=count)


def is_microadam(x: Any) -> bool:
    """Whether it is the state of a MicroAdam."""
    return isinstance(x, MicroAdamState)


def _with_counts(f: Any, state: Any) -> Any:
    return jax.tree.map(
        lambda x: x._replace(count=f(x.count)) if is_microadam(x) else x,
        state,
        is_leaf=is_microadam,
    )
