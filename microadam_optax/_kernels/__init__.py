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


def unavailable(platform: str) -> str | None:
    """Why the kernel of a platform cannot be used here; None if it can."""
    return _module(platform).available()


def reason_against(
    platform: str, at: _blocks.Layout, dtype: Any, settings: Settings, stochastic: bool
) -> str | None:
    """Why the kernel of a platform cannot update a leaf; None if it can."""
    if stochastic:
        return "`stochastic_rounding`"
    return _module(platform).reason_against(at, dtype, settings)


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
      leaf: `_leaf.Leaf` with the gradient in cells ``(*grid, cell)``.
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
    f = _update_local
    if partitioned:
        f = _partitioned(len(at.grid), steps, windowed=windowed)
    old = Rows(*(getattr(leaf, name) for name in Rows._fields))
    return leaf._replace(**f(old, scalars(step), platform, launch)._asdict())


def _scalars(step: Any, k: int | None) -> Scalars:
    debias = (_moments.debias(decay, step.count) for decay in (step.b1, step.b2))
    factors = jnp.stack([*debias, step.eps, jnp.zeros_like(step.eps)])
    if k is None:
        return Scalars(factors, None, None)
    ages = step.ages.astype(jnp.float32)
    weights = jnp.stack([jnp.power(decay, ages) for decay in (step.b1, step.b2)])
    return Scalars(factors, _window.start(step.ages, k)[None], weights)


@functools.cache
def _partitioned(rank: int, steps: int, *, windowed: bool) -> Any:
    """`_update_local`, where XLA partitions the program: each device runs its own.

    All arrays lead with the grid, and may be sharded along that.
    """

    def partition(
        platform: str, launch: Launch, mesh: Any, args: Any, result: Any
    ) -> Any:
        def local(old: Rows, scalars: Scalars) -> Rows:
            # What one device has is on no mesh, also where the program's is explicit.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return _update_local(old, scalars, platform, launch)

        shardings = (jax.tree.map(lambda x: x.sharding, tree) for tree in (result, args))
        return mesh, local, *shardings

    # Letters name axes: cells, the blocks in a cell, their bytes, ranges and entries.
    axes = [f"g{i} " for i in range(rank)]
    grid, first = "".join(axes), "".join(axes[:steps])
    own = ["c", "b n", "b r"] + ["b e", "b e"] * windowed
    rows = ", ".join(grid + names for names in own)
    numbers = ["f", "s", "m w"] if windowed else ["f"]
    scalars = ", ".join(first + names for names in numbers)
    f = custom_partitioning(_update_local, static_argnums=(2, 3))
    f.def_partition(
        partition=partition,
        sharding_rule=f"{rows}, {scalars} -> {rows}",
        need_replication_factors=tuple("cbnrefsmw" if windowed else "cbnrf"),
    )
    return f


def _update_local(old: Rows, scalars: Scalars, platform: str, launch: Launch) -> Rows:
    """One step of what one device has of a leaf."""
    if scalars.factors.ndim > 1:  # of leaves that have a step each
        one = functools.partial(_update_local, platform=platform, launch=launch)
        return lax.map(lambda x: one(*x), (old, scalars))
    padded = launch.cell != launch.blocks * launch.block
    dtype, cells = old.gradient.dtype, old.gradient
    if padded and platform == "tpu":
        rows = _blocks.pad(cells, launch.blocks, launch.block)
    elif padded:
        rows = cells
    else:
        rows = cells.reshape(*old.codes.shape[:-1], launch.block)
        if platform != "tpu":
            launch = launch._replace(cell=launch.block, blocks=1)
    if platform == "tpu" and dtype == jnp.float16:
        rows = rows.astype(jnp.float32)  # TPUs have no float16
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), old._replace(gradient=rows))
    kernel = functools.partial(_module(platform).update, launch=launch)
    new = _lowering.quietly(kernel, flat, scalars)
    update = new.gradient.astype(dtype).reshape(rows.shape)
    if padded and platform == "tpu":
        update = _blocks.unpad(update, launch.cell)
    new = jax.tree.map(
        lambda x, like: x.reshape(like.shape), new, old._replace(gradient=rows)
    )
    return new._replace(gradient=update.reshape(cells.shape))


def _module(platform: str) -> Any:
    return importlib.import_module(f"{__name__}.{PLATFORMS[platform]}")
