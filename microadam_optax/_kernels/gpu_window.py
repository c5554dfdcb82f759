"""The window of past sparse gradients, as the kernel for GPUs reads and writes it."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from microadam_optax._kernels import _rows, _select, gpu_memory, gpu_numbers
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated
from microadam_optax._kernels.gpu_memory import Place


def write_slot(
    new: Updated,
    start: jax.Array,
    place: Place,
    chosen: _select.Chosen,
    positions: list[jax.Array],
    newest: list[jax.Array],
    store: Callable,
) -> None:
    """What is selected, by ascending position, over the oldest slot."""

    def put(rank: jax.Array, i: jax.Array, value: jax.Array, mask: jax.Array) -> None:
        store(new.indices, (place.row, start + rank), i, mask)
        store(new.values, (place.row, start + rank), value, mask)

    if chosen.found:
        put(*_in_order(chosen.found, place))
        return
    before = jnp.full_like(place.row, -1)
    for first in range(
        0, len(positions), 4
    ):  # parts whose ranks share the bytes of a word
        masks = chosen.masks[first : first + 4]
        flags = [mask.astype(jnp.int32) << (8 * i) for i, mask in enumerate(masks)]
        word = functools.reduce(operator.or_, flags)
        ranks = lax.cumsum(word, axis=1)
        totals = jnp.sum(word, axis=1, keepdims=True, dtype=jnp.int32)
        for i, mask in enumerate(masks):
            rank = before + ((ranks >> (8 * i)) & 255)
            position = jnp.broadcast_to(positions[first + i], mask.shape)
            put(rank, position, newest[first + i], mask & place.exists)
            before += (totals >> (8 * i)) & 255


def _in_order(found: list[tuple[jax.Array, jax.Array]], place: Place) -> Any:
    """Rank, position, value and mask of what was found one by one, a lane for each."""
    lanes = pl.next_power_of_2(len(found))
    rank = lax.broadcasted_iota(jnp.int32, (place.row.shape[0], lanes), 1)
    index = jnp.zeros_like(rank)
    value = jnp.zeros(rank.shape, jnp.float32)
    for position, x in found:
        lower = [(other < position).astype(jnp.int32) for other, _ in found]
        here = rank == functools.reduce(operator.add, lower)
        index, value = jnp.where(here, position, index), jnp.where(here, x, value)
    return rank, index, value, place.exists & (rank < len(found))


def sum_stored(
    old: Rows,
    scalars: Scalars,
    place: Place,
    error: Callable,
    chosen: _select.Chosen,
    launch: Launch,
) -> Any:
    """Index, mu, nu and mask of the stored entries, with all that is at their place."""
    size, width = old.indices.shape[1], old.codes.shape[1]
    entry = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(size)), 1)
    mask = place.exists & (entry < size)
    index = gpu_memory.load(old.indices, (place.row, entry), mask).astype(jnp.int32)
    mask = gpu_memory.inside(place, index, mask, launch)
    part, column = gpu_memory.divide(index, width)
    byte = gpu_memory.load(old.codes, (place.row, column), mask)
    accumulated = gpu_memory.gradient(old, place, index, mask) + error(byte, part)
    accumulated = jnp.where(mask, _rows.tame(accumulated), 0)
    key = _rows.magnitude(accumulated)
    again = (key > chosen.kth) | ((key == chosen.kth) & (index <= chosen.last))
    newest = jnp.where(again, gpu_numbers.rounded(accumulated, launch), 0)

    mu, nu = _rows.moments(newest)
    slots = size // launch.k
    for slot in range(slots):
        value = gpu_memory.load(old.values, (place.row, entry), mask).astype(jnp.float32)
        if slots > 1:
            value = _value_at(
                index, old, place, range(slot * launch.k, (slot + 1) * launch.k)
            )
        first, second = _rows.moments(value)
        mu += scalars.weights[0, slot] * first
        nu += scalars.weights[1, slot] * second
    return index, mu, nu, mask


def _value_at(index: jax.Array, old: Rows, place: Place, slot: range) -> jax.Array:
    """The value that a slot has for each index, 0 where it has none."""
    value = jnp.zeros(index.shape, jnp.float32)
    for i in slot:
        index_there, stored = (
            gpu_memory.load(x, (place.row, i), place.exists)
            for x in (old.indices, old.values)
        )
        here = index == index_there.astype(jnp.int32)
        value = jnp.where(here, stored.astype(jnp.float32), value)
    return value
