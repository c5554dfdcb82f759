"""How a leaf's path is written."""

from typing import Any

import jax


def slashed(path: Any) -> str:
    """A path as its names joined by slashes, without the types of containers."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shown(path: Any) -> str:
    """A path as people write it in Python, for messages."""
    return jax.tree_util.keystr(path) or "the only leaf"


def difference(given: Any, known: Any, is_leaf: Any = None) -> str:
    """How a tree of gradients differs from the one that the state knows."""
    given, known = of(given, is_leaf), of(known, is_leaf)
    missing = [shown(path) for path in known if path not in given]
    extra = [shown(path) for path in given if path not in known]
    number = f"({len(given)} leaves given, {len(known)} in the state)"
    if missing:
        return f"there is no gradient for {missing[0]} {number}"
    if extra:
        return f"the state knows no {extra[0]} {number}"
    return f"the containers differ in type {number}"


def of(tree: Any, is_leaf: Any = None) -> list[Any]:
    """The paths of all leaves."""
    return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
