"""The update of blocks on TPUs, in one pass over memory.

A program takes some hundred rows, each a block of the leaf with its state, into fast
memory. Gradient and unpacked error are added up, the k largest magnitudes selected,
the rest is quantized again. There are no loads or stores through indices: a stored
entry is spread over its row and added where its index is, one entry of all rows at a
time, and what is selected is taken out in ascending order by a minimum over the
positions that are left.

Padding is not part of a program's rows; the caller adds zeros and tells how many
elements a cell has. The arithmetic is that of `_step.update_blocks`, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from microadam_optax._kernels import _rows, _select
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated

missing = unavailable = _rows.nothing
reason_against = _rows.reason_against

ROWS = 256  # in a program


def update(old: Rows, scalars: Scalars, launch: Launch) -> Updated:
    """One step of all rows, in place if `old` is donated."""
    rows = min(ROWS, old.codes.shape[0])
    tiles = jax.tree.map(functools.partial(_tile, rows), old)
    numbers = jax.tree.map(lambda _: pl.BlockSpec(memory_space=tpu.SMEM), scalars)
    (new,) = pl.pallas_call(
        functools.partial(_update_rows, launch=launch),
        out_shape=(_rows.updated_like(old),),
        grid=(pl.cdiv(old.codes.shape[0], rows),),
        in_specs=[tiles, numbers],
        out_specs=(Updated(*tiles),),
        input_output_aliases={i: i for i in range(len(jax.tree.leaves(old)))},
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=launch.interpret,
        name="microadam",
    )(old, scalars)
    return new


def _tile(rows: int, x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))


def _update_rows(old: Rows, scalars: Scalars, new: Updated, launch: Launch) -> None:
    bits, (rows, width) = launch.bits, old.codes.shape
    parts = range(8 // bits)
    lane = lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    positions = [part * width + lane for part in parts]
    real = [_is_real(i, rows, launch) for i in positions]
    step, zero = (old.ranges[:, i : i + 1].astype(jnp.float32) for i in (0, 1))
    byte = old.codes[...].astype(jnp.int32)
    accumulated = []
    for part, mask in zip(parts, real, strict=True):
        gradient = old.gradient[:, part * width : (part + 1) * width]
        error = _rows.dequantize(byte, part, step, zero, bits)
        x = _rows.tame(gradient.astype(jnp.float32) + error)
        accumulated.append(x if mask is None else jnp.where(mask, x, 0))

    keys = _rows.each(_rows.magnitude, accumulated)
    top = _rows.reduce(jnp.maximum, jnp.max, keys)
    chosen = _select.largest(accumulated, keys, top, positions, launch.k)
    rest = _rows.each(lambda mask, x: jnp.where(mask, 0, x), chosen.masks, accumulated)
    (code,), ranges = _rows.quantize(rest, bits)
    new.codes[...] = code
    for i, number in enumerate(ranges):
        new.ranges[:, i : i + 1] = number

    newest = [
        jnp.where(mask, _rows.round_to(x, 7), 0)
        for mask, x in zip(chosen.masks, accumulated, strict=True)
    ]
    moments = [_rows.moments(x) for x in newest]
    if old.indices is not None:
        moments = _add_stored(moments, old, scalars, positions, launch.k)
        _write_slot(old, new, scalars.start[0], chosen.masks, newest, positions, launch.k)
    debias_mu, debias_nu, eps, root = (scalars.factors[i] for i in range(4))
    dtype = new.update.dtype
    rescale = functools.partial(_rows.rescale, debias_mu, debias_nu, eps, root, dtype)
    for part, (mu, nu) in zip(parts, moments, strict=True):
        columns = slice(part * width, (part + 1) * width)
        new.update[:, columns] = rescale(mu, nu)


def _is_real(position: jax.Array, rows: int, launch: Launch) -> jax.Array | None:
    """Which positions are not padding; None if none is."""
    if launch.cell == launch.blocks * launch.block:
        return None
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, position.shape, 0)
    block = lax.rem(row, jnp.full_like(row, launch.blocks))
    return block * launch.block + position < launch.cell


def _add_stored(
    moments: list[Any], old: Rows, scalars: Scalars, positions: list[jax.Array], k: int
) -> list[Any]:
    """Adds each entry of all rows where it belongs."""
    indices = old.indices[...].astype(jnp.int32)
    values = old.values[...].astype(jnp.float32)
    column = lax.broadcasted_iota(jnp.int32, indices.shape, 1)

    def add(entry: jax.Array, moments: list[Any]) -> list[Any]:
        here = column == entry
        index, value = (
            jnp.sum(jnp.where(here, x, 0), axis=1, keepdims=True, dtype=x.dtype)
            for x in (indices, values)
        )
        slot = lax.div(entry, jnp.int32(k))
        added = [scalars.weights[i, slot] * x for i, x in enumerate(_rows.moments(value))]
        return [
            tuple(
                x + jnp.where(i == index, y, 0) for x, y in zip(pair, added, strict=True)
            )
            for pair, i in zip(moments, positions, strict=True)
        ]

    return lax.fori_loop(jnp.int32(0), jnp.int32(indices.shape[1]), add, moments)


def _write_slot(
    old: Rows,
    new: Updated,
    start: jax.Array,
    masks: list[jax.Array],
    newest: list[jax.Array],
    positions: list[jax.Array],
    k: int,
) -> None:
    """What is selected, by ascending position, over the oldest slot."""
    column = lax.broadcasted_iota(jnp.int32, old.indices.shape, 1)
    selected = _rows.each(lambda m, i: jnp.where(m, i, _select.NOWHERE), masks, positions)

    def put(rank: jax.Array, state: Any) -> Any:
        indices, values, last = state
        left = [jnp.where(i > last, i, _select.NOWHERE) for i in selected]
        index = _rows.reduce(jnp.minimum, jnp.min, left)
        value = _rows.reduce(
            jnp.add,
            jnp.sum,
            _rows.each(lambda i, x: jnp.where(i == index, x, 0), positions, newest),
        )
        here = column == start + rank
        return jnp.where(here, index, indices), jnp.where(here, value, values), index

    indices = old.indices[...].astype(jnp.int32)
    values = old.values[...].astype(jnp.float32)
    first = jnp.full((indices.shape[0], 1), -1, jnp.int32)
    indices, values, _ = lax.fori_loop(
        jnp.int32(0), jnp.int32(k), put, (indices, values, first)
    )
    new.indices[...] = indices.astype(new.indices.dtype)
    new.values[...] = values.astype(new.values.dtype)
