"""MicroAdam in plain loops: Algorithm 1 for one block after another, on one core.

`update_block` is the algorithm, a line of code to a line of the paper. A block lies in
scratch memory that stays in the core's first cache, in *lanes*: elements whose codes
share a byte are at the same place of different parts, and each part is filled up to
whole words of 32 lanes, so that every loop is one of whole vectors. The arithmetic is
that of `_step.update_blocks`, operation by operation, and so are the bits.
"""

from numba.core.types import float32, int32, uint8

from microadam_optax._kernels.cpu_data import (
    ONE,
    ZERO,
    Row,
    Scratch,
    embed,
    fill,
    inline,
    to_bfloat16,
)
from microadam_optax._kernels.cpu_entries import (
    AT_ONCE,
    add_newest,
    add_older,
    rescale,
    take,
    update_entries,
    update_selected,
    write_slot,
)
from microadam_optax._kernels.cpu_error import accumulate, measure, quantize, return_error
from microadam_optax._kernels.cpu_llvm import WORD, allocate, release, shifted
from microadam_optax._kernels.cpu_select import select


@embed
def update_rows(arrays, first, last, factors, leaf, widen, narrow):
    """One step of the rows from one to another."""
    shape = leaf.shape
    s = prepare(shape, factors)
    stored = shape.slots * shape.k
    cell, number = first // leaf.blocks, first % leaf.blocks
    for row in range(first, last):
        begin = number * shape.block
        gradient = shifted(arrays.gradient, cell * leaf.cell + begin)
        of_row = Row(
            gradient,
            gradient,
            shifted(arrays.codes, row * shape.width),
            shifted(arrays.ranges, 2 * row),
            shifted(arrays.indices, row * stored * shape.index_bytes),
            shifted(arrays.values, row * stored),
            min(shape.block, leaf.cell - begin),
        )
        update_block(of_row, s, factors, shape, widen, narrow)
        number += 1
        if number == leaf.blocks:
            cell, number = cell + 1, 0
    free(s)


@embed
def prepare(shape, factors):
    """Scratch memory, as each block finds it."""
    lanes, entries = shape.all, (shape.slots + 1) * shape.k
    s = Scratch(
        allocate(shape.lanes, float32),
        allocate(lanes, float32),
        allocate(lanes + WORD, int32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(lanes, float32),
        allocate(shape.lanes, int32),
        allocate(entries + AT_ONCE, int32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(entries, float32),
        allocate(3, float32),
    )
    fill(s.keys, lanes + WORD, int32(-1))
    fill(s.mu, lanes, ZERO)
    fill(s.nu, lanes, ZERO)
    fill(s.update, lanes, rescale(ZERO, ZERO, factors))
    s.guess[0], s.guess[1], s.guess[2] = float32(1 << 30), float32(1 << 17), ONE
    for i in range(shape.slots * shape.k):
        s.mu_weights[i] = factors.weights[i // shape.k]
        s.nu_weights[i] = factors.weights[shape.slots + i // shape.k]
    return s


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
def update_block(row, s, factors, shape, widen, narrow):
    """One step of a block."""
    top = accumulate(row, s, shape, widen)  # a = g + Q^-1(e)
    bar = select(s, shape, top)  # the k largest |a|
    if shape.slots == 0:
        update_selected(s, factors, shape, bar)
    else:
        take(s, shape, bar)
        add_newest(s, shape)
        add_older(row, s, shape)
        write_slot(row, s, shape)
        update_entries(s, factors, shape)
    step, zero = measure(s, shape)  # e = Q(a without them)
    quantize(s, shape, step, zero)
    if factors.alpha != 0:
        step, zero = return_error(s, factors, shape, step, zero)
        quantize(s, shape, step, zero)
    write(row, s, shape, step, zero, narrow)
    if shape.slots > 0:
        clear(s, factors, shape)


@inline
def write(row, s, shape, step, zero, narrow):
    """Update, codes and range, from scratch memory."""
    for part in range(shape.parts):
        to, begin = part * shape.lanes, part * shape.width
        for i in range(min(max(row.size - begin, 0), shape.width)):
            row.update[begin + i] = narrow(s.update[to + i])
    for i in range(shape.width):
        row.codes[i] = uint8(s.codes[i])
    row.ranges[0], row.ranges[1] = to_bfloat16(step), to_bfloat16(zero)


@inline
def clear(s, factors, shape):
    """Leaves scratch memory for the next block."""
    if factors.alpha != 0:
        fill(s.update, shape.all, rescale(ZERO, ZERO, factors))
    for i in range((shape.slots + 1) * shape.k):
        s.update[s.entries[i]] = rescale(ZERO, ZERO, factors)
