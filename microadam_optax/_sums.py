"""The sums of gradients that `accumulate` keeps, of leaves that are not compressed."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from microadam_optax import _paths, _specs
from microadam_optax._paths import shown
from microadam_optax._state import MicroAdamState, is_masked

Tree = Any


def zeros(params: optax.Params, nodes: list[MicroAdamState]) -> Tree:
    """The sums before the first micro-batch; masked where a node compresses the leaf."""
    compressed = {path for node in nodes for path in _paths.of(node.codes)}

    def zeros(path: Any, leaf: Any) -> Any:
        if path in compressed:
            return optax.MaskedNode()
        own = jnp.result_type(leaf)
        dtype = own if own.itemsize > 4 else jnp.float32
        return jnp.zeros(jnp.shape(leaf), dtype, device=_specs.of(leaf))

    return jax.tree_util.tree_map_with_path(zeros, params)


def add(sums: Tree, gradients: optax.Updates) -> Tree:
    """The sums with those of one more micro-batch."""
    return _map(lambda x, g: x + jnp.asarray(g, x.dtype), sums, gradients, masked=0)


def means(sums: Tree, gradients: optax.Updates, count: jax.Array) -> optax.Updates:
    """The mean gradient of each leaf that has a sum, else the gradient."""

    def mean(x: jax.Array, g: Any) -> jax.Array:
        return (x / count.astype(x.dtype)).astype(jnp.result_type(g))

    return _map(mean, sums, gradients, masked=1)


def _map(f: Callable, sums: Tree, gradients: optax.Updates, masked: int) -> Tree:
    """`f` of each sum and gradient; of leaves without a sum the one or the other."""
    return jax.tree.map(
        lambda *both: both[masked] if is_masked(both[0]) else f(*both),
        sums,
        gradients,
        is_leaf=is_masked,
    )


def check(gradients: optax.Updates, sums: Tree) -> None:
    """Raises an error if the gradients are not like the parameters."""
    given: Any = jax.tree.structure(gradients, is_leaf=is_masked)
    wanted: Any = jax.tree.structure(sums, is_leaf=is_masked)
    if given != wanted:
        difference = _paths.difference(gradients, sums, is_masked)
        raise ValueError(
            f"The gradient tree does not match the state of `accumulate`: {difference}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(gradients, is_leaf=is_masked)
    known = jax.tree.leaves(sums, is_leaf=is_masked)
    for (path, gradient), like in zip(leaves, known, strict=True):
        if not is_masked(like) and not is_masked(gradient):
            _check_leaf(path, gradient, like)


def _check_leaf(path: Any, gradient: Any, like: jax.Array) -> None:
    if not hasattr(gradient, "dtype") and not isinstance(gradient, numbers.Number):
        raise TypeError(
            f"Gradients must be arrays, but {shown(path)} is {type(gradient).__name__}."
        )
    if jnp.shape(gradient) != like.shape:
        raise ValueError(
            f"The gradient of {shown(path)} has the shape {jnp.shape(gradient)}, but the "
            f"state of `accumulate` {like.shape}."
        )
