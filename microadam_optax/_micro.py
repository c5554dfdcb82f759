"""Micro-batches: what `accumulate` tells the transformation that it calls.

By the context, not as an argument, so that no transformation in between can drop it.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class MicroBatch(NamedTuple):
    """One of the micro-batches whose mean gradient makes a step."""

    last: jax.Array  # bool, whether the step is taken with it
    number: jax.Array  # int32, from 0
    share: jax.Array  # float32, of one of them in the mean


class _Now(NamedTuple):
    batch: MicroBatch
    seen: list[bool]


_now: contextvars.ContextVar[_Now | None] = contextvars.ContextVar("now", default=None)


@contextlib.contextmanager
def batch(micro: MicroBatch) -> Iterator[list[bool]]:
    """While gradients are of one micro-batch; what it gives is filled by who asks."""
    seen: list[bool] = []
    token = _now.set(_Now(micro, seen))
    try:
        yield seen
    finally:
        _now.reset(token)


def current() -> MicroBatch | None:
    """The micro-batch that gradients are of; None if they are of a whole batch."""
    now = _now.get()
    if now is None:
        return None
    now.seen.append(True)
    return now.batch
