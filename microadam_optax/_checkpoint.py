"""Whether a saved optimizer state is one that a transformation can go on with."""

from typing import Any

import jax
import optax

from microadam_optax import _checks
from microadam_optax._state import LeafState, MicroAdamState, form_of


def check_checkpoint(saved: Any, tx: optax.GradientTransformation, params: Any) -> None:
    """Refuses a saved state that was made with other arguments, before it is restored.

    Checkpoint libraries compare the shapes of arrays one by one; this tells what they
    mean. It needs shapes only: nothing is read or allocated.

    Args:
      saved: the state of `tx`, any optax chain, as it was saved: arrays, shapes, or
        what Orbax gives as metadata; dicts and lists may stand for named tuples.
      tx: the transformation that shall go on with it.
      params: the parameters or their shapes.

    Raises:
      ValueError: another window, block size, number of bits, density or grid, with
        both values; or an array is missing or has another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from microadam_optax import check_checkpoint, microadam
      >>> params = {"w": jnp.zeros((512, 256))}
      >>> saved = jax.eval_shape(microadam(1e-3, window=4).init, params)
      >>> check_checkpoint(saved, microadam(1e-3, window=4), params)
      >>> check_checkpoint(saved, microadam(1e-3), params)
      Traceback (most recent call last):
      ValueError: The optimizer state of ['w'] was made with `window` 4, but this \
transformation has `window` 2.
    """
    expected = jax.eval_shape(tx.init, params)
    found, wanted = _shapes(saved), _shapes(expected)
    nodes = jax.tree_util.tree_leaves_with_path(
        expected, is_leaf=lambda x: isinstance(x, MicroAdamState)
    )
    for prefix, node in nodes:
        if isinstance(node, MicroAdamState):
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                here = (_checks.key(prefix), _checks.key(path))
                _check_leaf(path, tuple(leaf.shape), here, found, wanted)
    for key, shape in wanted.items():
        if found.get(key) != shape:
            raise ValueError(
                f"The saved optimizer state has {found.get(key, 'nothing')} at {key}, "
                f"where this transformation has an array of shape {shape}."
            )
    extra = next((key for key in found if key not in wanted), None)
    if extra is not None:
        raise ValueError(
            f"The saved optimizer state has an array at {extra}, where this "
            "transformation has none."
        )


def _check_leaf(path: Any, shape: tuple[int, ...], here: tuple, found, wanted) -> None:
    """Compares what two sets of shapes tell of a leaf, if both tell something."""
    forms = []
    for shapes in (found, wanted):
        prefix, leaf = here
        ages = shapes.get(_join(prefix, "ages"), (0,))
        arrays = (shapes.get(_join(prefix, x, leaf)) for x in LeafState._fields)
        state = LeafState(*arrays)
        forms.append(form_of(shape, state, ages[0] + 1) if state.codes else None)
    made, asked = forms
    if made and asked:
        _checks.check_form(path, made, asked)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_checks.key(path): tuple(leaf.shape) for path, leaf in leaves}


def _join(*keys: str) -> str:
    return "/".join(key for key in keys if key)
