"""The update of blocks on CPUs: the loops of `cpu_block.py`, called by XLA.

Nothing here imports numba, which compiles them, before an update is traced.
"""

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microadam_optax import _blocks
from microadam_optax._kernels import _ffi
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated
from microadam_optax._state import Settings

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot run in this process; None if it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"the platform {sys.platform}"
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return f"an installation without numba (`microadam-optax[cpu]`): {error}"
    return None


@functools.cache
def missing() -> str | None:
    """What of this jax's FFI has changed; None where the kernel is not used anyway."""
    return None if unavailable() else _ffi.reason_against(_ffi.header())


def reason_against(layout: _blocks.Layout, dtype: Any, settings: Settings) -> str | None:
    """Why the kernel cannot update a leaf; None if it can."""
    del layout, settings  # blocks and windows of all sizes
    name = str(jnp.dtype(dtype))
    return None if name in _DTYPES else f"gradients of {name}"


def update(old: Rows, scalars: Scalars, launch: Launch) -> Updated:
    """One step of all rows, in place if `old` is donated."""
    from microadam_optax._kernels import cpu_handlers

    arrays, tree = jax.tree.flatten(old)
    slots = 0 if old.indices is None else old.indices.shape[-1] // launch.k
    rows = old.codes.size // old.codes.shape[-1]
    numbers = (
        launch.cell,
        launch.blocks,
        launch.block,
        launch.bits,
        launch.k,
        slots,
        rows,
    )
    call = jax.ffi.ffi_call(
        cpu_handlers.target(str(old.gradient.dtype)),
        [jax.typeof(x) for x in arrays],
        input_output_aliases={i: i for i in range(len(arrays))},
    )
    new = call(
        *arrays,
        *jax.tree.leaves(scalars),
        alpha=np.array([launch.alpha, 1 - launch.alpha], np.float32),
        launch=np.array(numbers, np.int64),
    )
    return Updated(*jax.tree.unflatten(tree, new))
