"""The whole update of a leaf in one kernel, where the platform has one.

`update` takes the place of `_leaf.update_blocks` and what is around it; nothing else
in the package knows about kernels, and without this folder it works as before.
"""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning

from microadam_optax import _blocks, _moments, _window
from microadam_optax._kernels import _lowering
from microadam_optax._kernels._rows import Launch, Rows, Scalars
from microadam_optax._state import Settings

PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}  # and the module with their kernel
_BLOCK, _SELECTED, _ENTRIES = 256, 64, 128  # the largest that the kernels take


def reason_against(
    at: _blocks.Layout, dtype: Any, settings: Settings, stochastic: bool
) -> str | None:
    """Why the kernels cannot update a leaf; None if they can."""
    k = settings.k(at.block)
    rows = math.prod(at.grid) * at.blocks
    limits = {
        "64-bit gradients": jnp.dtype(dtype).itemsize > 4,
        "`alpha` other than 0": settings.alpha,
        "`stochastic_rounding`": stochastic,
        f"blocks of more than {_BLOCK} elements": at.block > _BLOCK,
        f"more than {_SELECTED} selected entries in a block": k > _SELECTED,
        f"more than {_ENTRIES} entries in the window of a block": (
            settings.window * k > _ENTRIES
        ),
        "leaves of 2**31 elements and more": rows * at.block >= 2**31,
    }
    return next((text for text, exceeded in limits.items() if exceeded), None)


def update(
    platform: str,
    leaf: Any,
    step: Any,
    *,
    at: _blocks.Layout,
    settings: Settings,
    interpret: bool = False,
) -> Any:
    """One step of a leaf.

    Args:
      platform: one of `PLATFORMS`.
      leaf: `_leaf.Leaf` with the gradient in cells ``(*grid, cell)``.
      step: `_leaf.Step`.
      at: layout of the leaf.
      settings: static numbers.
      interpret: to run the kernel in Pallas's interpreter, on any platform.

    Returns:
      The update in the gradient's place and the new state, written over the old if
      that is donated.
    """
    debias_mu, debias_nu = (_moments.debias(x, step.count) for x in (step.b1, step.b2))
    root = _moments.before(step.eps_root, debias_nu)
    factors = jnp.stack([debias_mu, debias_nu, step.eps, root])
    scalars = Scalars(factors, None, None)
    k = settings.k(at.block)
    if settings.window > 1:
        start = _window.start(step.ages, k)[None]
        ages = step.ages.astype(jnp.float32)
        weights = jnp.stack([jnp.power(decay, ages) for decay in (step.b1, step.b2)])
        scalars = scalars._replace(start=start, weights=weights)
    launch = Launch(at.cell, at.blocks, at.block, settings.bits, k, interpret)
    f = _partitioned(len(at.grid), windowed=settings.window > 1)
    if not interpret:
        factors = _lowering.only_on(platform, scalars.factors)
        scalars = scalars._replace(factors=factors)
    old = Rows(*(getattr(leaf, name) for name in Rows._fields))
    return leaf._replace(**f(old, scalars, platform, launch)._asdict())


@functools.cache
def _partitioned(rank: int, *, windowed: bool) -> Any:
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
    grid = " ".join(f"g{i}" for i in range(rank))
    own = ["c", "b n", "b r"] + ["b e", "b e"] * windowed
    rows = ", ".join(f"{grid} {axes}" for axes in own)
    scalars = "f, s, m w" if windowed else "f"
    f = custom_partitioning(_update_local, static_argnums=(2, 3))
    f.def_partition(
        partition=partition,
        sharding_rule=f"{rows}, {scalars} -> {rows}",
        need_replication_factors=tuple("cbnrefsmw" if windowed else "cbnrf"),
    )
    return f


def _update_local(old: Rows, scalars: Scalars, platform: str, launch: Launch) -> Rows:
    """One step of what one device has of a leaf."""
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
    kernel = importlib.import_module(f"{__name__}.{PLATFORMS[platform]}")
    kernel_update = functools.partial(kernel.update, launch=launch)
    new = _lowering.quietly(kernel_update, flat, scalars)
    update = new.gradient.astype(dtype).reshape(rows.shape)
    if padded and platform == "tpu":
        update = _blocks.unpad(update, launch.cell)
    new = jax.tree.map(
        lambda x, like: x.reshape(like.shape), new, old._replace(gradient=rows)
    )
    return new._replace(gradient=update.reshape(cells.shape))
