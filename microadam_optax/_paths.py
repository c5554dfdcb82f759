"""How a leaf's path is written."""

from typing import Any

import jax


def slashed(path: Any) -> str:
    """A path as its names joined by slashes, without the types of containers."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shown(path: Any) -> str:
    """A path as people write it in Python, for messages."""
    return jax.tree_util.keystr(path) or "the only leaf"


def of(tree: Any, is_leaf: Any = None) -> list[Any]:
    """The paths of all leaves."""
    return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
