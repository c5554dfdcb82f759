"""MicroAdam in plain loops: Algorithm 1 for one block after another, on one core.

`update_block` is the algorithm, a line of code to a line of the paper. A block lies in
scratch memory that stays in the core's first cache, in *lanes*: elements whose codes
share a byte are at the same place of different parts, and each part is filled up to
whole words of 32 lanes, so that every loop is one of whole vectors. The arithmetic is
that of `_leaf.update_blocks`, operation by operation, and so are the bits.

Selection compares the bits of ``|x|`` as integers, like `_topk`. Their k largest are
those above a bar, which is found by counting how many are above a guess, and moving that
by what the counts tell: the bar of the last block is the first guess, and the logarithm
of a count is nearly linear in that of a magnitude. Three or four guesses are enough.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import literal_unroll, njit
from numba.core.types import float32, int32, uint8, uint16

from microadam_optax import _moments, _quantize
from microadam_optax._kernels.cpu_llvm import (
    WORD,
    above,
    allocate,
    bits_of,
    count_bits,
    float_of,
    lowest_bit,
    release,
    root,
    shifted,
    view,
)

_INFINITY = 0x7F800000
INFINITE = np.float32(np.inf)
_LARGEST = int(np.float32(_moments.LARGEST).view(np.int32))
_ABOVE = _quantize.ABOVE
_SMALLEST = np.float32(_quantize.SMALLEST)
_HALF = np.float32(0.5)
_ZERO, _ONE = np.float32(0), np.float32(1)

inline = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Shape(NamedTuple):
    """The numbers that all blocks of a leaf share."""

    block: Any  # elements
    width: Any  # bytes of codes, and elements of a part
    lanes: Any  # of a part in scratch memory
    bits: Any  # of a code
    k: Any  # entries selected
    slots: Any  # of the window
    slot: Any  # where the entries of this step go
    index_bytes: Any  # 1 or 2


class Launch(NamedTuple):
    """How the blocks of a leaf lie in it."""

    shape: Any
    cell: Any  # elements in a cell
    blocks: Any  # in a cell


class Scalars(NamedTuple):
    """float32 numbers that all blocks share."""

    debias_mu: Any
    debias_nu: Any
    eps: Any
    eps_root: Any
    weights: Any  # (2, slots), of the slots in mu and nu
    alpha: Any
    kept: Any  # 1 - alpha


class Row(NamedTuple):
    """A block's part of the arrays of a leaf."""

    gradient: Any  # the update takes its place
    codes: Any
    ranges: Any
    indices: Any
    values: Any
    size: Any  # elements that are not padding


class Scratch(NamedTuple):
    """Memory of a core for one block, in lanes."""

    x: Any  # float32: g + Q^-1(e), then what is left of it
    keys: Any  # int32, its magnitude; -1 where no element is
    mu: Any  # float32, zeros between blocks, like nu
    nu: Any
    update: Any  # float32, between blocks that of an element without entries
    codes: Any  # uint8
    entries: Any  # int32, lanes of the block's entries, the newest first
    firsts: Any  # float32, mu at these, then the update
    seconds: Any  # float32, nu
    bar: Any  # float32 (2,): the search's first guess, and its step


@inline
def update_rows(arrays, first, last, scalars, launch, widen, narrow):
    """One step of the rows from one to another."""
    shape = launch.shape
    lanes = shape.lanes * (8 // shape.bits)
    entries = (shape.slots + 1) * shape.k
    s = Scratch(
        allocate(lanes, float32),
        allocate(lanes, int32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(shape.lanes, uint8),
        allocate(entries, int32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(2, float32),
    )
    fill(s.mu, lanes, _ZERO)
    fill(s.nu, lanes, _ZERO)
    fill(s.update, lanes, rescale(_ZERO, _ZERO, scalars))
    s.bar[0], s.bar[1] = _ZERO, float32(0.3)
    stored = shape.slots * shape.k
    cell, number = first // launch.blocks, first % launch.blocks
    for row in range(first, last):
        begin = number * shape.block
        of_row = Row(
            shifted(arrays.gradient, cell * launch.cell + begin),
            shifted(arrays.codes, row * shape.width),
            shifted(arrays.ranges, 2 * row),
            shifted(arrays.indices, row * stored * shape.index_bytes),
            shifted(arrays.values, row * stored),
            min(shape.block, launch.cell - begin),
        )
        update_block(of_row, s, scalars, shape, widen, narrow)
        number += 1
        if number == launch.blocks:
            cell, number = cell + 1, 0
    for memory in literal_unroll(s):
        release(memory)


@inline
def update_block(row, s, scalars, shape, widen, narrow):
    """One step of a block."""
    top = accumulate(row, s, shape, widen)  # a = g + Q^-1(e)
    bar = select(s, shape, top)  # the k largest |a|
    if shape.slots == 0:
        update_selected(s, scalars, shape, bar)
    else:
        take(s, shape, bar)
        add_newest(s, shape)
        add_older(row, s, scalars, shape)
        write_slot(row, s, shape)
        update_entries(s, scalars, shape)
    step, zero = drop(s, shape, bar)  # e = Q(a without them)
    quantize(s, shape, step, zero)
    if scalars.alpha != 0:
        step, zero = return_error(s, scalars, shape, step, zero)
        quantize(s, shape, step, zero)
    write(row, s, shape, step, zero, narrow)
    if shape.slots > 0:
        clear(s, scalars, shape)


@inline
def accumulate(row, s, shape, widen):
    """The gradient and the dequantized error; returns the largest key."""
    parts, mask = 8 // shape.bits, int32((1 << shape.bits) - 1)
    for i in range(shape.width):
        s.codes[i] = row.codes[i]
    for part in range(parts):
        to, begin = part * shape.lanes, part * shape.width
        real = min(max(row.size - begin, 0), shape.width)
        for i in range(real):
            s.x[to + i] = widen(row.gradient[begin + i])
        for i in range(real, shape.width):
            s.x[to + i] = _ZERO
    step, zero = from_bfloat16(row.ranges[0]), from_bfloat16(row.ranges[1])
    top = int32(0)
    for part in range(parts):
        to = part * shape.lanes
        for i in range(shape.lanes):
            code = int32(int32(s.codes[i]) >> int32(shape.bits * part)) & mask
            x = s.x[to + i] + (float32(int32(code)) - zero) * step
            key = int32(bits_of(x) & 0x7FFFFFFF)
            s.x[to + i] = x
            s.keys[to + i] = key
            top = max(top, key)
    for part in range(parts):
        for i in range(shape.width, shape.lanes):
            s.keys[part * shape.lanes + i] = -1
            s.x[part * shape.lanes + i] = _ZERO
    if top > _LARGEST:
        top = bound(s, shape)
    return top


@inline
def bound(s, shape):
    """Finite numbers at most 2**60."""
    top = int32(0)
    for i in range(count_lanes(shape)):
        key = s.keys[i]
        if _LARGEST < key < _INFINITY:
            s.keys[i] = _LARGEST
            s.x[i] = float_of(int32(_LARGEST | (bits_of(s.x[i]) & ~0x7FFFFFFF)))
        top = max(top, s.keys[i])
    return top


@inline
def select(s, shape, top):
    """A bar that exactly k keys are above; of ties at it, the first stay above."""
    if shape.k == shape.block:
        return int32(-1)
    low, many = -1, shape.block  # too many are above the low bar
    high, few = int(top), 0  # and too few above the high one
    aim = log_of(shape.k)
    bar = int(s.bar[0])
    tries = 0
    while True:
        bar = min(max(bar, low + 1), high - 1)
        if few == shape.k - 1 or (tries & 3) == 3:
            bar = largest_up_to(s, shape, high) - 1
        count = count_above(s, shape, bar)
        if count == shape.k:
            break
        if count < shape.k:
            high, few = bar, count
        elif bar + 1 == high or largest_up_to(s, shape, high) == bar + 1:
            exclude_ties(s, shape, bar, count - shape.k)
            break
        else:
            low, many = bar, count
        tries += 1
        if tries > 8 and (tries & 1):
            bar = (low + high) >> 1
        elif few > 0 and many < shape.block:
            rise = (log_of(many) - aim) / (log_of(many) - log_of(few))
            bar = low + int(rise * float32(high - low))
        else:
            bar += int((log_of(count) - aim) * s.bar[1] * float32(tries))
    s.bar[0] = float32(bar)
    return int32(bar)


@inline
def log_of(count):
    """Nearly the logarithm of a count, of which 0 is not quite 0."""
    return float32(bits_of(float32(count) + _HALF))


@inline
def count_above(s, shape, bar):
    count = 0
    for word in range(0, count_lanes(shape), WORD):
        count += count_bits(above(shifted(s.keys, word), int32(bar)))
    return count


@inline
def largest_up_to(s, shape, high):
    largest, high = int32(-1), int32(high)
    for i in range(count_lanes(shape)):
        key = s.keys[i]
        largest = max(largest, key if key <= high else int32(-1))
    return int(largest)


@inline
def exclude_ties(s, shape, bar, excess):
    """Lowers the last of the keys just above a bar."""
    i = count_lanes(shape)
    while excess > 0:
        i -= 1
        if s.keys[i] == bar + 1:
            s.keys[i] = bar
            excess -= 1


@inline
def take(s, shape, bar):
    """The selected elements as bfloat16, by ascending index."""
    n = 0
    for word in range(0, count_lanes(shape), WORD):
        mask = above(shifted(s.keys, word), bar)
        while mask:
            lane = word + lowest_bit(mask)
            s.entries[n] = lane
            s.firsts[n] = round_bfloat16(s.x[lane])
            n += 1
            mask &= mask - 1


@inline
def add_newest(s, shape):
    for i in range(shape.k):
        lane, value = s.entries[i], s.firsts[i]
        s.mu[lane] = value
        s.nu[lane] = value * value


@inline
def add_older(row, s, scalars, shape):
    """The window's entries, slot after slot."""
    for slot in range(shape.slots):
        first, second = scalars.weights[slot], scalars.weights[shape.slots + slot]
        for i in range(slot * shape.k, (slot + 1) * shape.k):
            lane = lane_of(read_index(row, shape, i), shape)
            value = from_bfloat16(row.values[i])
            s.entries[shape.k + i] = lane
            s.mu[lane] += round_product(first * value)
            s.nu[lane] += round_product(second * (value * value))


@inline
def update_entries(s, scalars, shape):
    """Of all entries at once: roots and divisions go by vectors."""
    entries = (shape.slots + 1) * shape.k
    for i in range(entries):
        s.firsts[i] = s.mu[s.entries[i]]
        s.seconds[i] = s.nu[s.entries[i]]
    for i in range(entries):
        s.firsts[i] = rescale(s.firsts[i], s.seconds[i], scalars)
    for i in range(entries):
        s.update[s.entries[i]] = s.firsts[i]


@inline
def update_selected(s, scalars, shape, bar):
    """Without a window an update is a function of its element."""
    for i in range(count_lanes(shape)):
        value = round_bfloat16(s.x[i]) if s.keys[i] > bar else _ZERO
        s.update[i] = rescale(value, value * value, scalars)


@inline
def rescale(mu, nu, scalars):
    """Adam's update."""
    nu = (nu + scalars.eps_root) * scalars.debias_nu
    return (mu * scalars.debias_mu) / (root(nu) + scalars.eps)


@inline
def write_slot(row, s, shape):
    """What was selected, over the oldest slot."""
    for i in range(shape.k):
        write_index(row, shape, shape.slot + i, index_of(s.entries[i], shape))
        row.values[shape.slot + i] = to_bfloat16(s.firsts[i])


@inline
def drop(s, shape, bar):
    """Zeros for what was selected; returns step and zero point of the rest."""
    for i in range(count_lanes(shape)):
        s.x[i] = s.x[i] if s.keys[i] <= bar else _ZERO
    return measure(s, shape)


@inline
def measure(s, shape):
    """The step that covers a block and zero, and the code of zero."""
    high = low = int32(0)
    for i in range(count_lanes(shape)):
        bits = bits_of(s.x[i])
        high = max(high, bits)
        low = max(low, int32(bits ^ ~0x7FFFFFFF))
    if max(high, low) > _INFINITY:
        return float32(np.nan), _ZERO
    span = float32(_ABOVE / ((1 << shape.bits) - 1))
    step = round_bfloat16((float_of(high) + float_of(low)) * span)
    if not (_SMALLEST <= step < np.inf):
        return (step if step > 1 else _ZERO), _ZERO
    most = float32(255)
    return step, most - float32(multiple(-float_of(low), step, _ONE / step, most))


@inline
def multiple(x, step, inverse, zero):
    """The nearest multiple of a step, plus zero: exact, whatever a division rounds to."""
    code = int32(x * inverse + (zero + _HALF))
    above_ = x - (float32(code) - zero) * step
    return int32(code + (above_ >= _HALF * step) - (above_ < -_HALF * step))


@inline
def quantize(s, shape, step, zero):
    if not (0 < step < np.inf):
        for i in range(shape.lanes):
            s.codes[i] = 0
        return
    inverse = _ONE / step
    for part in range(8 // shape.bits):
        to, shift = part * shape.lanes, int32(shape.bits * part)
        for i in range(shape.lanes):
            code = multiple(s.x[to + i], step, inverse, zero) << shift
            s.codes[i] = uint8(code if part == 0 else s.codes[i] | code)


@inline
def return_error(s, scalars, shape, step, zero):
    """Adds the share `alpha` of the error to the update, and keeps the rest of it."""
    mask = (1 << shape.bits) - 1
    for part in range(8 // shape.bits):
        to = part * shape.lanes
        for i in range(shape.lanes):
            code = int32((s.codes[i] >> (shape.bits * part)) & mask)
            error = (float32(code) - zero) * step
            s.update[to + i] += round_product(scalars.alpha * error)
            s.x[to + i] = round_to(scalars.kept * error, 8)
        for i in range(shape.width, shape.lanes):
            s.x[to + i] = _ZERO
    return measure(s, shape)


@inline
def write(row, s, shape, step, zero, narrow):
    """Update, codes and range, from scratch memory."""
    for part in range(8 // shape.bits):
        to, begin = part * shape.lanes, part * shape.width
        for i in range(min(max(row.size - begin, 0), shape.width)):
            row.gradient[begin + i] = narrow(s.update[to + i])
    for i in range(shape.width):
        row.codes[i] = s.codes[i]
    row.ranges[0], row.ranges[1] = to_bfloat16(step), to_bfloat16(zero)


@inline
def clear(s, scalars, shape):
    """Leaves scratch memory for the next block."""
    if scalars.alpha != 0:
        fill(s.update, count_lanes(shape), rescale(_ZERO, _ZERO, scalars))
    for i in range((shape.slots + 1) * shape.k):
        lane = s.entries[i]
        s.mu[lane] = s.nu[lane] = _ZERO
        s.update[lane] = rescale(_ZERO, _ZERO, scalars)


@inline
def fill(array, count, value):
    for i in range(count):
        array[i] = value


@inline
def count_lanes(shape):
    return shape.lanes * (8 // shape.bits)


@inline
def read_index(row, shape, i):
    if shape.index_bytes == 1:
        return int(row.indices[i])
    return int(view(row.indices, uint16)[i])


@inline
def write_index(row, shape, i, index):
    if shape.index_bytes == 1:
        row.indices[i] = index
    else:
        view(row.indices, uint16)[i] = index


@inline
def lane_of(index, shape):
    """Where an element is in scratch memory."""
    index = min(index, shape.block - 1)  # also if a saved state is not what it should be
    lane = index
    for part in range(1, 8 // shape.bits):
        lane += (index >= part * shape.width) * (shape.lanes - shape.width)
    return lane


@inline
def index_of(lane, shape):
    """The inverse."""
    index = lane
    for part in range(1, 8 // shape.bits):
        index -= (lane >= part * shape.lanes) * (shape.lanes - shape.width)
    return index


@inline
def round_to(x, dropped):
    """float32 without its last bits: to nearest, ties to even."""
    bits = bits_of(x)
    odd = (bits >> dropped) & 1
    nearest = (bits + ((1 << (dropped - 1)) - 1) + odd) & -(1 << dropped)
    return float_of(int32(nearest)) if x == x else x


@inline
def round_product(x):
    """A product as `_moments.rounded` makes it."""
    return round_to(x, 1)


@inline
def round_bfloat16(x):
    return round_to(x, 16)


@inline
def from_bfloat16(bits):
    return float_of(int32(int32(bits) << 16))


@inline
def to_bfloat16(x):
    """The bits of a float32 as a bfloat16."""
    bits = bits_of(round_bfloat16(x)) >> 16
    return uint16(bits if x == x else bits | 0x40)
