"""A parameter leaf as rows of equal blocks, and back.

A leaf is covered by a *grid*: ``grid[i]`` divides ``shape[i]``, and each of the
``prod(grid)`` cells is flattened and cut into the same number of equal blocks,
zero-padded at its end. The grid is a rule of the shape alone, never of a mesh,
and every array of the state leads with it, so the parameter's own PartitionSpec
is a valid spec of all of them.
"""

import math
import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_optax._paths import shown

_MIN_CELL = 64  # a cell of the default grid holds at least this many elements


class Layout(NamedTuple):
    """How a leaf of `shape` lies in blocks: ``(*grid, blocks, block)``."""

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    blocks: int  # blocks in a cell
    block: int  # elements in a block

    @property
    def cell(self) -> int:
        """Elements of the leaf in one cell, padding not counted."""
        return math.prod(n // g for n, g in zip(self.shape, self.grid, strict=True))

    def share(self, k: int) -> float:
        """Of the elements of the leaf, how many are selected, with `k` in a block."""
        if not self.cell:
            return 1.0
        filled, rest = divmod(self.cell, self.block)
        return (filled * min(k, self.block) + min(k, rest)) / self.cell

    @property
    def padded(self) -> bool:
        """Whether the blocks of a cell hold more than the cell."""
        return self.cell != self.blocks * self.block


def layout_of(
    shape: tuple[int, ...],
    block_size: int,
    shards: int = 8,
    grid: tuple[int, ...] | None = None,
) -> Layout:
    """The layout of a leaf: the given grid or the default one, and its blocks."""
    grid = default_grid(shape, block_size, shards) if grid is None else grid
    cell = Layout(shape, grid, 0, 0).cell
    blocks = max(1, -(-cell // block_size))
    return Layout(shape, grid, blocks, block_of(cell, blocks))


def block_of(cell: int, blocks: int) -> int:
    """Elements in each of the equal blocks that a cell is cut into, a multiple of 8."""
    return -(-max(1, -(-cell // blocks)) // 8) * 8


def default_grid(shape: tuple[int, ...], block_size: int, shards: int) -> tuple[int, ...]:
    """A cell for every index of the leading axes, the next axis in up to `shards`.

    Trailing axes are collapsed until they hold a block; the first of them is cut
    into the largest divisor of `shards` that divides it and leaves cells of 64.
    """
    if math.prod(shape) == 0 or not shape:
        return (1,) * len(shape)
    first = len(shape) - 1
    while first > 0 and math.prod(shape[first:]) < block_size:
        first -= 1
    length = math.prod(shape[first:])
    cut = max(
        g
        for g in range(1, shards + 1)
        if shards % g == 0
        and shape[first] % g == 0
        and (g == 1 or length // g >= _MIN_CELL)
    )
    return (*shape[:first], cut, *(1 for _ in shape[first + 1 :]))


def is_grid(x: Any) -> bool:
    """Whether something is a sequence of positive integers."""
    return isinstance(x, tuple | list) and all(
        isinstance(n, numbers.Integral) and int(n) >= 1 for n in x
    )


def check_grid(path: Any, shape: tuple[int, ...], grid: Any) -> tuple[int, ...] | None:
    """A leaf's grid as a tuple; ValueError if it does not cut it into equal cells."""
    if grid is None:
        return None
    if (
        not is_grid(grid)
        or len(grid) != len(shape)
        or any(map(operator.mod, shape, grid))
    ):
        raise ValueError(
            f"`grid` of {shown(path)} must be a tuple of positive divisors of its "
            f"shape {shape}, one an axis, got {grid!r}."
        )
    return tuple(int(n) for n in grid)


def contiguous(layout: Layout) -> bool:
    """Whether the cells lie in a leaf one after another: `split` moves nothing."""
    whole = [n // g > 1 for n, g in zip(layout.shape, layout.grid, strict=True)]
    return True not in whole or not any(
        g > 1 for g in layout.grid[whole.index(True) + 1 :]
    )


def split(leaf: jax.Array, layout: Layout) -> jax.Array:
    """A leaf ``layout.shape`` as cells ``(*layout.grid, layout.cell)``."""
    grid = zip(layout.shape, layout.grid, strict=True)
    boxes = leaf.reshape(tuple(n for size, g in grid for n in (g, size // g)))
    rank = len(layout.shape)
    order = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    return boxes.transpose(order).reshape((*layout.grid, layout.cell))


def join(cells: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `split`."""
    inner = tuple(n // g for n, g in zip(layout.shape, layout.grid, strict=True))
    boxes = cells.reshape((*layout.grid, *inner))
    rank = len(layout.shape)
    order = [axis for i in range(rank) for axis in (i, rank + i)]
    return boxes.transpose(order).reshape(layout.shape)


def pad(cells: jax.Array, blocks: int, block: int) -> jax.Array:
    """Cells ``(..., cell)`` zero-padded and cut into ``(..., blocks, block)``."""
    *lead, cell = cells.shape
    missing = jnp.zeros((*lead, blocks * block - cell), cells.dtype)
    padded = jnp.concatenate([cells, missing], axis=-1)
    return padded.reshape(*lead, blocks, block)


def unpad(rows: jax.Array, cell: int) -> jax.Array:
    """The inverse of `pad`."""
    return rows.reshape(*rows.shape[:-2], -1)[..., :cell]
