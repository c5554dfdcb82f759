"""Who computes a leaf: XLA, from `_leaf.update_blocks`, or a kernel of the platform.

That is decided when JAX lowers a program, for only then it is known for which platform
and which devices. Until then one operation of our own stands for the update of a leaf:
nothing is traced or compiled that is not used, `jax.vmap` gives it leading axes, and
derivatives are those of XLA's path.

`implementation` names one; None chooses, leaf by leaf, and never makes a program fail
that XLA's path would have run.
"""

import dataclasses
import functools
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from microadam_optax._blocks import Layout
from microadam_optax._state import Settings

# Platforms whose kernel None chooses.
CHOSEN: tuple[str, ...] = ("cpu", "cuda")
# Names of kernels, and the platforms that each has one for.
NAMED = {"pallas": ("cuda", "tpu"), "numba": ("cpu",)}
# For tests: the kernel of a platform, in Pallas's interpreter on any platform.
INTERPRETED = {"interpret_gpu": "cuda", "interpret_tpu": "tpu"}
NAMES = ("xla", *NAMED, *INTERPRETED)


class _Call(NamedTuple):
    """What is static of the update of a leaf."""

    by_xla: Callable  # (leaf, step, after, at, settings) -> (leaf, after)
    at: Layout
    settings: Settings
    outer: int = 0  # axes that `jax.vmap` has put before the leaf's arrays
    steps: int = 0  # the first of them, along which the steps differ as well


def reason_against(
    at: Layout, dtype: Any, settings: Settings, stochastic: bool
) -> str | None:
    """Why no kernel of a name can update a leaf; None if one can."""
    name = str(settings.implementation)
    reasons = [
        _kernels().reason_against(x, at, dtype, settings, stochastic)
        for x in _platforms(name)
    ]
    return None if None in reasons else reasons[0]


def unavailable(name: str) -> str | None:
    """Why no kernel of a name can be used here; None if one can."""
    if _kernels() is None:
        return "an installation without `microadam_optax._kernels`"
    reasons = [_kernels().unavailable(x) for x in _platforms(name)]
    return None if None in reasons else reasons[0]


def no_kernel(name: str, what: str) -> NotImplementedError:
    """The error for what a kernel that is named cannot do."""
    return NotImplementedError(
        f'`implementation="{name}"` has no kernel for {what}; use None, which chooses.'
    )


def update(
    by_xla: Callable, at: Layout, settings: Settings, leaf: Any, step: Any, after: Any
) -> tuple[Any, Any]:
    """One step of a leaf.

    Args:
      by_xla: a function ``(leaf, step, after, at, settings)`` that computes it in
        operations of JAX, and is always the same object.
      at: layout of the leaf.
      settings: static numbers.
      leaf: `_leaf.Leaf` with the gradient in its own shape.
      step: `_leaf.Step`.
      after: see `_chunks.in_chunks`.

    Returns:
      The leaf with the update in the gradient's place and the new state; next `after`.
    """
    name = settings.implementation
    if name == "xla" or 0 in at.shape or step.key is not None:
        return by_xla(leaf, step, after, at, settings)
    return _update(_Call(by_xla, at, settings), leaf, step, after)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _update(call: _Call, leaf: Any, step: Any, after: Any) -> tuple[Any, Any]:
    flat, tree = jax.tree.flatten((leaf, step, after))
    results = _update_p.bind(*flat, call=call, tree=tree)
    return jax.tree.unflatten(jax.tree.structure((leaf, after)), results)


@_update.defjvp
def _derivative(call: _Call, primals: Any, tangents: Any) -> Any:
    f = functools.partial(call.by_xla, at=call.at, settings=call.settings)
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
    return [x.update(weak_type=False) for x in _updated(avals, tree)]


def _updated(flat: Sequence[Any], tree: Any) -> list[Any]:
    """Of all that goes in, what comes out: the leaf's arrays and `after`."""
    leaf, _, after = jax.tree.unflatten(tree, flat)
    return jax.tree.leaves((leaf, after))


def _batch(
    flat: Any, axes: Any, *, call: _Call, tree: Any
) -> tuple[list[Any], list[Any]]:
    """The new axis goes before the leaf's; steps get it if one of them has it."""
    pairs = zip(flat, axes, strict=True)
    size = next(x.shape[axis] for x, axis in pairs if axis is not None)
    leaves = len(_updated(flat, tree)) - 1
    differ = any(axis is not None for axis in axes[leaves:])
    to = 0 if differ else call.steps
    call = call._replace(outer=call.outer + 1, steps=call.steps + differ)

    def move(x: Any, axis: Any) -> Any:
        if axis is not None:
            return jnp.moveaxis(x, axis, to)
        shape = (*x.shape[:to], size, *x.shape[to:])
        return jnp.broadcast_to(jnp.expand_dims(x, to), shape)

    moved = len(flat) if differ else leaves
    flat = [*map(move, flat[:moved], axes[:moved]), *flat[moved:]]
    results = _update_p.bind(*flat, call=call, tree=tree)
    return results, [to] * leaves + [0 if differ else None]


batching.primitive_batchers[_update_p] = _batch


def _lower(ctx: Any, *flat: Any, call: _Call, tree: Any) -> Any:
    """XLA's path or a kernel's, as operations of the program."""
    module, dtype = ctx.module_context, jax.tree.unflatten(tree, ctx.avals_in)[0][0].dtype
    partitioned, context = _partitioning(module.axis_context)
    # What is exported must run elsewhere and later. JAX does not say so to the public.
    foreign = getattr(module.lowering_parameters, "for_export", True) or context is None
    platforms = tuple(ctx.platforms or module.platforms)
    chosen = {x: _choose(x, foreign, call, dtype) for x in platforms}
    if len(platforms) > 1 and call.settings.implementation is None:
        # Pallas lowers its kernels only in programs for one platform.
        chosen = {x: kernel if x == "cpu" else None for x, kernel in chosen.items()}
    if any(chosen.values()) and partitioned and context is not None:
        ctx = ctx.replace(module_context=module.replace(axis_context=context))
    branches = {
        platform: functools.partial(_compute, kernel, partitioned, call)
        for platform, kernel in chosen.items()
    }

    def f(*flat: Any) -> list[Any]:
        args = jax.tree.unflatten(tree, flat)
        if len(set(chosen.values())) == 1:
            return jax.tree.leaves(next(iter(branches.values()))(*args))
        return jax.tree.leaves(lax.platform_dependent(*args, **branches))

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


def _choose(platform: str, foreign: bool, call: _Call, dtype: Any) -> str | None:
    """The platform whose kernel computes a leaf; None for XLA."""
    name = call.settings.implementation
    if name in INTERPRETED:
        return INTERPRETED[name]
    if name is None and (foreign or platform not in CHOSEN or _kernels() is None):
        return None
    if name is not None and platform not in NAMED[name]:
        raise NotImplementedError(
            f'`implementation="{name}"` has kernels for {" and ".join(NAMED[name])}, '
            f"not for {platform}; use None, which chooses."
        )
    reason = _kernels().unavailable(platform)
    reason = reason or _kernels().reason_against(
        platform, call.at, dtype, call.settings, stochastic=False
    )
    if name is not None and reason is not None:
        raise no_kernel(name, reason)
    if lacks := _kernels().missing(platform):
        _tell(platform, lacks)
    return platform if reason is None else None


@functools.cache
def _tell(platform: str, lacks: str) -> None:
    """Warns once that None does not choose a kernel that other versions of jax have."""
    warnings.warn(
        f"microadam_optax has no kernel for {platform} with {lacks}; XLA computes.",
        stacklevel=2,
    )


def _compute(
    kernel: str | None, partitioned: bool, call: _Call, leaf: Any, step: Any, after: Any
) -> tuple[Any, Any]:
    at, settings = call.at, call.settings
    if kernel is None or 0 in leaf.gradient.shape:
        f = functools.partial(call.by_xla, at=at, settings=settings)
        for axis in range(call.outer):
            steps = 0 if axis >= call.outer - call.steps else None
            f = jax.vmap(f, (0, steps, steps), (0, steps))
        return f(leaf, step, after)
    lead = leaf.gradient.shape[: call.outer]
    at = at._replace(shape=(*lead, *at.shape), grid=(*lead, *at.grid))
    new = _kernels().update(
        kernel,
        leaf,
        step,
        at=at,
        settings=settings,
        steps=call.steps,
        partitioned=partitioned,
        interpret=settings.implementation in INTERPRETED,
    )
    return new, after


def _platforms(name: str | None) -> tuple[str, ...]:
    known = NAMED | {name: (platform,) for name, platform in INTERPRETED.items()}
    return known[str(name)]


@functools.cache
def _kernels() -> Any:
    """The package of kernels, imported when one is wanted; None if it is not there."""
    name = "microadam_optax._kernels"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
