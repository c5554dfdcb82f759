"""Which leaves: a tree of bools like the parameters, or a prefix of it."""

from typing import Any

import jax
import numpy as np

from microadam_optax import _paths
from microadam_optax._paths import shown


def is_function(given: Any) -> bool:
    """Whether it is called; a tree of bools may be callable too, as a module is."""
    leaves = jax.tree.leaves(given)
    is_tree = leaves and all(isinstance(x, bool | np.bool_) for x in leaves)
    return callable(given) and not is_tree


def per_leaf(argument: str, given: Any, params: Any) -> list[bool]:
    """A bool for each leaf of `params`.

    Args:
      argument: its name, for messages.
      given: a tree of bools like `params`, or a prefix of it.
      params: the parameters, or their gradients.

    Raises:
      ValueError: it is no such tree.
      TypeError: it has something else than a bool.
    """
    whole: Any = jax.tree.structure(params)
    try:
        choices = whole.flatten_up_to(jax.tree.broadcast(given, params))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be a tree of bools like the parameters, or a prefix of "
            f"it, but {_difference(given, params)}."
        ) from error
    return checked(argument, choices, params)


def checked(argument: str, choices: list[Any], params: Any) -> list[bool]:
    """The choices; TypeError that names the first leaf for which there is no bool."""
    for path, choice in zip(_paths.of(params), choices, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(
                f"`{argument}` must give a bool a leaf, got {choice!r} for {shown(path)}."
            )
    return [bool(choice) for choice in choices]


def _difference(given: Any, params: Any) -> str:
    own, known = _paths.of(given), _paths.of(params)
    covered = {path[:size] for path in known for size in range(len(path) + 1)}
    extra = [path for path in own if path not in covered]
    missing = [path for path in known if not any(path[: len(x)] == x for x in own)]
    if extra:
        return f"the parameters have no {shown(extra[0])}"
    if missing:
        return f"it has nothing for {shown(missing[0])}"
    return "the containers differ in type"
