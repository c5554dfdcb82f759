"""One operation that stands for the update of a leaf until a program is lowered.

Only then JAX knows for which platform and devices the program is, and so who computes.
Until then nothing is traced or compiled that is not used, `jax.vmap` gives the operation
leading axes, and its derivatives are those of XLA's path.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from microadam_optax import _dispatch, _xla
from microadam_optax._blocks import Layout
from microadam_optax._state import LeafState, Settings
from microadam_optax._step import Step

Results = tuple[jax.Array, LeafState, jax.Array]  # update, new state, token


class _Call(NamedTuple):
    """What is static of the update of a leaf."""

    layout: Layout
    settings: Settings
    outer: int = 0  # axes that `jax.vmap` has put before the leaf's arrays
    steps: int = 0  # the first of them, along which the steps differ as well


def update(
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    token: jax.Array,
    layout: Layout,
    settings: Settings,
) -> Results:
    """`_xla.update`, or what a kernel makes of the same arguments."""
    return _update(_Call(layout, settings), gradient, old, step, token)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _update(
    call: _Call, gradient: jax.Array, old: LeafState, step: Step, token: jax.Array
) -> Results:
    flat, tree = jax.tree.flatten((gradient, old, token, step))
    results = _update_p.bind(*flat, call=call, tree=tree)
    return jax.tree.unflatten(jax.tree.structure((gradient, old, token)), results)


@_update.defjvp
def _derivative(call: _Call, primals: Any, tangents: Any) -> Any:
    f = functools.partial(_xla.update, layout=call.layout, settings=call.settings)
    return jax.jvp(f, primals, tangents)


_update_p = Primitive("microadam_update")
_update_p.multiple_results = True


@_update_p.def_impl
def _alone(*flat: Any, **static: Any) -> list[Any]:
    """Compiled also under ``jax.disable_jit`` and in the search for a NaN."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_update_p.bind, **static))(*flat)


@_update_p.def_abstract_eval
def _like_inputs(*avals: Any, call: _Call, tree: Any) -> list[Any]:
    del call
    return [x.update(weak_type=False) for x in avals[: _number_updated(tree)]]


def _number_updated(tree: Any) -> int:
    """How many arrays, of all that go in, come out: the leaf's and the token."""
    *updated, _ = tree.children()
    return sum(x.num_leaves for x in updated)


def _batch(
    flat: Sequence[Any], axes: Sequence[Any], *, call: _Call, tree: Any
) -> tuple[list[Any], list[Any]]:
    """The new axis goes before the leaf's; steps get it if one of them has it."""
    size = next(
        x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None
    )
    leaves = _number_updated(tree) - 1
    differ = any(axis is not None for axis in axes[leaves:])
    to = 0 if differ else call.steps
    call = call._replace(outer=call.outer + 1, steps=call.steps + differ)
    moved = len(flat) if differ else leaves
    pairs = zip(flat[:moved], axes[:moved], strict=True)
    flat = [*(_moved(x, axis, to, size) for x, axis in pairs), *flat[moved:]]
    results = _update_p.bind(*flat, call=call, tree=tree)
    return results, [to] * leaves + [0 if differ else None]


def _moved(x: Any, axis: int | None, to: int, size: int) -> Any:
    """With the axis moved, or, if it has none, repeated along a new one."""
    if axis is not None:
        return jnp.moveaxis(x, axis, to)
    shape = (*x.shape[:to], size, *x.shape[to:])
    return jnp.broadcast_to(jnp.expand_dims(x, to), shape)


batching.primitive_batchers[_update_p] = _batch


def _lower(ctx: Any, *flat: Any, call: _Call, tree: Any) -> Any:
    """XLA's path or a kernel's, as operations of the program."""
    module = ctx.module_context
    partitioned, context = _partitioning(module.axis_context)
    # What is exported must run elsewhere and later. JAX does not say so to the public.
    foreign = getattr(module.lowering_parameters, "for_export", True) or context is None
    platforms = tuple(ctx.platforms or module.platforms)
    dtype = ctx.avals_in[0].dtype
    chosen = _dispatch.choose(platforms, foreign, call.layout, dtype, call.settings)
    if any(chosen.values()) and partitioned and context is not None:
        ctx = ctx.replace(module_context=module.replace(axis_context=context))
    f = functools.partial(_by_platform, chosen, partitioned, call, tree)
    return mlir.lower_fun(f, multiple_results=True)(ctx, *flat)


mlir.register_lowering(_update_p, _lower)


def _partitioning(context: Any) -> tuple[bool, Any]:
    """Whether XLA partitions the program, and JAX's context for that.

    The context is None if a kernel could not be part of it.
    """
    if hasattr(context, "manual_axes"):  # in a shard_map
        sizes = {x: n for x, n in context.mesh.shape.items() if n > 1}
        auto = sizes.keys() - set(context.manual_axes)
        abstract = isinstance(context.mesh, jax.sharding.AbstractMesh)
        return bool(auto), None if auto and abstract else context
    number = getattr(context, "num_devices", None)
    if number is None:
        return True, None
    # JAX wants to know the devices to partition for, but only their number matters.
    devices = itertools.repeat(jax.local_devices()[0], number)
    return number > 1, dataclasses.replace(context, device_assignment=tuple(devices))


def _by_platform(
    chosen: dict[str, str | None], partitioned: bool, call: _Call, tree: Any, *flat: Any
) -> list[Any]:
    """The results of who was chosen, where several were by the platform it runs on."""
    args = jax.tree.unflatten(tree, flat)
    branches = {
        platform: functools.partial(_compute, kernel, partitioned, call)
        for platform, kernel in chosen.items()
    }
    if len(set(chosen.values())) == 1:
        return jax.tree.leaves(next(iter(branches.values()))(*args))
    return jax.tree.leaves(lax.platform_dependent(*args, **branches))


def _compute(
    kernel: str | None,
    partitioned: bool,
    call: _Call,
    gradient: jax.Array,
    old: LeafState,
    token: jax.Array,
    step: Step,
) -> Results:
    if kernel is None or 0 in gradient.shape:
        return _batched(call)(gradient, old, step, token)
    lead, layout = gradient.shape[: call.outer], call.layout
    layout = layout._replace(shape=(*lead, *layout.shape), grid=(*lead, *layout.grid))
    update, new = _dispatch.kernels().update(
        kernel,
        gradient,
        old,
        step,
        layout=layout,
        settings=call.settings,
        steps=call.steps,
        partitioned=partitioned,
        interpret=call.settings.implementation in _dispatch.INTERPRETED,
    )
    return update, new, token


def _batched(call: _Call) -> Any:
    """XLA's path under as many `jax.vmap`s as there are axes before the leaf's."""
    f = functools.partial(_xla.update, layout=call.layout, settings=call.settings)
    for axis in range(call.outer):
        steps = 0 if axis >= call.outer - call.steps else None
        f = jax.vmap(f, (0, 0, steps, steps), (0, 0, steps))
    return f
