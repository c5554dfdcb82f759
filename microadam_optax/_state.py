"""The optimizer state: what is kept of a leaf, and in which shapes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_optax import _specs
from microadam_optax._blocks import Layout, block_of


class MicroAdamState(NamedTuple):
    """State of `scale_by_microadam`.

    Every field but `count`, `ages` and `key` is a tree like the parameters. The arrays of
    a leaf lead with its grid, so its PartitionSpec is valid for each of them.

    Attributes:
      count: int32 scalar, steps done.
      ages: int32 ``(window - 1,)``, steps since each slot of the window was written.
        None at window 1.
      codes: uint8 ``(*grid, blocks, block * error_bits / 8)``, the error feedback.
      ranges: bfloat16 ``(*grid, blocks, 2)``, of each block the step between
        its codes and the code of zero.
      indices: uint8, or uint16 where blocks are larger than 256,
        ``(*grid, blocks, (window - 1) * k)``: positions of the window's entries in
        their block. None at window 1.
      values: bfloat16, those entries, like `indices`.
      key: raw PRNG key (uint32) for stochastic rounding, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    ages: jax.Array | None
    codes: Any
    ranges: Any
    indices: Any
    values: Any
    key: jax.Array | None


class Settings(NamedTuple):
    """The Python numbers that shape a leaf's state and update."""

    window: int
    density: float
    block_size: int
    bits: int  # of an error code
    alpha: float
    implementation: str | None = None

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


def zeros(at: Layout, settings: Settings, sharding: Any = None) -> LeafState:
    """The state of a leaf before the first step, sharded like the leaf."""
    of = shapes(at, settings)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        device = None if sharding is None else _specs.follow(sharding, shape)
        return jnp.zeros(shape, dtype, device=device)

    codes, ranges = array(of.codes, jnp.uint8), array(of.ranges, jnp.bfloat16)
    if of.indices is None:
        return LeafState(codes, ranges, None, None)
    # The entries are zeros, but no position may stand twice in a slot.
    dtype = index_dtype(at.block)
    slots = np.tile(np.arange(settings.k(at.block), dtype=dtype), settings.window - 1)
    indices = array(of.indices, dtype) + slots
    return LeafState(codes, ranges, indices, array(of.values, jnp.bfloat16))


class Form(NamedTuple):
    """What the shapes of a leaf's state tell of how it was made."""

    window: int
    bits: int
    block: int  # elements in a block, at most `block_size`
    k: int | None  # entries selected in a block; None at window 1
    grid: tuple[int, ...]


def form_of(shape: tuple[int, ...], state: LeafState, window: int) -> Form | None:
    """The form of a state given as shapes; None if it is not that of such a leaf."""
    if any(x is not None and len(x) != len(shape) + 2 for x in state):
        return None
    *grid, blocks, width = state.codes
    divides = all(n and size % n == 0 for size, n in zip(shape, grid, strict=True))
    kept = state.indices is not None
    if not divides or not blocks or kept != (window > 1):
        return None
    block = block_of(Layout(shape, tuple(grid), blocks, 0).cell, blocks)
    bits, rest = divmod(width * 8, block)
    k = None
    if kept:
        k, no_k = divmod(state.indices[-1], window - 1)
        rest += no_k
    form = Form(window, bits, block, k, tuple(grid))
    settings = Settings(window, (k or 1) / block, 0, bits, 0.0)
    at = Layout(shape, form.grid, blocks, block)
    return form if not rest and state == shapes(at, settings) else None


def index_dtype(block: int) -> Any:
    """The smallest unsigned type that holds every position in a block."""
    return jnp.uint8 if block <= 2**8 else jnp.uint16
