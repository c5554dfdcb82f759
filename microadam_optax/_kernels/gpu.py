"""How the kernel of `gpu_block.py` is launched on NVIDIA GPUs, and on which it can be."""

import contextlib
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from microadam_optax._kernels import _rows, gpu_block
from microadam_optax._kernels._rows import Launch, Rows, Scalars, Updated

missing, reason_against = _rows.nothing, _rows.reason_against
OLDEST = 8.0  # compute capability
ELEMENTS = 256  # of a program: eight a thread, in whole rows


def unavailable() -> str | None:
    """Why the kernel cannot run on the GPUs here; None if it can, or if none is here."""
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and not _known(here.abstract_device):
        return f"the devices of this mesh ({here.abstract_device})"
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # the program is for another machine
        return None
    found = min(float(device.compute_capability) for device in devices)  # "9.0"
    return (
        f"GPUs of compute capability {found}, below {OLDEST}" if found < OLDEST else None
    )


def _known(device: Any) -> bool:
    """Whether Pallas lowers a kernel for a device, or for JAX's own if it is None."""
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        try:
            traced = jax.jit(_copy).trace(jax.ShapeDtypeStruct((16,), jnp.float32))
            traced.lower(lowering_platforms=("cuda",))
        except (RuntimeError, ValueError):
            return False
    return getattr(device, "platform", "gpu") == "gpu"


def update(
    old: Rows,
    scalars: Scalars,
    launch: Launch,
    rows: int | None = None,
    warps: int = 1,
) -> Updated:
    """One step of all rows, in place if `old` is donated.

    `rows` and `warps` are those of a program; more rows where they are short, which
    share the instructions for what a row has once.
    """
    rows = rows or max(1, ELEMENTS // pl.next_power_of_2(launch.block))
    kernel = pl.pallas_call(
        functools.partial(gpu_block.update_rows, launch=launch, rows=rows),
        out_shape=(_rows.updated_like(old),),
        grid=(pl.cdiv(old.codes.shape[0], rows),),
        input_output_aliases={i: i for i in range(len(jax.tree.leaves(old)))},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=launch.interpret,
        name="microadam",
    )
    with contextlib.nullcontext() if launch.interpret else _on_a_gpu():
        (new,) = kernel(old, scalars)
    return new


def _on_a_gpu() -> Any:
    """Tells Pallas that the program is for a GPU, of a kind that it knows.

    Else it asks JAX's default device, and fails where that is a CPU. The answer plays no
    part in kernels without 8-bit floats. Within `jax.shard_map` the mesh says it.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    empty = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(empty)


def _copy(x: jax.Array) -> jax.Array:
    """The least that Pallas can lower."""
    params = triton.CompilerParams()
    return pl.pallas_call(_copy_rows, out_shape=x, compiler_params=params)(x)


def _copy_rows(old: Any, new: Any) -> None:
    new[...] = old[...]
