"""Several devices made of one CPU, and parameters divided among devices."""

import os
from typing import Any

import jax
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


def shardings(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The largest axis that can be divided, but that of stacked layers, over the mesh."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        first = 1 if path[0].key == "layers" else 0
        axes = [i for i in range(first, leaf.ndim) if leaf.shape[i] % mesh.size == 0]
        if not axes:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*[None] * axis, AXIS))

    return jax.tree_util.tree_map_with_path(place, params)


def place(params: dict[str, Any], where: dict[str, Any]) -> None:
    """Puts one array after another in its place, so that few are there twice."""
    for name, sharding in where.items():
        if isinstance(sharding, dict):
            place(params[name], sharding)
        else:
            params[name] = jax.device_put(params[name], sharding)
            params[name].block_until_ready()


def of_rows(batch: int, mesh: Mesh) -> NamedSharding:
    """Of a batch: divided if that is even, else whole on every device."""
    return NamedSharding(mesh, P(AXIS) if batch % mesh.size == 0 else P())
