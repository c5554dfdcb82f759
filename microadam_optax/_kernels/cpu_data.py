"""What the loops over a block work on: its arrays, scratch memory, and roundings."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core.types import int32, uint16

from microadam_optax._kernels.cpu_llvm import bits_of, choose, float_of, view

INFINITY = 0x7F800000  # the bits of it
ZERO, ONE = np.float32(0), np.float32(1)

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
    start: Any  # of the oldest slot, where the entries of this step go
    index_bytes: Any  # 1 or 2


class Leaf(NamedTuple):
    """How the blocks of a leaf lie in it."""

    shape: Any
    cell: Any  # elements in a cell
    blocks: Any  # in a cell


class Factors(NamedTuple):
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

    gradient: Any
    update: Any  # in the same memory
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


@inline
def same(x):
    return x


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
def round_to(x, mantissa):
    """float32 rounded to so many bits of mantissa: to nearest, ties to even."""
    bits, dropped = bits_of(x), 23 - mantissa
    odd = (bits >> dropped) & 1
    nearest = (bits + ((1 << (dropped - 1)) - 1) + odd) & -(1 << dropped)
    return choose(x == x, float_of(int32(nearest)), x)


@inline
def round_product(x):
    """A product as `_moments.round_product` makes it."""
    return round_to(x, 22)


@inline
def round_bfloat16(x):
    return round_to(x, 7)


@inline
def from_bfloat16(bits):
    return float_of(int32(int32(bits) << 16))


@inline
def to_bfloat16(x):
    """The bits of a float32 as a bfloat16."""
    bits = bits_of(round_bfloat16(x)) >> 16
    return uint16(bits if x == x else bits | 0x40)
