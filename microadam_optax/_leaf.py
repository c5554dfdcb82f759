"""The update of one leaf: Algorithm 1, a line of code to a line of the paper."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax import (
    _blocks,
    _chunks,
    _dispatch,
    _moments,
    _quantize,
    _specs,
    _topk,
    _window,
)
from microadam_optax._state import LeafState, Settings

PRNG = "threefry2x32"  # of stochastic rounding, whatever JAX's default is


class Step(NamedTuple):
    """The scalars that all blocks of a leaf share at one step."""

    count: jax.Array  # type: ignore[assignment]  # int32, 1 at the first step
    ages: Any  # int32 (window - 1,), None at window 1
    b1: jax.Array  # float32, like b2, eps and eps_root
    b2: jax.Array
    eps: jax.Array
    eps_root: jax.Array
    key: jax.Array | None  # a PRNG key for stochastic rounding
    debias_mu: Any = None  # float32, what the sums of a leaf are multiplied by
    debias_nu: Any = None


class Leaf(NamedTuple):
    """A leaf's gradient, or update, and its state, in rows of blocks."""

    gradient: jax.Array  # (*grid, blocks, block)
    codes: jax.Array  # uint8 (*grid, blocks, block * bits / 8)
    ranges: jax.Array  # bfloat16 (*grid, blocks, 2)
    indices: Any  # unsigned (*grid, blocks, (window - 1) * k)
    values: Any  # bfloat16, like indices; both None at window 1
    rows: jax.Array | None  # uint32 (*grid, blocks, 1) to tell blocks apart

    @property
    def state(self) -> LeafState:
        return LeafState(self.codes, self.ranges, self.indices, self.values)


def update_blocks(leaf: Leaf, step: Step, settings: Settings) -> Leaf:
    """One step of every block, the seam where a fused kernel takes over.

    Args:
      leaf: gradient and state of any number of blocks. What pads a block has a
        gradient of 0, and so no error either.
      step: scalars of the step.
      settings: static numbers.

    Returns:
      The update in the gradient's place and dtype, new codes and ranges, and the
      ``k`` new entries of each row (not the whole window) as indices and values.
    """
    window, bits, alpha = settings.window, settings.bits, settings.alpha
    block = leaf.codes.shape[-1] * 8 // bits
    k = settings.k(block)
    noise = functools.partial(_noise, step.key, leaf.rows, block)

    error = _quantize.dequantize(leaf.codes, leaf.ranges, bits)
    accumulated = _moments.bounded(_float32(leaf.gradient) + error)
    selected = _topk.largest(accumulated, k)
    newest = jnp.where(selected, _moments.reduced(accumulated, 7), 0)
    # What is stored as codes has no derivative, nor do the steps between them.
    rest = jnp.where(selected, 0, lax.stop_gradient(accumulated))
    codes, ranges = _quantize.quantize(rest, bits, noise(0))
    if window == 1:
        indices = values = None
        mu, nu = newest, newest**2
    else:
        indices = _topk.positions(selected, k)
        values = jnp.take_along_axis(newest, indices, -1, mode="promise_in_bounds")
        mu, nu = _moments.moments(
            newest, leaf.indices, leaf.values, step.ages, step.b1, step.b2
        )
        indices = indices.astype(leaf.indices.dtype)
        values = values.astype(leaf.values.dtype)
    mu *= step.debias_mu
    nu = (nu + _moments.before(step.eps_root, step.debias_nu)) * step.debias_nu
    update = _moments.ratio(mu, nu, step.eps)
    if alpha:
        error = _quantize.dequantize(codes, ranges, bits)
        update += _moments.rounded(alpha * error)
        rest = lax.reduce_precision((1 - alpha) * error, 8, 15)
        codes, ranges = _quantize.quantize(rest, bits, noise(1))
    update = _moments.cast(update, leaf.gradient.dtype)
    return Leaf(update, codes, ranges, indices, values, leaf.rows)


@functools.partial(jax.jit, static_argnames=("at", "settings"))
def update_leaf(
    leaf: Leaf, step: Step, after: jax.Array, *, at: _blocks.Layout, settings: Settings
) -> tuple[Leaf, jax.Array]:
    """One step of a leaf whose gradient has its own shape, not that of blocks.

    Jitted by itself, so that leaves of equal shapes are traced once. `after` is what
    the update of another leaf returned beside it, see `_chunks.in_chunks`.
    """
    step = debiased(step, at, settings)
    update = functools.partial(_dispatch.update, by_xla, at, settings)
    manual = _specs.varying((leaf, step))
    leaf, step = _specs.vary((leaf, step), manual)
    if not _specs.varying(after) <= manual:
        after = step.count  # waiting for it, this leaf would vary as well
    after = _specs.vary(after, manual)
    if not _specs.in_types(leaf.codes):
        return update(leaf, step, after)
    # On an explicit mesh: the types say where each array is, XLA does the rest.
    own = jax.typeof(leaf.gradient).sharding
    cells = _specs.of_cells(leaf.codes, len(at.grid))
    leaf = leaf._replace(gradient=jax.sharding.reshard(leaf.gradient, cells))
    types = jax.tree.map(lambda x: jax.typeof(x).sharding, leaf)
    replicated = jax.sharding.NamedSharding(cells.mesh, jax.P())
    update = jax.sharding.auto_axes(update, out_sharding=(types, replicated))
    leaf, after = update(leaf, step, after)
    if not own.mesh.empty:
        leaf = leaf._replace(gradient=jax.sharding.reshard(leaf.gradient, own))
    return leaf, after


def by_xla(
    leaf: Leaf, step: Step, after: jax.Array, at: _blocks.Layout, settings: Settings
) -> tuple[Leaf, jax.Array]:
    """`update_leaf` in operations of XLA."""
    cells = _blocks.split(leaf.gradient, at)
    if not at.padded:
        cells = cells.reshape(*at.grid, at.blocks, at.block)
    rows = None
    if step.key is not None:
        lead = (*at.grid, at.blocks, 1)
        rows = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    leaf = leaf._replace(gradient=cells, rows=rows)

    axes = range(len(at.grid) + (not at.padded))
    blocks = at.blocks if at.padded else None
    plan = functools.partial(_chunks.plan, cells.shape, axes, _specs.devices(), blocks)
    cut, on_gpus = plan(), plan(elements=_chunks.ELEMENTS_ON_GPUS)

    def pad(leaf: Leaf) -> Leaf:
        rows = _blocks.pad(leaf.gradient, leaf.codes.shape[-2], at.block)
        return leaf._replace(gradient=rows)

    def unpad(leaf: Leaf, like: Leaf) -> Leaf:
        cell = like.gradient.shape[-1]
        return leaf._replace(gradient=_blocks.unpad(leaf.gradient, cell))

    def whole(leaf: Leaf, step: Step, after: jax.Array) -> tuple[Leaf, jax.Array]:
        new = update_blocks(pad(leaf) if at.padded else leaf, step, settings)
        new = unpad(new, leaf) if at.padded else new
        return _chunks.write(leaf, new, _starts(leaf, step.ages)), after

    def in_chunks(
        cut: _chunks.Cut, leaf: Leaf, step: Step, after: jax.Array
    ) -> tuple[Leaf, jax.Array]:
        f = functools.partial(update_blocks, step=step, settings=settings)
        starts = _starts(leaf, step.ages)
        fence = functools.partial(_chunks.fence, always=step.count >= 0)

        def piece(leaf: Leaf) -> Leaf:
            # The window is read and written in places that XLA sees no order between,
            # and padding would otherwise be part of every loop over the block.
            leaf = leaf._replace(**fence(leaf.state._asdict()))
            if not at.padded:
                return f(leaf)
            new = f(pad(leaf))
            return unpad(new._replace(gradient=fence(new.gradient)), leaf)

        units = jax.tree.map(lambda _: 1, leaf)
        if cut.axis == len(at.grid) and at.padded:
            units = units._replace(gradient=at.block)
        return _chunks.in_chunks(piece, leaf, starts, units, cut, after)

    def in_pieces(cut: _chunks.Cut) -> Callable:
        if cut.pieces == 1:
            return whole
        return derived_as(whole, functools.partial(in_chunks, cut))

    if cut.pieces > 1:
        gpu = in_pieces(on_gpus)
        leaf, after = lax.platform_dependent(
            leaf, step, after, cuda=gpu, rocm=gpu, default=in_pieces(cut)
        )
    else:
        leaf, after = whole(leaf, step, after)
    update = _blocks.join(leaf.gradient.reshape(*at.grid, at.cell), at)
    return leaf._replace(gradient=update, rows=None), after


def derived_as(g: Callable, f: Callable) -> Callable:
    """`f` with the derivatives of `g`, which computes the same in another way."""
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: jax.jvp(g, primals, tangents))
    return f


def debiased(step: Step, at: _blocks.Layout, settings: Settings) -> Step:
    """The step with what a leaf's sums are multiplied by."""
    b1, b2, count = step.b1, step.b2, step.count
    if settings.match_adam:
        share = at.share(settings.k(at.block))
        both = _moments.normalizers(b1, b2, count, settings.window, share)
    else:
        both = _moments.debias(b1, count), _moments.debias(b2, count)
    return step._replace(debias_mu=both[0], debias_nu=both[1])


def for_leaf(step: Step, number: int) -> Step:
    """The step with a PRNG key of its own for a leaf."""
    if step.key is None:
        return step
    return step._replace(key=jax.random.fold_in(step.key, number))


def _starts(leaf: Leaf, ages: jax.Array | None) -> Leaf:
    """Where on the last axis the results of `update_blocks` go."""
    starts: Any = jax.tree.map(lambda _: 0, leaf)
    if ages is None:
        return starts
    slot = _window.start(ages, leaf.indices.shape[-1] // ages.size)
    return starts._replace(indices=slot, values=slot)


def _float32(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.float64:  # holds finite numbers that float32 does not
        x = _moments.bounded(x)
    return x.astype(jnp.float32)


def _noise(
    key: jax.Array | None, rows: jax.Array | None, block: int, draw: int
) -> jax.Array | None:
    """Uniform float32 in [0, 1) for each element; the same however rows are cut."""
    if key is None or rows is None:
        return None
    key = jax.random.fold_in(key, draw)

    def uniform(row: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, row), (block,), jnp.float32)

    return jnp.vectorize(uniform, signature="()->(b)")(rows[..., 0])
