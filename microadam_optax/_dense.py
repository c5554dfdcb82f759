"""Which leaves keep Adam's dense moments instead of being compressed."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from microadam_optax import _bools, _checks, _paths


def smaller_than(size: int) -> Callable[[Any, Any], bool]:
    """A ``dense`` for `microadam`: leaves of fewer than `size` elements.

    Args:
      size: number of elements.

    Returns:
      A function of a leaf's path and the leaf.

    Raises:
      TypeError: `size` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from microadam_optax import microadam, smaller_than
      >>> tx = microadam(1e-3, dense=smaller_than(4096))
      >>> params = {"w": jnp.zeros((256, 64)), "b": jnp.zeros(64)}
      >>> state = tx.init(params)[0]
      >>> state.codes["w"].shape, state.mu["w"]
      ((8, 1, 8, 128), MaskedNode())
      >>> state.codes["b"], state.mu["b"].shape
      (MaskedNode(), (64,))
    """
    _checks.check_integer("size", size, "an integer")
    return _SmallerThan(size)


def matching(pattern: str) -> Callable[[Any, Any], bool]:
    """A ``dense`` for `microadam`: leaves with `pattern` in their path.

    Args:
      pattern: a regular expression, sought in the path with its names joined by
        slashes, ``"blocks/0/norm/scale"``.

    Returns:
      A function of a leaf's path and the leaf.

    Raises:
      TypeError: `pattern` is not a string.
      ValueError: it is not a regular expression.

    Example:
      >>> import jax
      >>> from microadam_optax import matching
      >>> dense = matching(r"embed|norm|bias")
      >>> params = {"embed": 0.0, "mlp": {"kernel": 0.0, "bias": 0.0}}
      >>> jax.tree_util.tree_map_with_path(dense, params)
      {'embed': True, 'mlp': {'bias': True, 'kernel': False}}
    """
    if not isinstance(pattern, str):
        raise TypeError(f"`pattern` must be a string, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`pattern` must be a regular expression, got {pattern!r}: {error}."
        ) from error
    return _Matching(pattern)


_MISSING = object()


@dataclasses.dataclass(frozen=True)
class _SmallerThan:
    size: int

    def __repr__(self) -> str:  # the default, as signatures show it
        return f"smaller_than({self.size})"

    def __call__(self, path: Any, leaf: Any = _MISSING) -> bool:
        _check_leaf_given(self, leaf)
        del path
        return math.prod(np.shape(leaf)) < self.size


@dataclasses.dataclass(frozen=True)
class _Matching:
    pattern: str

    def __repr__(self) -> str:
        return f"matching({self.pattern!r})"

    def __call__(self, path: Any, leaf: Any = _MISSING) -> bool:
        _check_leaf_given(self, leaf)
        return re.search(self.pattern, _paths.slashed(path)) is not None


def _check_leaf_given(dense: Any, leaf: Any) -> None:
    """Raises TypeError where optax calls it as a schedule or a mask."""
    if leaf is _MISSING:
        raise TypeError(
            f"`{dense}` is for `dense` and takes a leaf's path and the leaf, but was "
            "called with one argument, as a mask or a schedule; with "
            "optax.inject_hyperparams pass `static_args=microadam_optax.static_args(f)`, "
            "f being the function that it wraps."
        )


def choose(dense: Any, params: Any) -> list[bool]:
    """For each leaf, whether it is dense.

    Args:
      dense: as in `microadam`.
      params: the parameters, or their gradients.

    Returns:
      A bool a leaf.

    Raises:
      ValueError: `dense` is no tree like `params`, or a `matching` that matches no leaf.
      TypeError: `dense` gives something else than a bool.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if dense is None or not leaves:
        return [False] * len(leaves)
    if not _bools.is_function(dense):
        return _bools.per_leaf("dense", dense, params)
    choices = [dense(path, leaf) for path, leaf in leaves]
    choices = _bools.checked("dense", choices, params)
    if isinstance(dense, _Matching) and not any(choices):
        raise ValueError(
            f"`dense={dense}` matches no leaf; the path of one is "
            f"{_paths.slashed(leaves[0][0])!r}."
        )
    return choices


def check_function(dense: Any) -> None:
    """Raises TypeError if `dense` is a function that cannot be given path and leaf."""
    if dense is None or not _bools.is_function(dense):
        return
    try:
        signature = inspect.signature(dense)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            "`dense` must be a function of a leaf's path and the leaf, such as "
            "`lambda path, leaf: leaf.ndim < 2`, got one with the signature "
            f"`{signature}`."
        ) from error
