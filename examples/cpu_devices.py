"""Several devices made of one CPU, and parameters divided among devices."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "fsdp"


def use_cpu_devices(number: int) -> None:
    """Makes several devices of the CPU; before the first array, without effect on GPUs.

    XLA may run two collectives that do not depend on each other in another order on each
    device, and then they wait for each other without end; not with this scheduler.
    """
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
    jax.config.update("jax_num_cpu_devices", number)


def make_mesh(number: int) -> Mesh:
    """Of so many devices; ValueError if there are fewer."""
    devices = jax.devices()
    if len(devices) < number:
        raise ValueError(
            f"{number} devices are wanted and there are {len(devices)} of the kind "
            f"{devices[0].platform}; with JAX_PLATFORMS=cpu they are made of the CPU"
        )
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((number,), (AXIS,), kinds, devices=devices[:number])


def placer(mesh: Mesh | None) -> Callable[[str, np.ndarray], jax.Array]:
    """Puts a named parameter on the mesh, or without a copy of its own on one device.

    Divided is its largest axis that can be, but that of stacked layers.
    """

    def place(name: str, array: np.ndarray) -> jax.Array:
        if mesh is None:
            return jnp.asarray(array)
        first = 1 if name.startswith("layers/") else 0
        axes = [i for i in range(first, array.ndim) if array.shape[i] % mesh.size == 0]
        axis = max(axes, key=lambda i: array.shape[i], default=None)
        spec = P() if axis is None else P(*[None] * axis, AXIS)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return place


def of_rows(batch: int, mesh: Mesh) -> NamedSharding:
    """Of a batch: divided if that is even, else whole on every device."""
    return NamedSharding(mesh, P(AXIS) if batch % mesh.size == 0 else P())
