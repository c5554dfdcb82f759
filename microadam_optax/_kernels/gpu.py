"""The update of blocks on NVIDIA GPUs, in one pass over memory.

A program of one warp takes a few rows; a row is a block of the leaf with its state.
It loads the gradient, the packed error and the range, adds them up, and finds the k
largest magnitudes by the bits of the float, an order that the hardware reduces in
one instruction: a few one by one, more by bisection, counting how many reach a
threshold until exactly k do. What is left is quantized again.

At window 1 the update is a function of each selected element, and nothing else is
read or written. At longer windows most elements of a row have no entry: zeros are
written, and over them the updates of the entries, through their indices. First those
selected now, read back from the slot that they were stored in; then the older ones,
where entries of several slots at one place are summed by comparing all with each
other, and what was selected there now is computed once more.

Everything old is read before anything is written, because the update takes the place
of the gradient and the new state that of the old. The arithmetic is that of
`_leaf.update_blocks`, in float32.

A row is a list of ``8 / bits`` parts, arrays ``(rows, lanes)``. The codes of part 0
are the lowest bits of the row's bytes, so no element ever changes its lane. Triton
wants powers of two; lanes past the end of a part are masked.
"""

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from microadam_optax import _moments
from microadam_optax._kernels import _rows
from microadam_optax._kernels._rows import Launch, Rows, Scalars

missing, reason_against = _rows.nothing, _rows.reason_against
OLDEST = 8.0  # compute capability


class _Place(NamedTuple):
    """Where the rows of a program are."""

    row: jax.Array  # (rows, 1), like all of these
    cell: jax.Array  # row of the gradient
    begin: jax.Array | int  # column there
    exists: jax.Array  # bool


def unavailable() -> str | None:
    """Why the kernel cannot run on the GPUs here; None if it can, or if none is here."""
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and not _known(here.abstract_device):
        return f"the devices of this mesh ({here.abstract_device})"
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # the program is for another machine
        return None
    found = min(float(device.compute_capability) for device in devices)  # "9.0"
    return (
        f"GPUs of compute capability {found}, below {OLDEST}" if found < OLDEST else None
    )


def _known(device: Any) -> bool:
    """Whether Pallas lowers a kernel for a device, or for JAX's own if it is None."""

    def copy(old: Any, new: Any) -> None:
        new[...] = old[...]

    def f(x: jax.Array) -> jax.Array:
        params = triton.CompilerParams()
        return pl.pallas_call(copy, out_shape=x, compiler_params=params)(x)

    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        try:
            traced = jax.jit(f).trace(jax.ShapeDtypeStruct((16,), jnp.float32))
            traced.lower(lowering_platforms=("cuda",))
        except (RuntimeError, ValueError):
            return False
    return getattr(device, "platform", "gpu") == "gpu"


def update(
    old: Rows, scalars: Scalars, launch: Launch, rows: int = 1, warps: int = 1
) -> Rows:
    """One step of all rows, in place if `old` is donated.

    `rows` and `warps` are those of a program.
    """
    kernel = pl.pallas_call(
        functools.partial(_update_rows, launch=launch, rows=rows),
        out_shape=(_rows.like(old),),
        grid=(pl.cdiv(old.codes.shape[0], rows),),
        input_output_aliases={i: i for i in range(len(jax.tree.leaves(old)))},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=launch.interpret,
        name="microadam",
    )
    with contextlib.nullcontext() if launch.interpret else _on_a_gpu():
        (new,) = kernel(old, scalars)
    return new


def _on_a_gpu() -> Any:
    """Tells Pallas that the program is for a GPU, of a kind that it knows.

    Else it asks JAX's default device, and fails where that is a CPU. The answer plays no
    part in kernels without 8-bit floats. Within `jax.shard_map` the mesh says it.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    empty = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(empty)


def _update_rows(
    old: Rows, scalars: Scalars, new: Rows, launch: Launch, rows: int
) -> None:
    width = old.codes.shape[1]
    window = 1 if old.indices is None else 1 + old.indices.shape[1] // launch.k
    lanes = _lanes(width, window, launch.k)
    store = functools.partial(_store, interpret=launch.interpret)
    debias_mu, debias_nu, eps, root = (scalars.factors[i] for i in range(4))
    dtype = new.gradient.dtype
    rescale = functools.partial(_rows.rescale, debias_mu, debias_nu, eps, root, dtype)
    place = _place(old, launch, rows)
    lane = lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    columns = [lane + first for first in range(0, width, lanes)]
    filled = [_filled(place, column, width) for column in columns]
    parts = range(8 // launch.bits)
    at = [part * width + column for part in parts for column in columns]
    real = [mask for _ in parts for mask in filled]

    step, zero = (
        _load(old.ranges, (place.row, i), place.exists).astype(jnp.float32)
        for i in (0, 1)
    )
    error = functools.partial(_rows.dequantize, step=step, zero=zero, bits=launch.bits)
    bytes_ = _rows.each(
        lambda i, mask: _load(old.codes, (place.row, i), mask), columns, filled
    )
    errors = [error(byte, part) for part in parts for byte in bytes_]
    inside = _rows.each(lambda i, mask: _inside(place, i, mask, launch), at, real)
    accumulated = _rows.each(
        functools.partial(_add_gradient, old, place), at, errors, inside
    )
    chosen = _rows.largest(accumulated, at, real, launch.k)
    rest = _rows.each(lambda mask, x: jnp.where(mask, 0, x), chosen.masks, accumulated)
    newest = _rows.each(lambda mask, x: jnp.where(mask, x, 0), chosen.masks, accumulated)
    older = None
    if window > 1:
        older = _older(old, scalars, place, error, chosen, launch)
    _barrier(launch)

    codes, ranges = _rows.quantize(rest, launch.bits)
    for i, mask, code in zip(columns, filled, codes, strict=True):
        store(new.codes, (place.row, i), code, mask)
    for column, number in enumerate(ranges):
        store(new.ranges, (place.row, column), number, place.exists)
    for i, x, mask in zip(at, newest, inside, strict=True):
        x = jnp.zeros_like(x) if older else rescale(*_rows.moments(_rows.rounded(x, 16)))
        store(new.gradient, (place.cell, place.begin + i), x, mask)
    if older is None:
        return
    _write_slot(new, scalars.start[0], place, chosen, at, newest, store)
    _barrier(launch)
    for index, mu, nu, mask in (_selected(new, scalars, place, launch), older):
        column = place.begin + index
        store(new.gradient, (place.cell, column), rescale(mu, nu), mask)
        _barrier(launch)


def _lanes(width: int, window: int, k: int) -> int:
    """Elements of a part.

    With 32, one for each thread, a part can be stored to scattered places without
    being laid out anew; else wider loads and stores save more.
    """
    return 32 if k > _rows.FEW and window > 1 else pl.next_power_of_2(width)


def _place(old: Rows, launch: Launch, rows: int) -> _Place:
    first = pl.program_id(0) * rows
    row = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    exists = row < old.codes.shape[0]
    if launch.blocks == 1:
        return _Place(row, row, 0, exists)
    cell, block = _divmod(row, launch.blocks)
    return _Place(row, cell, block * launch.block, exists)


def _filled(place: _Place, column: jax.Array, width: int) -> jax.Array:
    """Which lanes hold elements."""
    if width % column.shape[1]:
        return place.exists & (column < width)
    return jnp.broadcast_to(place.exists, (place.row.shape[0], column.shape[1]))


def _inside(place: _Place, at: jax.Array, mask: jax.Array, launch: Launch) -> jax.Array:
    """Which positions are not padding."""
    if launch.cell == launch.blocks * launch.block:
        return mask
    return mask & (place.begin + at < launch.cell)


def _add_gradient(
    old: Rows, place: _Place, at: jax.Array, error: jax.Array, mask: jax.Array
) -> jax.Array:
    gradient = _load(old.gradient, (place.cell, place.begin + at), mask)
    return jnp.where(mask, _moments.bounded(gradient.astype(jnp.float32) + error), 0)


def _write_slot(
    new: Rows,
    start: jax.Array,
    place: _Place,
    chosen: _rows.Chosen,
    at: list[jax.Array],
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
    for first in range(0, len(at), 4):  # parts whose ranks share the bytes of a word
        masks = chosen.masks[first : first + 4]
        flags = [mask.astype(jnp.int32) << (8 * i) for i, mask in enumerate(masks)]
        word = functools.reduce(operator.or_, flags)
        ranks = lax.cumsum(word, axis=1)
        totals = jnp.sum(word, axis=1, keepdims=True, dtype=jnp.int32)
        for i, mask in enumerate(masks):
            rank = before + ((ranks >> (8 * i)) & 255)
            position = jnp.broadcast_to(at[first + i], mask.shape)
            put(rank, position, newest[first + i], mask & place.exists)
            before += (totals >> (8 * i)) & 255


def _in_order(found: list[tuple[jax.Array, jax.Array]], place: _Place) -> Any:
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


def _selected(new: Rows, scalars: Scalars, place: _Place, launch: Launch) -> Any:
    """Index, mu, nu and mask of what was just selected, from its slot."""
    entry = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(launch.k)), 1)
    mask = place.exists & (entry < launch.k)
    slot = (place.row, scalars.start[0] + entry)
    index = _load(new.indices, slot, mask).astype(jnp.int32)
    value = _load(new.values, slot, mask).astype(jnp.float32)
    return index, *_rows.moments(value), _inside(place, index, mask, launch)


def _older(
    old: Rows,
    scalars: Scalars,
    place: _Place,
    error: Callable,
    chosen: _rows.Chosen,
    launch: Launch,
) -> Any:
    """Index, mu, nu and mask of the stored entries, with all that is at their place."""
    size, width = old.indices.shape[1], old.codes.shape[1]
    entry = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(size)), 1)
    mask = place.exists & (entry < size)
    index = _load(old.indices, (place.row, entry), mask).astype(jnp.int32)
    mask = _inside(place, index, mask, launch)
    part, column = _divmod(index, width)
    byte = _load(old.codes, (place.row, column), mask)
    accumulated = _add_gradient(old, place, index, error(byte, part), mask)
    key = _rows.magnitude(accumulated)
    again = (key > chosen.kth) | ((key == chosen.kth) & (index <= chosen.last))
    newest = jnp.where(again, _rows.rounded(accumulated, 16), 0)

    mu, nu = _rows.moments(newest)
    slots = size // launch.k
    for slot in range(slots):
        value = _load(old.values, (place.row, entry), mask).astype(jnp.float32)
        if slots > 1:
            value = _at(index, old, place, range(slot * launch.k, (slot + 1) * launch.k))
        first, second = _rows.moments(value)
        mu += scalars.weights[0, slot] * first
        nu += scalars.weights[1, slot] * second
    return index, mu, nu, mask


def _at(index: jax.Array, old: Rows, place: _Place, slot: range) -> jax.Array:
    """The value that a slot has for each index, 0 where it has none."""
    value = jnp.zeros(index.shape, jnp.float32)
    for i in slot:
        here = _load(old.indices, (place.row, i), place.exists).astype(jnp.int32)
        stored = _load(old.values, (place.row, i), place.exists).astype(jnp.float32)
        value = jnp.where(index == here, stored, value)
    return value


def _divmod(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Of numbers that are not negative, for which hardware needs no corrections."""
    divisor = jnp.full_like(x, by)
    return lax.div(x, divisor), lax.rem(x, divisor)


def _load(ref: Any, index: Any, mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[index], mask=mask, other=0)


def _store(ref: Any, index: Any, value: Any, mask: jax.Array, interpret: bool) -> None:
    if interpret:  # which would write what is masked with its old value
        index = (index[0], jnp.where(mask, index[1], _rows.NOWHERE))
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _barrier(launch: Launch) -> None:
    if not launch.interpret:
        triton.debug_barrier()
