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

_quietly = Primitive("microadam_quietly")
_quietly.multiple_results = True


def quietly(f: Callable, tree: Any, *rest: Any) -> Any:
    """``f(tree, *rest)``, a tree like the first, lowered without such warnings."""
    leaves, structure = jax.tree.flatten((tree, *rest))
    number = len(jax.tree.leaves(tree))
    flat = functools.partial(_flat, f, structure)
    results = _quietly.bind(*leaves, f=flat, number=number)
    return jax.tree.unflatten(jax.tree.structure(tree), results)


def _flat(f: Callable, structure: Any, *leaves: Any) -> list[Any]:
    return jax.tree.leaves(f(*jax.tree.unflatten(structure, leaves)))


@_quietly.def_abstract_eval
def _like_first(*avals: Any, f: Callable, number: int) -> Any:
    del f
    return list(avals[:number])


def _lower_quietly(ctx: Any, *args: Any, f: Callable, number: int) -> Any:
    del number
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        return mlir.lower_fun(f, multiple_results=True)(ctx, *args)


def _alone(primitive: Primitive, *args: Any, **params: Any) -> Any:
    """One operation compiled, for ``jax.disable_jit`` and the search for a NaN."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **params))(*args)


_quietly.def_impl(functools.partial(_alone, _quietly))
mlir.register_lowering(_quietly, _lower_quietly)
