"""The whole update of a leaf in one kernel, where the platform has one.

`update` takes the place of `_leaf.update_blocks` and what is around it; nothing else
in the package knows about kernels, and without this folder it works as before.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from microadam_optax import _blocks, _moments, _window
from microadam_optax._kernels import _lowering
from microadam_optax._kernels._rows import Launch, Rows, Scalars
from microadam_optax._state import Settings

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # and the modules of kernels


def missing(platform: str) -> str | None:
    """What this jax lacks, or has in another form, for a kernel; None if nothing."""
    try:
        return _module(platform).missing()
    except ImportError as error:
        return f"jax {jax.__version__}, without what the kernel is written in: {error}"


def unavailable(platform: str) -> str | None:
    """Why the kernel of a platform cannot be used here; None if it can."""
    return missing(platform) or _module(platform).unavailable()


def reason_against(
    platform: str, at: _blocks.Layout, dtype: Any, settings: Settings, stochastic: bool
) -> str | None:
    """Why the kernel of a platform cannot update a leaf; None if it can."""
    if stochastic:
        return "`stochastic_rounding`"
    return missing(platform) or _module(platform).reason_against(at, dtype, settings)


def update(
    platform: str,
    leaf: Any,
    step: Any,
    *,
    at: _blocks.Layout,
    settings: Settings,
    steps: int = 0,
    partitioned: bool = True,
    interpret: bool = False,
) -> Any:
    """One step of a leaf.

    Args:
      platform: one of `PLATFORMS`.
      leaf: `_leaf.Leaf` with the gradient in its own shape.
      step: `_leaf.Step`.
      at: layout of the leaf.
      settings: static numbers.
      steps: how many of the first axes of the grid, and of all in `step`, count leaves
        that have a step each.
      partitioned: whether XLA partitions the program.
      interpret: to run the kernel in Pallas's interpreter, on any platform.

    Returns:
      The update in the gradient's place and the new state, written over the old if
      that is donated.
    """
    windowed, k = settings.window > 1, settings.k(at.block)
    scalars = functools.partial(_scalars, k=k if windowed else None)
    for _ in range(steps):
        scalars = jax.vmap(scalars)
    launch = Launch(
        at.cell, at.blocks, at.block, settings.bits, k, interpret, settings.alpha
    )
    cells = leaf.gradient
    if partitioned or platform != "cpu" or not _blocks.contiguous(at):
        inner = (1, at.cell) if at.padded else (at.blocks, at.block)
        cells = _blocks.split(cells, at).reshape(*at.grid, *inner)
    old = Rows(cells, leaf.codes, leaf.ranges, leaf.indices, leaf.values)
    if partitioned:
        new = _update_partitioned(old, scalars(step), platform, launch, steps)
    else:
        new = _update_local(old, scalars(step), platform, launch)
    update = new.gradient
    if cells is not leaf.gradient:
        update = _blocks.join(update.reshape(*at.grid, at.cell), at)
    return leaf._replace(**new._replace(gradient=update)._asdict())


def _scalars(step: Any, k: int | None) -> Scalars:
    root = _moments.before(step.eps_root, step.debias_nu)
    factors = jnp.stack([step.debias_mu, step.debias_nu, step.eps, root])
    if k is None:
        return Scalars(factors, None, None)
    ages = step.ages.astype(jnp.float32)
    weights = jnp.stack([jnp.power(decay, ages) for decay in (step.b1, step.b2)])
    return Scalars(factors, _window.start(step.ages, k)[None], weights)


def _update_partitioned(
    old: Rows, scalars: Scalars, platform: str, launch: Launch, steps: int
) -> Rows:
    """`_update_local` in a program that XLA partitions: each device runs its own.

    All arrays of the leaf lead with the grid, have two axes more, and may be sharded
    along the grid; so do the scalars where there are several `steps`.
    """
    rank = old.codes.ndim - 2
    if steps:
        scalars = _spread(scalars, old.codes.shape[:rank], steps)
    f = _partitioned(rank, alone=not steps, windowed=old.indices is not None)
    return f(old, scalars, platform, launch, steps)


@functools.cache
def _partitioned(rank: int, *, alone: bool, windowed: bool) -> Any:
    def update(
        old: Rows, scalars: Scalars, platform: str, launch: Launch, steps: int
    ) -> Rows:
        # What one device has is on no mesh, also where the program's is explicit.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            if steps:
                scalars = _gather(scalars, rank, steps)
            return _update_local(old, scalars, platform, launch)

    def partition(
        platform: str, launch: Launch, steps: int, mesh: Any, args: Any, result: Any
    ) -> Any:
        # XLA proposes a sharding for each array, and any axis may be sharded.
        old, scalars = args
        everywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        own, codes = old.codes.sharding, old.codes.shape
        if own.shard_shape(codes)[rank:] != codes[rank:]:
            own = everywhere
        old, result = (jax.tree.map(lambda _: own, x) for x in (old, result))
        scalars = jax.tree.map(lambda _: own if steps else everywhere, scalars)
        local = functools.partial(update, platform=platform, launch=launch, steps=steps)
        return mesh, local, result, (old, scalars)

    # Letters name axes: blocks, and cells, the blocks' bytes, ranges and entries.
    grid = "".join(f"g{i} " for i in range(rank))
    own = ["p c", "b n", "b r"] + ["b e", "b e"] * windowed
    rows = ", ".join(grid + axes for axes in own)
    numbers = (
        ["f", "s", "m w"] if alone else [f"{grid}{x}" for x in ("o f", "o s", "m w")]
    )
    scalars = ", ".join(numbers if windowed else numbers[:1])
    f = custom_partitioning(update, static_argnums=(2, 3, 4))
    f.def_partition(
        partition=partition,
        decode_shardings=False,
        sharding_rule=f"{rows}, {scalars} -> {rows}",
        need_replication_factors=tuple(
            x for x in "pcbnreofsmw" if f" {x}" in f" {rows}, {scalars}"
        ),
    )
    return f


def _spread(scalars: Scalars, grid: tuple[int, ...], steps: int) -> Scalars:
    """Scalars that lead with the first axes of a grid, in every cell of it."""

    def spread(x: jax.Array) -> jax.Array:
        own = (1, *x.shape[steps:])[-2:]
        lead = (*x.shape[:steps], *(1 for _ in grid[steps:]))
        return jnp.broadcast_to(x.reshape(*lead, *own), (*grid, *own))

    return jax.tree.map(spread, scalars)


def _gather(scalars: Scalars, rank: int, steps: int) -> Scalars:
    """The inverse of `_spread`, of a part of the grid."""
    first = (*(slice(None) for _ in range(steps)), *(0 for _ in range(rank - steps)))
    new = jax.tree.map(lambda x: x[first], scalars)
    start = None if new.start is None else new.start[..., 0, :]
    return Scalars(new.factors[..., 0, :], start, new.weights)


def _update_local(old: Rows, scalars: Scalars, platform: str, launch: Launch) -> Rows:
    """One step of what one device has of a leaf."""
    if scalars.factors.ndim > 1:  # of leaves that have a step each
        one = functools.partial(_update_local, platform=platform, launch=launch)
        return lax.map(lambda x: one(*x), (old, scalars))
    padded = launch.cell != launch.blocks * launch.block
    dtype, rows = old.gradient.dtype, old.gradient
    if not padded and platform != "tpu":
        launch = launch._replace(cell=launch.block, blocks=1)
    if platform == "cpu":  # where XLA would copy what is reshaped and written in place
        return _module(platform).update(old, scalars, launch)
    if padded and platform == "tpu":
        rows = _blocks.pad(rows, launch.blocks, launch.block)
    if platform == "tpu" and dtype == jnp.float16:
        rows = rows.astype(jnp.float32)  # TPUs have no float16
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), old._replace(gradient=rows))
    kernel = functools.partial(_module(platform).update, launch=launch)
    new = _lowering.quietly(kernel, flat, scalars)
    update = new.gradient.astype(dtype).reshape(rows.shape)
    if padded and platform == "tpu":
        update = _blocks.unpad(update, launch.cell)
    new = new._replace(gradient=update)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, old)


def _module(platform: str) -> Any:
    return importlib.import_module(f"{__name__}.{PLATFORMS[platform]}")
