"""The optimizer state: what is kept of a leaf, and in which shapes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_optax._blocks import Layout


class MicroAdamState(NamedTuple):
    """State of `scale_by_microadam`.

    Every field but `count` and `key` is a tree like the parameters. The arrays of
    a leaf lead with its grid, so its PartitionSpec is valid for each of them.

    Attributes:
      count: int32 scalar, steps done.
      codes: uint8 ``(*grid, blocks, block * error_bits / 8)``, the error feedback.
      ranges: bfloat16 ``(*grid, blocks, 2)``, low and high end of a block's codes.
      indices: uint8, or uint16 where blocks are larger than 256,
        ``(*grid, blocks, (window - 1) * k)``: positions of the window's entries in
        their block. None at window 1.
      values: bfloat16, those entries, like `indices`.
      key: raw PRNG key (uint32) for stochastic rounding, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    codes: Any
    ranges: Any
    indices: Any
    values: Any
    key: jax.Array | None


class Settings(NamedTuple):
    """The Python numbers that shape a leaf's state and update."""

    window: int
    density: float
    bits: int  # of an error code
    alpha: float

    def k(self, block: int) -> int:
        """Entries selected in a block."""
        # Rounded, so that 7 % of 100 is 7 although 0.07 * 100 > 7 in binary.
        return max(1, math.ceil(round(self.density * block, 6)))


class LeafState(NamedTuple):
    """The fields of `MicroAdamState` for one leaf: its arrays, or their shapes."""

    codes: Any
    ranges: Any
    indices: Any
    values: Any


def shapes(at: Layout, settings: Settings) -> LeafState:
    """Shapes of the state of a leaf; None for what window 1 does not keep."""
    lead = (*at.grid, at.blocks)
    entries = None
    if settings.window > 1:
        entries = (*lead, (settings.window - 1) * settings.k(at.block))
    width = at.block * settings.bits // 8
    return LeafState((*lead, width), (*lead, 2), entries, entries)


def zeros(at: Layout, settings: Settings) -> LeafState:
    """The state of a leaf before the first step."""
    of = shapes(at, settings)
    codes = jnp.zeros(of.codes, jnp.uint8)
    ranges = jnp.zeros(of.ranges, jnp.bfloat16)
    if of.indices is None:
        return LeafState(codes, ranges, None, None)
    # The entries are zeros, but no position may stand twice in a slot.
    slot = jnp.arange(settings.k(at.block), dtype=index_dtype(at.block))
    indices = jnp.broadcast_to(jnp.tile(slot, settings.window - 1), of.indices)
    return LeafState(codes, ranges, indices, jnp.zeros(of.values, jnp.bfloat16))


def layout_of(shape: tuple[int, ...], state: LeafState, bits: int) -> Layout | None:
    """The layout of a leaf, read from its state; None if the two do not fit."""
    *grid, blocks, width = state.codes.shape
    at = Layout(shape, tuple(grid), blocks, width * 8 // bits)
    if len(grid) != len(shape):
        return None
    if any(n < 1 or size % n for size, n in zip(shape, grid, strict=True)):
        return None
    covered = (blocks - 1) * at.block < max(1, at.cell) <= blocks * at.block
    return at if covered else None


def index_dtype(block: int) -> Any:
    """The smallest unsigned type that holds every position in a block."""
    return jnp.uint8 if block <= 2**8 else jnp.uint16
