"""What the shapes of a leaf's state tell of how it was made."""

import math
import operator
from typing import Any, NamedTuple

from microadam_optax._blocks import Layout, block_of, layout_of
from microadam_optax._state import LeafState, Settings, shapes


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
    layout = Layout(shape, tuple(grid), blocks, block)
    fits = not rest and state == shapes(layout, window, bits, k or 1)
    return Form(window, bits, block, k, layout.grid) if fits else None


class Forms(NamedTuple):
    """A leaf's state beside what a transformation makes of it."""

    found: LeafState  # shapes
    made: Form | None  # what they tell if they are those of such a leaf
    asked: Form
    layout: Layout  # of what is asked


def forms(
    shape: tuple[int, ...], state: LeafState, ages: Any, settings: Settings
) -> Forms:
    """How a state was made, and how these settings would make it."""
    window = 1 if ages is None else ages.size + 1
    found = LeafState(*(None if x is None else x.shape for x in state))
    made = form_of(shape, found, window)
    layout = layout_of(shape, settings.block_size, grid=made.grid if made else None)
    k = settings.k(layout.block) if settings.window > 1 else None
    asked = Form(settings.window, settings.bits, layout.block, k, layout.grid)
    return Forms(found, made, asked, layout)


def shape_of(
    state: LeafState, like: tuple[int, ...], asked: Form
) -> tuple[int, ...] | None:
    """The shape of a leaf with this state in a form as asked, None if there is none.

    Such as that of a model with another width, or another vocabulary: of all shapes
    that differ from `like` in one axis, or before it as the grid tells, the nearest. If
    cells are padded, the largest that fits.
    """
    *grid, blocks, width = state.codes
    block, rest = divmod(width * 8, asked.bits)
    if rest or not blocks or len(grid) != len(like) or not _same_density(state, asked):
        return None
    found = []
    for axis in reversed(range(len(grid))):
        for lead in (like[:axis], tuple(grid[:axis])):
            others = lead + like[axis + 1 :]
            cuts = grid[:axis] + grid[axis + 1 :]
            if any(map(operator.mod, others, cuts)) or not math.prod(others):
                continue
            inner = math.prod(map(operator.floordiv, others, cuts))
            size = blocks * block // inner
            if size and block_of(size * inner, blocks) == block:
                found.append((*lead, grid[axis] * size, *like[axis + 1 :]))
    if like in found:
        return None
    differing = [sum(map(operator.ne, shape, like)) for shape in found]
    return min(zip(differing, found, strict=True), default=(0, None))[1]


def _same_density(state: LeafState, asked: Form) -> bool:
    """Whether a state has as many entries as in a form, up to their rounding."""
    if asked.k is None or state.indices is None:
        return asked.k is None and state.indices is None
    block = state.codes[-1] * 8 // asked.bits
    k, rest = divmod(state.indices[-1], asked.window - 1)
    return not rest and abs(k * asked.block - asked.k * block) <= max(block, asked.block)
