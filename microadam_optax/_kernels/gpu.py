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

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

FEW = 4  # up to here the k largest are found one by one
_INFINITY = 0x7F800000
_OCTAVES = 2 << 23  # what a first step of the bisection spans, in bits of a float32
_NOWHERE = 1 << 20  # a position that no row has
_MAGIC = 1 << 23  # added to a small whole number, shows it in the float's last bits


class Rows(NamedTuple):
    """A leaf in rows: arrays, or references to them."""

    gradient: Any  # (cells, cell); the update takes its place
    codes: Any  # uint8 (rows, block * bits / 8)
    ranges: Any  # bfloat16 (rows, 2)
    indices: Any  # unsigned (rows, (window - 1) * k)
    values: Any  # bfloat16, like indices; both None at window 1


class Scalars(NamedTuple):
    """What all rows share."""

    factors: Any  # float32 (3,): the debiasing of mu and nu, and eps
    start: Any  # int32 (1,), where the oldest slot begins; None at window 1
    weights: Any  # float32 (2, window - 1), of the slots in mu and nu; or None


class Launch(NamedTuple):
    """The Python numbers of a launch."""

    blocks: int  # in a cell; 1 unless the cell is padded
    block: int
    bits: int
    k: int
    rows: int = 1  # in a program
    warps: int = 1
    interpret: bool = False


class _Place(NamedTuple):
    """Where the rows of a program are."""

    row: jax.Array  # (rows, 1), like all of these
    cell: jax.Array  # row of the gradient
    begin: jax.Array | int  # column there
    exists: jax.Array  # bool


class _Chosen(NamedTuple):
    """Which elements of the rows are selected."""

    masks: list[jax.Array]  # bool (rows, lanes) for each part
    kth: jax.Array  # (rows, 1): keys above are selected, equals up to a position
    last: jax.Array
    found: list[tuple[jax.Array, jax.Array]]  # positions, values, if one by one


def update(old: Rows, scalars: Scalars, launch: Launch) -> Rows:
    """One step of all rows, in place if `old` is donated."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), old)
    (new,) = pl.pallas_call(
        functools.partial(_update_rows, launch=launch),
        out_shape=(shapes,),
        grid=(-(-old.codes.shape[0] // launch.rows),),
        input_output_aliases={i: i for i in range(len(jax.tree.leaves(old)))},
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=1),
        interpret=launch.interpret,
        name="microadam",
    )(old, scalars)
    return new


def _update_rows(old: Rows, scalars: Scalars, new: Rows, launch: Launch) -> None:
    bits, interpret = launch.bits, launch.interpret
    store = functools.partial(_store, interpret=interpret)
    place = _place(old, launch)
    width = old.codes.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(width)), 1)
    real = place.exists & (lane < width)
    at = [part * width + lane for part in range(8 // bits)]

    low, high = (_load(old.ranges, (place.row, i), place.exists) for i in (0, 1))
    error = functools.partial(_dequantize, low=low, high=high, bits=bits)
    byte = _load(old.codes, (place.row, lane), real)
    insides = [_inside(old, place, i, real, launch) for i in at]
    gradients = [
        _load(old.gradient, (place.cell, place.begin + i), inside)
        for i, inside in zip(at, insides, strict=True)
    ]
    accumulated = [
        jnp.where(inside, gradient.astype(jnp.float32) + error(byte, part), 0)
        for part, (gradient, inside) in enumerate(zip(gradients, insides, strict=True))
    ]
    chosen = _largest(accumulated, at, real, launch.k)
    rest = _map(lambda mask, x: jnp.where(mask, 0, x), chosen.masks, accumulated)
    newest = _map(lambda mask, x: jnp.where(mask, x, 0), chosen.masks, accumulated)
    older = None
    if old.indices is not None:
        older = _older(old, scalars, place, error, chosen, launch)
    _barrier(interpret)

    for i, x, inside in zip(at, newest, insides, strict=True):
        x = _rounded(x, 16) if older is None else jnp.zeros_like(x)
        update = _rescale(scalars, x, x * x) if older is None else x
        store(new.gradient, (place.cell, place.begin + i), update, inside)
    code, ends = _quantize(rest, bits)
    store(new.codes, (place.row, lane), code, real)
    for i, end in enumerate(ends):
        store(new.ranges, (place.row, i), end, place.exists)
    if older is None:
        return
    _write_slot(new, scalars, place, chosen, at, newest, real, store)
    _barrier(interpret)
    for index, mu, nu, mask in (_selected(new, scalars, place, launch), older):
        column = place.begin + index
        store(new.gradient, (place.cell, column), _rescale(scalars, mu, nu), mask)
        _barrier(interpret)


def _place(old: Rows, launch: Launch) -> _Place:
    first = pl.program_id(0) * launch.rows
    row = first + lax.broadcasted_iota(jnp.int32, (launch.rows, 1), 0)
    exists = row < old.codes.shape[0]
    if launch.blocks == 1:
        return _Place(row, row, 0, exists)
    begin = lax.rem(row, launch.blocks) * launch.block
    return _Place(row, lax.div(row, launch.blocks), begin, exists)


def _inside(
    old: Rows, place: _Place, at: jax.Array, mask: jax.Array, launch: Launch
) -> jax.Array:
    """Which positions are not padding."""
    cell = old.gradient.shape[1]
    if cell == launch.blocks * launch.block:
        return mask
    return mask & (place.begin + at < cell)


def _dequantize(
    byte: jax.Array, part: int | jax.Array, low: jax.Array, high: jax.Array, bits: int
) -> jax.Array:
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    code = (byte.astype(jnp.int32) >> (bits * part)) & (2**bits - 1)
    return code.astype(jnp.float32) * _step(low, high, bits) + low


def _largest(
    accumulated: list[jax.Array], at: list[jax.Array], real: jax.Array, k: int
) -> _Chosen:
    keys = [jnp.where(real, _magnitude(x), -1) for x in accumulated]
    if k > FEW:
        return _bisect(keys, at, k)
    # Position and sign in one number, so that one reduction finds both.
    signed = _map(lambda x, i: 2 * i + _negative(_bits(x)), accumulated, at)
    found = []
    for _ in range(k):
        kth = _reduce(jnp.maximum, jnp.max, keys)
        ties = _map(lambda key, i: jnp.where(key == kth, i, 2 * _NOWHERE), keys, signed)
        lowest = _reduce(jnp.minimum, jnp.min, ties)
        last = lowest >> 1
        keys = _map(lambda key, i: jnp.where(i == last, -1, key), keys, at)
        found.append((last, _float(kth | (lowest << 31))))
    return _Chosen([real & (key < 0) for key in keys], kth, last, found)


def _bisect(keys: list[jax.Array], at: list[jax.Array], k: int) -> _Chosen:
    """Selects all keys from `high` on, which `reached` do, and breaks ties below."""
    top = _reduce(jnp.maximum, jnp.max, keys) + 1

    def unfinished(state: Any) -> jax.Array:
        low, high, reached, _ = state
        return jnp.max(jnp.where(reached < k, high - low, 0)) > 1

    def halve(state: Any) -> Any:
        low, high, reached, leap = state
        middle = jnp.maximum(low + ((high - low) >> 1), high - leap)
        count = _count([middle - 1 - key for key in keys])
        open_ = (reached < k) & (high - low > 1)
        up, down = open_ & (count > k), open_ & (count <= k)
        low, high = jnp.where(up, middle, low), jnp.where(down, middle, high)
        leap = jnp.minimum(leap, 1 << 29) * 2
        return low, high, jnp.where(down, count, reached), leap

    none = jnp.zeros_like(top)
    state = (none, top, none, jnp.int32(_OCTAVES))
    _, high, reached, _ = lax.while_loop(unfinished, halve, state)
    missing = k - reached

    def break_ties(keys: list[jax.Array]) -> Any:
        last = _last_tie(keys, at, high - 1, missing)
        taken = _map(lambda key, i: (key == high - 1) & (i <= last), keys, at)
        return _map(lambda key, tie: jnp.where(tie, high, key), keys, taken), last

    keys, last = lax.cond(
        jnp.max(missing) > 0, break_ties, lambda keys: (keys, none - 1), keys
    )
    return _Chosen([key >= high for key in keys], high - 1, last, [])


def _last_tie(
    keys: list[jax.Array], at: list[jax.Array], kth: jax.Array, missing: jax.Array
) -> jax.Array:
    """Where the `missing`-th of the keys that equal `kth` is; -1 if none is missing."""
    ties = _map(lambda key, i: jnp.where(key == kth, i, _NOWHERE), keys, at)
    bits = (len(at) * at[0].shape[1] - 1).bit_length()

    def next_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        bit = jnp.left_shift(1, bits - 1 - i)
        before = _count([tie - (last + bit) for tie in ties])
        return jnp.where(before < missing, last + bit, last)

    last = lax.fori_loop(0, bits, next_bit, jnp.zeros_like(kth))
    return jnp.where(missing > 0, last, -1)


def _quantize(
    rest: list[jax.Array], bits: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Bytes, and the two ends of their range.

    The selected elements are 0 here, so that the bits of the high end are the largest
    as signed integers, those of a low end below 0 the largest as unsigned ones.
    """
    words = [_bits(x) for x in rest]
    highest = _reduce(jnp.maximum, jnp.max, words)
    unsigned = _reduce(jnp.maximum, jnp.max, [x.astype(jnp.uint32) for x in words])
    lowest = jnp.minimum(unsigned.astype(jnp.int32), 0)
    nan = (highest > _INFINITY) | ((lowest & 0x7FFFFFFF) > _INFINITY)
    low, high = (
        _rounded(jnp.where(nan, jnp.nan, _float(end)), 16) for end in (lowest, highest)
    )
    step = _step(low, high, bits)
    top = 2**bits - 1
    kept = jnp.where(step > 0, top, 0)  # of the bits of a code
    byte = jnp.zeros_like(words[0])
    for part, x in enumerate(rest):
        code = jnp.clip(jnp.floor((x - low) / step + jnp.float32(0.5)), 0, top)
        byte |= (_bits(code + _MAGIC) & kept) << (bits * part)
    return byte.astype(jnp.uint8), (low.astype(jnp.bfloat16), high.astype(jnp.bfloat16))


def _write_slot(
    new: Rows,
    scalars: Scalars,
    place: _Place,
    chosen: _Chosen,
    at: list[jax.Array],
    newest: list[jax.Array],
    real: jax.Array,
    store: Callable,
) -> None:
    """What is selected, by ascending position, over the oldest slot."""
    start = scalars.start[0]

    def put(rank: jax.Array, i: jax.Array, value: jax.Array, mask: jax.Array) -> None:
        store(new.indices, (place.row, start + rank), i, mask)
        store(new.values, (place.row, start + rank), value, mask)

    for i, value in chosen.found:
        lower = [(other < i).astype(jnp.int32) for other, _ in chosen.found]
        put(functools.reduce(operator.add, lower), i, value, place.exists)
    if chosen.found:
        return
    before = 0
    for i, mask, value in zip(at, chosen.masks, newest, strict=True):
        flags = mask.astype(jnp.int32)
        rank = before + jnp.cumsum(flags, axis=1) - 1
        put(rank, jnp.broadcast_to(i, mask.shape), value, mask)
        before += jnp.sum(flags, axis=1, keepdims=True, dtype=jnp.int32)


def _selected(new: Rows, scalars: Scalars, place: _Place, launch: Launch) -> Any:
    """Index, mu, nu and mask of what was just selected, from its slot."""
    entry = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(launch.k)), 1)
    mask = place.exists & (entry < launch.k)
    slot = (place.row, scalars.start[0] + entry)
    index = _load(new.indices, slot, mask).astype(jnp.int32)
    value = _load(new.values, slot, mask).astype(jnp.float32)
    return index, value, value * value, _inside(new, place, index, mask, launch)


def _older(
    old: Rows,
    scalars: Scalars,
    place: _Place,
    error: Callable,
    chosen: _Chosen,
    launch: Launch,
) -> Any:
    """Index, mu, nu and mask of the stored entries, with all that is at their place."""
    size, width = old.indices.shape[1], old.codes.shape[1]
    entry = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(size)), 1)
    mask = place.exists & (entry < size)
    index = _load(old.indices, (place.row, entry), mask).astype(jnp.int32)
    mask = _inside(old, place, index, mask, launch)
    gradient = _load(old.gradient, (place.cell, place.begin + index), mask)
    byte = _load(old.codes, (place.row, lax.rem(index, width)), mask)
    accumulated = gradient.astype(jnp.float32) + error(byte, lax.div(index, width))
    key = _magnitude(accumulated)
    again = (key > chosen.kth) | ((key == chosen.kth) & (index <= chosen.last))
    newest = jnp.where(again, _rounded(accumulated, 16), 0)

    mu, nu = newest, newest * newest
    slots = size // launch.k
    for slot in range(slots):
        value = _load(old.values, (place.row, entry), mask).astype(jnp.float32)
        if slots > 1:
            value = _at(index, old, place, range(slot * launch.k, (slot + 1) * launch.k))
        mu += scalars.weights[0, slot] * value
        nu += scalars.weights[1, slot] * (value * value)
    return index, mu, nu, mask


def _at(index: jax.Array, old: Rows, place: _Place, slot: range) -> jax.Array:
    """The value that a slot has for each index, 0 where it has none."""
    value = jnp.zeros(index.shape, jnp.float32)
    for i in slot:
        here = _load(old.indices, (place.row, i), place.exists).astype(jnp.int32)
        stored = _load(old.values, (place.row, i), place.exists).astype(jnp.float32)
        value = jnp.where(index == here, stored, value)
    return value


def _rescale(scalars: Scalars, mu: jax.Array, nu: jax.Array) -> jax.Array:
    debias_mu, debias_nu, eps = (scalars.factors[i] for i in range(3))
    return debias_mu * mu / (jnp.sqrt(debias_nu * nu) + eps)


def _load(ref: Any, index: Any, mask: jax.Array) -> jax.Array:
    return triton.load(ref.at[index], mask=mask, other=0)


def _store(ref: Any, index: Any, value: Any, mask: jax.Array, interpret: bool) -> None:
    if interpret:  # which would write what is masked with its old value
        index = (index[0], jnp.where(mask, index[1], _NOWHERE))
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _barrier(interpret: bool) -> None:
    if not interpret:
        triton.debug_barrier()


def _map(f: Callable, *parts: list[jax.Array]) -> list[jax.Array]:
    return [f(*args) for args in zip(*parts, strict=True)]


def _reduce(combine: Callable, reduce: Callable, parts: list[jax.Array]) -> jax.Array:
    return reduce(functools.reduce(combine, parts), axis=1, keepdims=True)


def _count(differences: list[jax.Array]) -> jax.Array:
    """How many are negative."""
    total = functools.reduce(operator.add, map(_negative, differences))
    return jnp.sum(total, axis=1, keepdims=True, dtype=jnp.int32)


def _negative(x: jax.Array) -> jax.Array:
    """The sign bit: unlike a comparison, it is shifted and added in one instruction."""
    return lax.shift_right_logical(x, jnp.full_like(x, 31))


def _step(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    return _rounded((high - low) / (2**bits - 1), 8)


def _rounded(x: jax.Array, dropped: int) -> jax.Array:
    """float32 without its last bits: to nearest, ties to even."""
    bits = _bits(x)
    odd = (bits >> dropped) & 1
    nearest = (bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)
    return jnp.where(x == x, _float(nearest), x)


def _magnitude(x: jax.Array) -> jax.Array:
    """int32 in the order of ``|x|``, NaN highest."""
    return _bits(x) & 0x7FFFFFFF


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
