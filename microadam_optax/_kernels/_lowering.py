"""What can only be done when a program is lowered, by operations of our own.

Which platform a program is for is known then, long after the library was called. And
only then JAX warns that its Triton backend is deprecated, where no filter around a
call could keep the warning from users who make errors of warnings.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_only_on = Primitive("microadam_only_on")
_quietly = Primitive("microadam_quietly")
_quietly.multiple_results = True


def only_on(platform: str, x: jax.Array) -> jax.Array:
    """The array itself, in a program for a platform.

    Raises:
      NotImplementedError: when lowered for another platform.
    """
    return _only_on.bind(x, platform=platform)


def quietly(f: Callable, tree: Any, *rest: Any) -> Any:
    """``f(tree, *rest)``, a tree like the first, lowered without such warnings."""
    leaves, structure = jax.tree.flatten((tree, *rest))
    number = len(jax.tree.leaves(tree))
    flat = functools.partial(_flat, f, structure)
    results = _quietly.bind(*leaves, f=flat, number=number)
    return jax.tree.unflatten(jax.tree.structure(tree), results)


def _flat(f: Callable, structure: Any, *leaves: Any) -> list[Any]:
    return jax.tree.leaves(f(*jax.tree.unflatten(structure, leaves)))


@_only_on.def_abstract_eval
def _same(x: Any, *, platform: str) -> Any:
    del platform
    return x


@_quietly.def_abstract_eval
def _like_first(*avals: Any, f: Callable, number: int) -> Any:
    del f
    return list(avals[:number])


def _lower_only_on(ctx: Any, x: Any, *, platform: str) -> Any:
    platforms = tuple(ctx.platforms or ctx.module_context.platforms)
    if platform not in platforms:
        raise NotImplementedError(
            '`implementation="pallas"` has kernels for cuda and tpu, not for '
            f"{' or '.join(platforms)}; use None, which chooses."
        )
    return [x]


def _lower_quietly(ctx: Any, *args: Any, f: Callable, number: int) -> Any:
    del number
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        return mlir.lower_fun(f, multiple_results=True)(ctx, *args)


def _alone(primitive: Primitive, *args: Any, **params: Any) -> Any:
    """One operation compiled, for ``jax.disable_jit`` and the search for a NaN."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **params))(*args)


_only_on.def_impl(functools.partial(_alone, _only_on))
_quietly.def_impl(functools.partial(_alone, _quietly))
mlir.register_lowering(_only_on, _lower_only_on)
mlir.register_lowering(_quietly, _lower_quietly)
