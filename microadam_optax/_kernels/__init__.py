"""The whole update of a leaf in one kernel, where the platform has one.

`update` takes the place of `_xla.update`; nothing else in the package knows about
kernels, and without this folder it works as before.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from microadam_optax import _blocks, _moments
from microadam_optax._blocks import Layout
from microadam_optax._kernels import _lowering
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated
from microadam_optax._state import LeafState, Settings
from microadam_optax._step import Step, share

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
    platform: str, layout: Layout, dtype: Any, settings: Settings
) -> str | None:
    """Why the kernel of a platform cannot update a leaf; None if it can."""
    return missing(platform) or _module(platform).reason_against(layout, dtype, settings)


def update(
    platform: str,
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    *,
    layout: Layout,
    settings: Settings,
    steps: int = 0,
    partitioned: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, LeafState]:
    """One step of a leaf.

    Args:
      platform: one of `PLATFORMS`.
      gradient: in the leaf's own shape.
      old: the state of the leaf.
      step: scalars of the step.
      layout: of the leaf.
      settings: static numbers.
      steps: how many of the first axes of the grid, and of all in `step`, count leaves
        that have a step each.
      partitioned: whether XLA partitions the program.
      interpret: to run the kernel in Pallas's interpreter, on any platform.

    Returns:
      The update and the new state, written over the gradient and the old state if these
      are donated.
    """
    gradient, k = share(gradient, step), settings.k(layout.block)
    scalars = functools.partial(_scalars, k=k if settings.window > 1 else None)
    for _ in range(steps):
        scalars = jax.vmap(scalars)
    launch = Launch(
        layout.cell,
        layout.blocks,
        layout.block,
        settings.bits,
        k,
        interpret,
        settings.alpha,
    )
    in_place = platform == "cpu" and not partitioned and _blocks.contiguous(layout)
    cells = gradient if in_place else _cells(gradient, layout)
    rows = Rows(cells, *old)
    if partitioned:
        new = _update_partitioned(rows, scalars(step), platform, launch, steps)
    else:
        new = _update_local(rows, scalars(step), platform, launch)
    update, *state = new
    if not in_place:
        update = _blocks.join(update.reshape(*layout.grid, layout.cell), layout)
    return update, LeafState(*state)


def _cells(gradient: jax.Array, layout: Layout) -> jax.Array:
    """Cells in blocks, or each in one if it is padded."""
    inner = (1, layout.cell) if layout.padded else (layout.blocks, layout.block)
    return _blocks.split(gradient, layout).reshape(*layout.grid, *inner)


def _scalars(step: Step, k: int | None) -> Scalars:
    root = _moments.inside_root(step.eps_root, step.debias_nu)
    factors = jnp.stack([step.debias_mu, step.debias_nu, step.eps, root])
    if k is None:
        return Scalars(factors, None, None)
    ages = step.ages.astype(jnp.float32)
    weights = jnp.stack([jnp.power(decay, ages) for decay in (step.b1, step.b2)])
    return Scalars(factors, _moments.oldest_start(step.ages, k)[None], weights)


def _update_partitioned(
    old: Rows, scalars: Scalars, platform: str, launch: Launch, steps: int
) -> Updated:
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
    f = custom_partitioning(
        functools.partial(_update_shard, rank), static_argnums=(2, 3, 4)
    )
    rows, scalars = _axes(rank, alone, windowed)
    f.def_partition(
        partition=functools.partial(_partition, rank),
        decode_shardings=False,
        sharding_rule=f"{rows}, {scalars} -> {rows}",
        need_replication_factors=tuple(
            x for x in "pcbnreofsmw" if f" {x}" in f" {rows}, {scalars}"
        ),
    )
    return f


def _axes(rank: int, alone: bool, windowed: bool) -> tuple[str, str]:
    """Letters that name axes: blocks, cells, the blocks' bytes, ranges and entries."""
    grid = "".join(f"g{i} " for i in range(rank))
    own = ["p c", "b n", "b r"] + ["b e", "b e"] * windowed
    numbers = ["f", "s", "m w"]
    if not alone:
        numbers = [f"{grid}{x}" for x in ("o f", "o s", "m w")]
    rows = ", ".join(grid + axes for axes in own)
    return rows, ", ".join(numbers if windowed else numbers[:1])


def _update_shard(
    rank: int, old: Rows, scalars: Scalars, platform: str, launch: Launch, steps: int
) -> Updated:
    # What one device has is on no mesh, also where the program's is explicit.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        if steps:
            scalars = _gather(scalars, rank, steps)
        return _update_local(old, scalars, platform, launch)


def _partition(
    rank: int,
    platform: str,
    launch: Launch,
    steps: int,
    mesh: Any,
    args: Any,
    result: Any,
) -> Any:
    """XLA proposes a sharding for each array, in which any axis may be sharded."""
    old, scalars = args
    everywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    own, codes = old.codes.sharding, old.codes.shape
    if own.shard_shape(codes)[rank:] != codes[rank:]:
        own = everywhere
    old, result = (jax.tree.map(lambda _: own, x) for x in (old, result))
    scalars = jax.tree.map(lambda _: own if steps else everywhere, scalars)
    local = functools.partial(
        _update_shard, rank, platform=platform, launch=launch, steps=steps
    )
    return mesh, local, result, (old, scalars)


def _spread(scalars: Scalars, grid: tuple[int, ...], steps: int) -> Scalars:
    """Scalars that lead with the first axes of a grid, in every cell of it."""
    return jax.tree.map(functools.partial(_spread_one, grid, steps), scalars)


def _spread_one(grid: tuple[int, ...], steps: int, x: jax.Array) -> jax.Array:
    own = (1, *x.shape[steps:])[-2:]
    lead = (*x.shape[:steps], *(1 for _ in grid[steps:]))
    return jnp.broadcast_to(x.reshape(*lead, *own), (*grid, *own))


def _gather(scalars: Scalars, rank: int, steps: int) -> Scalars:
    """The inverse of `_spread`, of a part of the grid."""
    first = (*(slice(None) for _ in range(steps)), *(0 for _ in range(rank - steps)))
    new = jax.tree.map(lambda x: x[first], scalars)
    start = None if new.start is None else new.start[..., 0, :]
    return Scalars(new.factors[..., 0, :], start, new.weights)


def _update_local(old: Rows, scalars: Scalars, platform: str, launch: Launch) -> Updated:
    """One step of what one device has of a leaf."""
    if scalars.factors.ndim > 1:  # of leaves that have a step each
        one = functools.partial(_update_local, platform=platform, launch=launch)
        return lax.map(lambda x: one(*x), (old, scalars))
    padded = launch.cell != launch.blocks * launch.block
    if not padded and platform != "tpu":
        launch = launch._replace(cell=launch.block, blocks=1)
    if platform == "cpu":  # where XLA would copy what is reshaped and written in place
        return _module(platform).update(old, scalars, launch)
    if platform == "tpu":
        return _update_padded(old, scalars, launch, padded)
    return _update_rows(old, scalars, platform, launch)


def _update_padded(old: Rows, scalars: Scalars, launch: Launch, padded: bool) -> Updated:
    """On TPUs, whose kernel takes whole rows, and no float16."""
    cells = old.gradient
    rows = _blocks.pad(cells, launch.blocks, launch.block) if padded else cells
    if rows.dtype == jnp.float16:
        rows = rows.astype(jnp.float32)
    new = _update_rows(old._replace(gradient=rows), scalars, "tpu", launch)
    update = new.update.astype(cells.dtype)
    if padded:
        update = _blocks.unpad(update, launch.cell)
    return new._replace(update=update)


def _update_rows(old: Rows, scalars: Scalars, platform: str, launch: Launch) -> Updated:
    """All rows as one axis, as kernels of Pallas want them."""
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), old)
    kernel = functools.partial(_module(platform).update, launch=launch)
    new = _lowering.quietly(kernel, flat, scalars)
    return Updated(*jax.tree.map(lambda x, like: x.reshape(like.shape), new, old))


def _module(platform: str) -> Any:
    return importlib.import_module(f"{__name__}.{PLATFORMS[platform]}")
