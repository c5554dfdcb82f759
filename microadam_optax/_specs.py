"""What a leaf's sharding means for its state: the same, less what does not divide."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def fit(spec: PartitionSpec, mesh: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec without the mesh axes that do not divide an array of that shape.

    Of several mesh axes on one array axis the first ones stay.
    """
    sizes = dict(mesh.shape)
    fitted = []
    for size, names in zip(shape, spec, strict=False):
        kept: list[Any] = []
        if names is not None and names is not PartitionSpec.UNCONSTRAINED:
            for axis in names if isinstance(names, tuple) else (names,):
                if size % math.prod(sizes[other] for other in (*kept, axis)):
                    break
                kept.append(axis)
        fitted.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
    return PartitionSpec(*fitted)


def follow(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """The sharding of an array of the state that leads with a leaf's axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = fit(sharding.spec, sharding.mesh, shape)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def is_offloaded(sharding: Sharding | None) -> bool:
    """Whether it names other memory than a device's own, where nothing is computed."""
    return getattr(sharding, "memory_kind", None) not in (None, "device")


def on_device(sharding: Sharding | None) -> Sharding | None:
    """The same in the memory of the devices."""
    if sharding is None or not is_offloaded(sharding):
        return sharding
    return sharding.with_memory_kind("device")


def of(leaf: Any) -> Sharding | None:
    """The sharding of a leaf as far as it is known and asked for, else None."""
    if isinstance(leaf, jax.core.Tracer):
        here = jax.sharding.get_abstract_mesh()
        return jax.typeof(leaf).sharding if here.explicit_axes else None
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def of_scalars(leaves: Sequence[Any]) -> Sharding | None:
    """Where what all leaves share belongs, if these are arrays on the same devices."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    found = [of(leaf) for leaf in leaves]
    known = [x for x in found if x is not None]
    if not known or len(known) < len(found):
        return None
    same = all(x.device_set == known[0].device_set for x in known)
    return follow(known[0], ()) if same else None


def in_types(x: jax.Array) -> bool:
    """Whether the type of an array tells its sharding: it is on an explicit mesh."""
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def of_cells(array: jax.Array, rank: int) -> NamedSharding:
    """The sharding of a leaf whose grid is sharded like an array of its state."""
    sharding = jax.typeof(array).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:rank]))


def varying(tree: Any) -> frozenset[Any]:
    """Mesh axes over which any of the arrays varies, inside `jax.shard_map`."""
    axes = (jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The arrays, each of a type that varies over those axes."""

    def cast(x: jax.Array) -> jax.Array:
        return lax.pcast(x, tuple(sorted(axes - varying(x))), to="varying")

    return jax.tree.map(cast, tree)


_layer: contextvars.ContextVar[Any] = contextvars.ContextVar("layer", default=None)


@contextlib.contextmanager
def of_layer(number: Any) -> Iterator[None]:
    """While leaves are one layer of stacked ones, and it has this number."""
    token = _layer.set(number)
    try:
        yield
    finally:
        _layer.reset(token)


def layer() -> Any:
    """The number of the layer that leaves are of, or None."""
    return _layer.get()


def are_parts() -> bool:
    """Whether arrays may be parts of leaves: of a layer, or in a `jax.shard_map`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) or _layer.get() is not None


def devices() -> int:
    """How many devices an array may be sharded over, at most."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size
