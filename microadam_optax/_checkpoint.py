"""Whether a saved optimizer state is one that a transformation can go on with."""

from typing import Any

import jax
import optax

from microadam_optax import _checks
from microadam_optax._fit import check_form, form_of
from microadam_optax._state import LeafState, MicroAdamState


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
    leaves = jax.tree_util.tree_leaves_with_path(params)
    _check_version(found)
    for prefix, node in nodes:
        if isinstance(node, MicroAdamState):
            here = _checks.key(prefix)
            _check_dense(here, [path for path, _ in leaves], found, wanted)
            for path, leaf in leaves:
                _check_leaf(here, path, tuple(leaf.shape), found, wanted)
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


def _check_version(found: dict) -> None:
    """Refuses what version 0.1 made with `dense`."""
    nested = "inner_states/dense/inner_state/mu/"
    dense = [key.split(nested)[1] for key in found if nested in key]
    if dense:
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        raise ValueError(
            "The saved optimizer state is nested (`inner_states`), as microadam_optax "
            f"0.1 made it with a `dense` that names {dense[0]}{more}; a state made with "
            "the same `dense` now holds the same arrays, under other paths."
        )


def _check_dense(here: str, paths: list[Any], found: dict, wanted: dict) -> None:
    """Compares which leaves are dense and which compressed."""

    def having(arrays: dict, field: str) -> list[Any]:
        return [x for x in paths if _join(here, field, _checks.key(x)) in arrays]

    was, now = having(found, "mu"), having(wanted, "mu")
    differ = [x for x in having(found, "codes") if x in now]
    differ += [x for x in was if x in having(wanted, "codes")]
    if differ:
        names = ", ".join(_checks.name(path) for path in was)
        made = f"a `dense` that names {names}" if was else "`dense=None`"
        raise ValueError(
            f"The saved optimizer state was made with {made}, but the `dense` of this "
            f"transformation {'names' if differ[0] in now else 'lacks'} "
            f"{_checks.name(differ[0])}."
        )


def _check_leaf(
    here: str, path: Any, shape: tuple[int, ...], found: dict, wanted: dict
) -> None:
    """Compares what two sets of shapes tell of a leaf, if both tell something."""
    states, forms = [], []
    for shapes in (found, wanted):
        ages = shapes.get(_join(here, "ages"), (0,))
        keys = (_join(here, field, _checks.key(path)) for field in LeafState._fields)
        states.append(LeafState(*map(shapes.get, keys)))
        codes = states[-1].codes
        forms.append(form_of(shape, states[-1], ages[0] + 1) if codes else None)
    if all(state.codes for state in states) and forms[1]:
        check_form(path, shape, states[0], *forms)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_checks.key(path): tuple(leaf.shape) for path, leaf in leaves}


def _join(*keys: str) -> str:
    return "/".join(key for key in keys if key)
