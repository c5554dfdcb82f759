"""The update of blocks on NVIDIA GPUs, in one pass over memory.

A program of one warp takes a few rows; a row is a block of the leaf with its state.
It loads the gradient, the packed error and the range, adds them up, and finds the k
largest magnitudes by the bits of the float, an order that the hardware reduces in
one instruction: a few one by one, more by bisection, counting how many reach a
threshold until exactly k do. What is left is quantized again.

The update of what is selected now is a function of each element. At longer windows the
updates of older entries are written over it, through their indices: entries of several
slots at one place are summed by comparing all with each other, and what was selected
there now is computed once more.

Everything old is read before anything is written, because the update takes the place
of the gradient and the new state that of the old. The arithmetic is that of
`_step.update_blocks`, in float32.

A row is a list of ``8 / bits`` parts, arrays ``(rows, lanes)``. The codes of part 0
are the lowest bits of the row's bytes, so no element ever changes its lane.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from microadam_optax import _moments
from microadam_optax._kernels import _rows, _select, gpu_memory, gpu_numbers, gpu_window
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated
from microadam_optax._kernels.gpu_memory import Place

_LARGEST = int(np.float32(_moments.LARGEST).view(np.int32))  # that is not bounded


class _Lanes(NamedTuple):
    """Where the elements of a row are: for each part, or piece of it, arrays."""

    columns: list[jax.Array]  # of bytes, (1, lanes)
    filled: list[jax.Array]  # which bytes there are, bool (rows, lanes)
    positions: list[jax.Array]  # in the row, of all parts
    real: list[jax.Array]  # which a row has, (1, lanes), be it one of the leaf or not
    inside: list[jax.Array]  # which are not padding


def update_rows(
    old: Rows, scalars: Scalars, new: Updated, launch: Launch, rows: int
) -> None:
    """One step of the rows of a program."""
    window = 1 if old.indices is None else 1 + old.indices.shape[1] // launch.k
    store = functools.partial(gpu_memory.store, interpret=launch.interpret)
    rescale = functools.partial(
        gpu_numbers.rescale, scalars.factors, dtype=new.update.dtype, launch=launch
    )
    place = gpu_memory.place_of(old, launch, rows)
    lanes = _lanes(old, place, launch, window)

    step, zero = (
        gpu_memory.load(old.ranges, (place.row, i), place.exists).astype(jnp.float32)
        for i in (0, 1)
    )
    error = functools.partial(_rows.dequantize, step=step, zero=zero, bits=launch.bits)
    accumulated = _accumulate(old, place, lanes, step, zero, launch)
    accumulated, keys, top = _tamed(accumulated)
    keys = _rows.each(lambda mask, key: jnp.where(mask, key, -1), lanes.real, keys)
    chosen = _select.largest(accumulated, keys, top, lanes.positions, launch.k)
    rest = _rows.each(lambda mask, x: jnp.where(mask, 0, x), chosen.masks, accumulated)
    newest = _rows.each(lambda mask, x: jnp.where(mask, x, 0), chosen.masks, accumulated)
    older = None
    if window > 1:
        older = gpu_window.sum_stored(old, scalars, place, error, chosen, launch)
    gpu_memory.barrier(launch)

    whole = functools.partial(gpu_numbers.whole, launch=launch)
    _store_error(new, place, lanes, _rows.quantize(rest, launch.bits, whole), store)
    updates = rescale([_rows.moments(gpu_numbers.rounded(x, launch)) for x in newest])
    for i, x, mask in zip(lanes.positions, updates, lanes.inside, strict=True):
        store(new.update, (place.cell, place.begin + i), x, mask)
    if older is None:
        return
    gpu_window.write_slot(
        new, scalars.start[0], place, chosen, lanes.positions, newest, store
    )
    gpu_memory.barrier(launch)
    index, mu, nu, mask = older
    (update,) = rescale([(mu, nu)])
    store(new.update, (place.cell, place.begin + index), update, mask)


def _lanes(old: Rows, place: Place, launch: Launch, window: int) -> _Lanes:
    """The elements of rows, in pieces of parts.

    With 32 lanes, one for each thread, a part can be stored to scattered places without
    being laid out anew; else wider loads and stores save more.
    """
    width = old.codes.shape[1]
    scattered = launch.k > _select.ONE_BY_ONE and window > 1
    size = 32 if scattered else pl.next_power_of_2(width)
    lane = lax.broadcasted_iota(jnp.int32, (1, size), 1)
    columns = [lane + first for first in range(0, width, size)]
    filled = [gpu_memory.filled(place, column, width) for column in columns]
    parts = range(8 // launch.bits)
    positions = [part * width + column for part in parts for column in columns]
    real = [column < width for _ in parts for column in columns]
    inside = [
        gpu_memory.inside(place, i, mask, launch)
        for i, mask in zip(positions, filled * len(parts), strict=True)
    ]
    return _Lanes(columns, filled, positions, real, inside)


def _accumulate(
    old: Rows,
    place: Place,
    lanes: _Lanes,
    step: jax.Array,
    zero: jax.Array,
    launch: Launch,
) -> list[jax.Array]:
    """Gradient and error; zeros where an element is padding or is not.

    One rounding is as good as two: the error, a whole multiple of the step, is exact.
    """
    pairs = zip(lanes.columns, lanes.filled, strict=True)
    bytes_ = [gpu_memory.load(old.codes, (place.row, i), mask) for i, mask in pairs]
    errors = [
        _rows.unpack(byte, part, step, zero, launch.bits)
        for part in range(8 // launch.bits)
        for byte in bytes_
    ]
    found = []
    for i, error, mask in zip(lanes.positions, errors, lanes.inside, strict=True):
        gradient = gpu_memory.gradient(old, place, i, mask)
        x = gpu_numbers.fused(*error, gradient, launch)
        found.append(jnp.where(mask, x, 0))
    return found


def _tamed(accumulated: list[jax.Array]) -> Any:
    """The same numbers, bounded, with their magnitudes and the largest of a row.

    Only rows of huge numbers and NaN have something to bound.
    """
    keys = _rows.each(_rows.magnitude, accumulated)
    top = _rows.reduce(jnp.maximum, jnp.max, keys)
    return lax.cond(
        jnp.max(top) > _LARGEST, _tame, lambda *same: same, accumulated, keys, top
    )


def _tame(accumulated: list[jax.Array], *_: Any) -> Any:
    accumulated = _rows.each(_rows.tame, accumulated)
    keys = _rows.each(_rows.magnitude, accumulated)
    return accumulated, keys, _rows.reduce(jnp.maximum, jnp.max, keys)


def _store_error(
    new: Updated, place: Place, lanes: _Lanes, error: Any, store: Callable
) -> None:
    codes, ranges = error
    for i, mask, code in zip(lanes.columns, lanes.filled, codes, strict=True):
        store(new.codes, (place.row, i), code, mask)
    for column, number in enumerate(ranges):
        store(new.ranges, (place.row, column), number, place.exists)
