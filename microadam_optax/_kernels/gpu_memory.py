"""Where the rows of a program lie in a GPU's memory, and how they are read and written.

Triton wants powers of two; lanes past the end of a part are masked.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from microadam_optax._kernels import _select
from microadam_optax._kernels._rows import Launch, Rows


class Place(NamedTuple):
    """Where the rows of a program are."""

    row: jax.Array  # (rows, 1), like all of these
    cell: jax.Array  # row of the gradient
    begin: jax.Array | int  # column there
    exists: jax.Array  # bool


def place_of(old: Rows, launch: Launch, rows: int) -> Place:
    first = pl.program_id(0) * rows
    row = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    exists = row < old.codes.shape[0]
    if launch.blocks == 1:
        return Place(row, row, 0, exists)
    cell, block = divide(row, launch.blocks)
    return Place(row, cell, block * launch.block, exists)


def filled(place: Place, column: jax.Array, width: int) -> jax.Array:
    """Which lanes hold elements."""
    if width % column.shape[1]:
        return place.exists & (column < width)
    return jnp.broadcast_to(place.exists, (place.row.shape[0], column.shape[1]))


def inside(
    place: Place, position: jax.Array, mask: jax.Array, launch: Launch
) -> jax.Array:
    """Which positions are not padding."""
    if launch.cell == launch.blocks * launch.block:
        return mask
    return mask & (place.begin + position < launch.cell)


def gradient(old: Rows, place: Place, position: jax.Array, mask: jax.Array) -> jax.Array:
    """At positions in the row, float32."""
    at = (place.cell, place.begin + position)
    return load(old.gradient, at, mask).astype(jnp.float32)


def divide(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Of numbers that are not negative, for which hardware needs no corrections."""
    divisor = jnp.full_like(x, by)
    return lax.div(x, divisor), lax.rem(x, divisor)


def load(ref: Any, index: Any, mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[index], mask=mask, other=0)


def store(ref: Any, index: Any, value: Any, mask: jax.Array, interpret: bool) -> None:
    if interpret:  # which would write what is masked with its old value
        index = (index[0], jnp.where(mask, index[1], _select.NOWHERE))
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def barrier(launch: Launch) -> None:
    if not launch.interpret:
        triton.debug_barrier()
