"""Micro-batches: what `accumulate` tells the transformation that it calls.

By the context, not as an argument, so that no transformation in between can drop it.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class MicroBatch(NamedTuple):
    """One of the micro-batches whose mean gradient makes a step."""

    last: jax.Array  # bool, whether the step is taken with it
    number: jax.Array  # int32, from 0


class _Now(NamedTuple):
    batch: MicroBatch
    every: int
    seen: list[bool]


_now: contextvars.ContextVar[_Now | None] = contextvars.ContextVar("now", default=None)


@contextlib.contextmanager
def batch(micro: MicroBatch, every: int) -> Iterator[list[bool]]:
    """While gradients are of one micro-batch; what it gives is filled by who asks."""
    seen: list[bool] = []
    token = _now.set(_Now(micro, every, seen))
    try:
        yield seen
    finally:
        _now.reset(token)


def current() -> tuple[MicroBatch | None, int]:
    """The micro-batch that gradients are of, and how many make a step; None and 1."""
    now = _now.get()
    if now is None:
        return None, 1
    now.seen.append(True)
    return now.batch, now.every


def share(gradient: Any, every: int) -> Any:
    """A micro-batch's part of the mean gradient."""
    return gradient if every == 1 else gradient / every
