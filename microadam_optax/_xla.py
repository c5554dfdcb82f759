"""The update of a leaf as XLA compiles it: in blocks, and in pieces if it is large."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax import _blocks, _chunks, _moments, _specs
from microadam_optax._blocks import Layout
from microadam_optax._chunks import Cut
from microadam_optax._state import LeafState, Settings
from microadam_optax._step import Step, update_blocks


class _Leaf(NamedTuple):
    """What is read of a leaf, and what is written over it."""

    gradient_or_update: jax.Array  # in blocks, or in cells where these are padded
    state: LeafState
    numbers: jax.Array | None  # of the blocks, for random rounding


def update(
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    token: jax.Array,
    layout: Layout,
    settings: Settings,
) -> tuple[jax.Array, LeafState, jax.Array]:
    """One step of a leaf in its own shape; see `_chunks.in_chunks` for the token."""
    cells = _blocks.split(gradient, layout)
    if not layout.padded:
        cells = cells.reshape(*layout.grid, layout.blocks, layout.block)
    leaf = _Leaf(cells, old, None if step.prng is None else _numbers(layout, step))

    axes = range(len(layout.grid) + (not layout.padded))
    blocks = layout.blocks if layout.padded else None
    plan = functools.partial(_chunks.plan, cells.shape, axes, _specs.devices(), blocks)
    cut, on_gpus = plan(), plan(elements=_chunks.ELEMENTS_ON_GPUS)
    compute = functools.partial(_compute, layout=layout, settings=settings)
    if cut.pieces == 1:
        leaf, token = compute(cut)(leaf, step, token)
    else:
        gpu = compute(on_gpus)
        leaf, token = lax.platform_dependent(
            leaf, step, token, cuda=gpu, rocm=gpu, default=compute(cut)
        )
    cells = leaf.gradient_or_update.reshape(*layout.grid, layout.cell)
    return _blocks.join(cells, layout), leaf.state, token


def _compute(cut: Cut, layout: Layout, settings: Settings) -> Callable:
    """The function that updates a leaf in these pieces."""
    whole = functools.partial(_whole, layout=layout, settings=settings)
    if cut.pieces == 1:
        return whole
    pieces = functools.partial(_pieces, cut=cut, layout=layout, settings=settings)
    return _derived_as(whole, pieces)


def _derived_as(g: Callable, f: Callable) -> Callable:
    """`f` with the derivatives of `g`, which computes the same in another way."""
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: jax.jvp(g, primals, tangents))
    return f


def _whole(
    leaf: _Leaf, step: Step, token: jax.Array, layout: Layout, settings: Settings
) -> tuple[_Leaf, jax.Array]:
    new = _update_cells(leaf, step, layout, settings)
    return _chunks.write(leaf, new, _starts(leaf, step.ages)), token


def _pieces(
    leaf: _Leaf,
    step: Step,
    token: jax.Array,
    cut: Cut,
    layout: Layout,
    settings: Settings,
) -> tuple[_Leaf, jax.Array]:
    piece = functools.partial(_piece, step=step, layout=layout, settings=settings)
    units = jax.tree.map(lambda _: 1, leaf)
    if cut.axis == len(layout.grid) and layout.padded:
        units = units._replace(gradient_or_update=layout.block)
    starts = _starts(leaf, step.ages)
    return _chunks.in_chunks(piece, leaf, starts, units, cut, token)


def _piece(leaf: _Leaf, step: Step, layout: Layout, settings: Settings) -> _Leaf:
    # The window is read and written in places that XLA sees no order between, and so is
    # the gradient where nothing is selected: the update is 0, whatever the gradient.
    always = step.count >= 0
    if settings.density:
        leaf = leaf._replace(state=_chunks.fence(leaf.state, always))
    else:
        leaf = _chunks.fence(leaf, always)
    return _update_cells(leaf, step, layout, settings)


def _update_cells(leaf: _Leaf, step: Step, layout: Layout, settings: Settings) -> _Leaf:
    """All blocks, with the ``k`` new entries of each instead of the whole window."""
    cells, old, numbers = leaf
    if not layout.padded:
        return _Leaf(*update_blocks(cells, old, step, settings, numbers), numbers)
    rows = _blocks.pad(cells, old.codes.shape[-2], layout.block)
    rows, new = update_blocks(rows, old, step, settings, numbers)
    return _Leaf(_blocks.unpad(rows, cells.shape[-1]), new, numbers)


def _numbers(layout: Layout, step: Step) -> jax.Array:
    """Of all blocks of a leaf, uint32 ``(*grid, blocks, 1)``, by layer if it is one."""
    shape = (*layout.grid, layout.blocks, 1)
    numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    if step.layer is None:
        return numbers
    return numbers + step.layer.astype(jnp.uint32) * math.prod(shape)


def _starts(leaf: _Leaf, ages: jax.Array | None) -> _Leaf:
    """Where on the last axis the results of `_update_cells` go."""
    starts: Any = jax.tree.map(lambda _: 0, leaf)
    if ages is None:
        return starts
    entries = leaf.state.indices.shape[-1]
    start = _moments.oldest_start(ages, entries // ages.size)
    state = starts.state._replace(indices=start, values=start)
    return starts._replace(state=state)
