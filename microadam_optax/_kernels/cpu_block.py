"""MicroAdam in plain loops: Algorithm 1 for one block after another, on one core.

`update_block` is the algorithm, a line of code to a line of the paper. A block lies in
scratch memory that stays in the core's first cache, in *lanes*: elements whose codes
share a byte are at the same place of different parts, and each part is filled up to
whole words of 32 lanes, so that every loop is one of whole vectors. The arithmetic is
that of `_leaf.update_blocks`, operation by operation, and so are the bits.

Selection compares the bits of ``|x|`` as integers, like `_topk`. Their k largest are
those above a bar. A few are found one by one, each the largest below the last. Else the
bar is looked for by counting how many keys are above three guesses at a time: the first
are around the bars of the blocks before, the next where the counts leave room. Two or
three such passes are enough.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core.types import float32, int32, uint8, uint16

from microadam_optax import _moments, _quantize
from microadam_optax._kernels.cpu_llvm import (
    WORD,
    above,
    allocate,
    bits_of,
    choose,
    count_bits,
    float_of,
    lowest_bit,
    release,
    root,
    shift_left,
    shift_right,
    shifted,
    view,
)

_INFINITY = 0x7F800000
INFINITE = np.float32(np.inf)
_LARGEST = int(np.float32(_moments.LARGEST).view(np.int32))
_ABOVE = _quantize.ABOVE
_SMALLEST = np.float32(_quantize.SMALLEST)
_FEW = 1280  # comparisons up to which maxima cost less than counts
_HALF = np.float32(0.5)
_BELOW_HALF = np.float32(0.5 - 2**-10)
_AT_ONCE = 8  # bits of a mask without a branch
_SLOWLY = np.float32(0.1)  # how guesses follow from block to block
_ZERO, _ONE = np.float32(0), np.float32(1)

_options: Any = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
inline = njit(forceinline=True, **_options)
# For what holds most of the code: LLVM would compile it at every level of calls.
embed = njit(inline="always", **_options)


class Shape(NamedTuple):
    """The numbers that all blocks of a leaf share."""

    block: Any  # elements
    parts: Any  # whose codes share the bytes
    width: Any  # bytes of codes, and elements of a part
    lanes: Any  # of a part in scratch memory
    all: Any  # lanes of all parts
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

    staged: Any  # float32, a part of a gradient that does not fill its lanes
    x: Any  # float32: g + Q^-1(e), then what is left of it
    keys: Any  # int32, its magnitude; -1 where no element is
    mu: Any  # float32, zeros between blocks, like nu
    nu: Any
    update: Any  # float32, between blocks that of an element without entries
    codes: Any  # int32, of all parts of a lane
    entries: Any  # int32, lanes of the block's entries, the newest first
    firsts: Any  # float32, mu at these, then the update
    seconds: Any  # float32, nu
    mu_weights: Any  # float32, of the entries of the window, like nu_weights
    nu_weights: Any
    guess: Any  # float32 (3,): of the next bar, of distances there, and how they follow


@embed
def update_rows(arrays, first, last, scalars, launch, widen, narrow):
    """One step of the rows from one to another."""
    shape = launch.shape
    lanes = shape.all
    entries = (shape.slots + 1) * shape.k
    s = Scratch(
        allocate(shape.lanes, float32),
        allocate(lanes, float32),
        allocate(lanes + WORD, int32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(shape.lanes, int32),
        allocate(entries + _AT_ONCE, int32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(3, float32),
    )
    fill(s.keys, lanes + WORD, int32(-1))
    fill(s.mu, lanes, _ZERO)
    fill(s.nu, lanes, _ZERO)
    fill(s.update, lanes, rescale(_ZERO, _ZERO, scalars))
    s.guess[0], s.guess[1], s.guess[2] = float32(1 << 30), float32(1 << 17), _ONE
    stored = shape.slots * shape.k
    for i in range(stored):
        s.mu_weights[i] = scalars.weights[i // shape.k]
        s.nu_weights[i] = scalars.weights[shape.slots + i // shape.k]
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
    free(s)


@inline
def free(s):
    release(s.staged)
    release(s.x)
    release(s.mu_weights)
    release(s.nu_weights)
    release(s.keys)
    release(s.mu)
    release(s.nu)
    release(s.update)
    release(s.codes)
    release(s.entries)
    release(s.firsts)
    release(s.seconds)
    release(s.guess)


@embed
def update_block(row, s, scalars, shape, widen, narrow):
    """One step of a block."""
    top = accumulate(row, s, shape, widen)  # a = g + Q^-1(e)
    bar = select(s, shape, top)  # the k largest |a|
    if shape.slots == 0:
        update_selected(s, scalars, shape, bar)
    else:
        take(s, shape, bar)
        add_newest(s, shape)
        add_older(row, s, shape)
        write_slot(row, s, shape)
        update_entries(s, scalars, shape)
    step, zero = measure(s, shape)  # e = Q(a without them)
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
    for i in range(shape.width):
        s.codes[i] = row.codes[i]
    step, zero = from_bfloat16(row.ranges[0]), from_bfloat16(row.ranges[1])
    top = int32(0)
    for part in range(shape.parts):
        to, begin = part * shape.lanes, part * shape.width
        gradient = shifted(row.gradient, begin)
        real = row.size - begin
        if real < shape.lanes or shape.width < shape.lanes:
            for i in range(min(max(real, 0), shape.width)):
                s.staged[i] = widen(gradient[i])
            for i in range(min(max(real, 0), shape.width), shape.lanes):
                s.staged[i] = _ZERO
            top = max(top, add_error(s.staged, s, shape, part, step, zero, same))
            for i in range(shape.width, shape.lanes):
                s.keys[to + i] = -1
                s.x[to + i] = _ZERO
        else:
            top = max(top, add_error(gradient, s, shape, part, step, zero, widen))
    if top > _LARGEST:
        top = bound(s, shape)
    return top


@inline
def add_error(gradient, s, shape, part, step, zero, widen):
    mask, shift = int32((1 << shape.bits) - 1), int32(shape.bits * part)
    to = part * shape.lanes
    top = int32(0)
    for i in range(shape.lanes):
        code = int32(shift_right(s.codes[i], shift) & mask)
        x = widen(gradient[i]) + (float32(code) - zero) * step
        key = int32(bits_of(x) & 0x7FFFFFFF)
        s.x[to + i] = x
        s.keys[to + i] = key
        top = max(top, key)
    return top


@inline
def same(x):
    return x


@inline
def bound(s, shape):
    """Finite numbers at most 2**60."""
    top = int32(0)
    for i in range(shape.all):
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
    if shape.k * (shape.all + WORD) <= _FEW:
        bar = kth_by_maxima(s, shape, top) - 1
        if count_above(s, shape, bar) == shape.k:
            return int32(bar)
    return int32(bar_by_counting(s, shape, top))


@inline
def kth_by_maxima(s, shape, top):
    """The k-th largest key, if no two of these are equal."""
    kth = int(top)
    for _ in range(1, shape.k):
        kth = largest_up_to(s, shape, kth - 1)
    return kth


@inline
def bar_by_counting(s, shape, top):
    """Narrows the range of the bar by three guesses at a time."""
    low, many = -1, shape.block  # too many are above the low bar
    high, few = int(top), 0  # and too few above the high one
    bar, gap = int(s.guess[0]), int(8 * s.guess[1])
    tries = 0
    while high - low > 1:
        if tries > 0 and (few == shape.k - 1 or (tries & 3) == 3):
            bar = largest_up_to(s, shape, high) - 1
            gap = (high - low) >> 2
        first = min(max(bar - gap, low + 1), high - 1)
        second = min(max(bar, low + 1), high - 1)
        third = min(max(bar + gap, low + 1), high - 1)
        counts = count_three(s, shape, first, second, third)
        for bar, count in ((first, counts[0]), (second, counts[1]), (third, counts[2])):
            if count >= shape.k and bar > low:
                low, many = bar, count
            if count < shape.k and bar < high:
                high, few = bar, count
        if many == shape.k:
            break
        tries += 1
        if few == 0 or many == shape.block:
            gap *= 4
            bar = high - gap if few > 0 else low + gap
        else:
            gap = (high - low) // (many - few + 1)
            bar = low + gap * (many - shape.k) + (gap >> 1)
    exclude_ties(s, shape, low, many - shape.k)
    pace = s.guess[2]
    s.guess[0] += pace * (float32(low) - s.guess[0])
    s.guess[1] += pace * (float32((high - low) // (many - few)) - s.guess[1])
    s.guess[2] = max(pace * float32(0.8), _SLOWLY)
    return low


@inline
def count_above(s, shape, bar):
    count, bar = int32(0), int32(bar)
    for i in range(shape.all):
        count = int32(count + (s.keys[i] > bar))
    return int(count)


@inline
def count_three(s, shape, first, second, third):
    """How many keys are above each of three bars."""
    one = two = three = int32(0)
    first, second, third = int32(first), int32(second), int32(third)
    for i in range(shape.all):
        key = s.keys[i]
        one = int32(one + (key > first))
        two = int32(two + (key > second))
        three = int32(three + (key > third))
    return int(one), int(two), int(three)


@inline
def largest_up_to(s, shape, high):
    largest, high = int32(-1), int32(high)
    for i in range(shape.all):
        key = s.keys[i]
        largest = max(largest, choose(key <= high, key, int32(-1)))
    return int(largest)


@inline
def exclude_ties(s, shape, bar, excess):
    """Lowers the last of the keys just above a bar."""
    i = shape.all
    while excess > 0:
        i -= 1
        if s.keys[i] == bar + 1:
            s.keys[i] = bar
            excess -= 1


@inline
def take(s, shape, bar):
    """The selected elements as bfloat16, by ascending index, out of a."""
    n = 0
    for word in range(0, shape.all, WORD):
        mask = above(shifted(s.keys, word), bar)
        i, n = n, n + count_bits(mask)
        while True:
            for _ in range(_AT_ONCE):  # what is too much is written over, or never read
                s.entries[i] = word + lowest_bit(mask)
                mask &= mask - 1
                i += 1
            if mask == 0:
                break
    for i in range(shape.k):
        lane = s.entries[i]
        s.seconds[i] = s.x[lane]
        s.x[lane] = _ZERO
    for i in range(shape.k):
        s.firsts[i] = round_bfloat16(s.seconds[i])


@inline
def add_newest(s, shape):
    for i in range(shape.k):
        lane, value = s.entries[i], s.firsts[i]
        s.mu[lane], s.nu[lane] = value, value * value


@inline
def add_older(row, s, shape):
    """The window's entries, slot after slot: weights times values and their squares."""
    k, stored = shape.k, shape.slots * shape.k
    for i in range(stored):
        value = from_bfloat16(row.values[i])
        s.firsts[k + i] = round_product(s.mu_weights[i] * value)
        s.seconds[k + i] = round_product(s.nu_weights[i] * (value * value))
    for i in range(stored):
        lane = lane_of(read_index(row, shape, i), shape)
        s.entries[k + i] = lane
        s.mu[lane] += s.firsts[k + i]
        s.nu[lane] += s.seconds[k + i]


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
        lane = s.entries[i]
        s.update[lane] = s.firsts[i]
        s.mu[lane] = s.nu[lane] = _ZERO


@inline
def update_selected(s, scalars, shape, bar):
    """Without a window: the selected elements' updates, and what is left of a."""
    for i in range(shape.all):
        selected = s.keys[i] > bar
        value = choose(selected, round_bfloat16(s.x[i]), _ZERO)
        s.x[i] = float_of(int32(bits_of(s.x[i]) & (int32(selected) - 1)))
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
def measure(s, shape):
    """The step that covers a block and zero, and the code of zero."""
    high = low = int32(0)
    for i in range(shape.all):
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
    """The nearest multiple of a step, plus zero: exact, whatever a division rounds to.

    At first it is right, or one less near a tie.
    """
    code = int32(x * inverse + (zero + _BELOW_HALF))
    above_ = x - (float32(code) - zero) * step
    return int32(code + (above_ >= _HALF * step))


@inline
def quantize(s, shape, step, zero):
    if not (0 < step < np.inf):
        for i in range(shape.lanes):
            s.codes[i] = 0
        return
    inverse = _ONE / step
    for i in range(shape.lanes):
        s.codes[i] = multiple(s.x[i], step, inverse, zero)
    for part in range(1, shape.parts):
        to, shift = part * shape.lanes, int32(shape.bits * part)
        for i in range(shape.lanes):
            code = multiple(s.x[to + i], step, inverse, zero)
            s.codes[i] = int32(s.codes[i] | shift_left(code, shift))


@inline
def return_error(s, scalars, shape, step, zero):
    """Adds the share `alpha` of the error to the update, and keeps the rest of it."""
    mask = (1 << shape.bits) - 1
    for part in range(shape.parts):
        to = part * shape.lanes
        for i in range(shape.lanes):
            code = int32(shift_right(s.codes[i], int32(shape.bits * part)) & mask)
            error = (float32(code) - zero) * step
            s.update[to + i] += round_product(scalars.alpha * error)
            s.x[to + i] = round_to(scalars.kept * error, 8)
        for i in range(shape.width, shape.lanes):
            s.x[to + i] = _ZERO
    return measure(s, shape)


@inline
def write(row, s, shape, step, zero, narrow):
    """Update, codes and range, from scratch memory."""
    for part in range(shape.parts):
        to, begin = part * shape.lanes, part * shape.width
        for i in range(min(max(row.size - begin, 0), shape.width)):
            row.gradient[begin + i] = narrow(s.update[to + i])
    for i in range(shape.width):
        row.codes[i] = uint8(s.codes[i])
    row.ranges[0], row.ranges[1] = to_bfloat16(step), to_bfloat16(zero)


@inline
def clear(s, scalars, shape):
    """Leaves scratch memory for the next block."""
    if scalars.alpha != 0:
        fill(s.update, shape.all, rescale(_ZERO, _ZERO, scalars))
    for i in range((shape.slots + 1) * shape.k):
        s.update[s.entries[i]] = rescale(_ZERO, _ZERO, scalars)


@inline
def fill(array, count, value):
    for i in range(count):
        array[i] = value


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
    if shape.width < shape.lanes:
        for part in range(1, shape.parts):
            lane += (index >= part * shape.width) * (shape.lanes - shape.width)
    return lane


@inline
def index_of(lane, shape):
    """The inverse."""
    index = lane
    if shape.width < shape.lanes:
        for part in range(1, shape.parts):
            index -= (lane >= part * shape.lanes) * (shape.lanes - shape.width)
    return index


@inline
def round_to(x, dropped):
    """float32 without its last bits: to nearest, ties to even."""
    bits = bits_of(x)
    odd = (bits >> dropped) & 1
    nearest = (bits + ((1 << (dropped - 1)) - 1) + odd) & -(1 << dropped)
    return choose(x == x, float_of(int32(nearest)), x)


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
