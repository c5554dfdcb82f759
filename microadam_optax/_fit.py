"""Whether a saved optimizer state is one that a transformation can go on with."""

import functools
from typing import Any

import jax
import optax

from microadam_optax import _state
from microadam_optax._blocks import Layout
from microadam_optax._form import Form, form_of, forms, shape_of
from microadam_optax._paths import shown
from microadam_optax._saved import (
    Arrays,
    Names,
    Param,
    arrays_of,
    check_arrays,
    expected_of,
    names_of,
    params_of,
)
from microadam_optax._state import LeafState, MicroAdamState, Moments, Settings


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
        both values; or an array is missing or has another shape or dtype.

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
    leaves, wanted = params_of(params), expected_of(expected, params)
    found = arrays_of(saved, leaves, wanted)
    nodes = jax.tree_util.tree_leaves_with_path(
        expected, is_leaf=lambda x: isinstance(x, MicroAdamState)
    )
    _check_version(found)
    if any(isinstance(node, MicroAdamState) for _, node in nodes):
        _check_known(found)
    for prefix, node in nodes:
        if isinstance(node, MicroAdamState):
            here = names_of(prefix)
            if (*here, "count") in found:
                _state.check_key(found.get((*here, "key")), (*here, "key") in wanted)
            _check_dense(here, leaves, found, wanted)
            for leaf in leaves:
                _check_leaf(here, leaf, found, wanted)
    check_arrays(found, wanted)


def _check_version(found: Arrays) -> None:
    """Refuses what version 0.1 made with `dense`."""
    nested = ("inner_states", "dense", "inner_state", "mu")
    dense = [
        at for at in found if nested in zip(*(at[i:] for i in range(4)), strict=False)
    ]
    if dense:
        first = "/".join(dense[0][dense[0].index("mu") + 1 :])
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        raise ValueError(
            "The saved optimizer state is nested (`inner_states`), as an earlier version "
            f"made it with a `dense` that names {first}{more}; a state made with the "
            "same `dense` now holds the same arrays, under other paths."
        )


def _check_known(found: Arrays) -> None:
    """Refuses what has neither codes nor moments anywhere."""
    names = {name for at in found for name in at}
    if "codes" not in names and not {"mu", "nu"} <= names:
        raise ValueError(
            "The saved optimizer state is no MicroAdam's: it has neither codes of an "
            "error nor two moments."
        )


def _check_dense(here: Names, leaves: list[Param], found: Arrays, wanted: Arrays) -> None:
    """Compares which leaves are dense and which compressed."""
    having = functools.partial(_having, here, leaves)
    was, now = having(found, "mu"), having(wanted, "mu")
    differ = [x for x in having(found, "codes") if x in now]
    differ += [x for x in was if x in having(wanted, "codes")]
    if differ and was == leaves:
        raise ValueError(
            "The saved optimizer state has Adam's moments of every leaf, as optax.adam "
            "makes it or a `dense` that names all, but this transformation compresses "
            f"{shown(differ[0].path)}."
        )
    if differ:
        names = ", ".join(shown(x.path) for x in was)
        made = f"a `dense` that names {names}" if was else "`dense=None`, or other shapes"
        raise ValueError(
            f"The saved optimizer state was made with {made}, but the `dense` of this "
            f"transformation {'names' if differ[0] in now else 'lacks'} "
            f"{shown(differ[0].path)}."
        )


def _having(here: Names, leaves: list[Param], arrays: Arrays, field: str) -> list[Param]:
    return [x for x in leaves if (*here, field, *x.names) in arrays]


def _check_leaf(here: Names, leaf: Param, found: Arrays, wanted: Arrays) -> None:
    """Compares what two sets of arrays tell of a leaf, if both tell something."""
    states, told = [], []
    for arrays in (found, wanted):
        ages = arrays.get((*here, "ages"))
        of = (arrays.get((*here, x, *leaf.names)) for x in LeafState._fields)
        states.append(LeafState(*(None if x is None else x.shape for x in of)))
        window = 1 if ages is None else ages.size + 1
        codes = states[-1].codes
        told.append(form_of(leaf.shape, states[-1], window) if codes else None)
    made, asked = told
    if asked and states[0].codes:
        check_form(leaf.path, leaf.shape, states[0], made, asked)


def check_state(
    path: Any,
    shape: tuple[int, ...],
    state: LeafState | Moments,
    ages: Any,
    settings: Settings,
    dense: bool,
) -> Layout | None:
    """The layout of a leaf, None if it is dense; ValueError if the state is not its."""
    if isinstance(state, Moments) and state.mu.shape != shape:
        raise ValueError(_other_shape(path, state.mu.shape, shape))
    if isinstance(state, LeafState) and dense:
        _check_made_for(path, shape, state, ages, settings)
    if isinstance(state, Moments) != dense:
        raise ValueError(
            f"The optimizer state of {shown(path)} is "
            + ("compressed, but `dense` names" if dense else "dense, but `dense` lacks")
            + " it: it was made with another `dense`"
            + (" (None compresses every leaf), or for another shape." if dense else ".")
        )
    if isinstance(state, Moments):
        return None
    found, made, asked, layout = forms(shape, state, ages, settings)
    check_form(path, shape, found, made, asked)
    return layout


def _check_made_for(
    path: Any, shape: tuple[int, ...], state: LeafState, ages: Any, settings: Settings
) -> None:
    """Raises ValueError if a compressed leaf's state tells of another shape."""
    found, made, asked, _ = forms(shape, state, ages, settings)
    other = shape_of(found, shape, asked) if made is None else None
    if other:
        raise ValueError(_other_shape(path, other, shape))


def check_form(
    path: Any,
    shape: tuple[int, ...],
    state: LeafState,
    made: Form | None,
    asked: Form,
) -> None:
    """Raises ValueError that names what differs, as it was made and as it is asked.

    Args:
      path: of the leaf.
      shape: of its gradient.
      state: shapes of its state.
      made: what they tell if they are those of such a leaf.
      asked: what this transformation makes of it.
    """
    words = {
        "window": "`window` {}",
        "bits": "`error_bits` {}",
        "block": "blocks of {} elements (`block_size`)",
        "k": "{} entries selected in a block (`density`)",
        "grid": "grid {} (`shards` or `grid`)",
    }
    if made == asked:
        return
    differ = [x for x in Form._fields if made and getattr(made, x) != getattr(asked, x)]
    if made and len(differ) > 1 and None in (made.k, asked.k):
        differ = [x for x in differ if x != "k"]  # a window of 1 does not tell
    other = shape_of(state, shape, asked)
    if other and len(differ) != 1:
        raise ValueError(_other_shape(path, other, shape))
    if made is None:
        raise ValueError(
            f"The optimizer state of {shown(path)} is not that of a gradient of shape "
            f"{shape}; its arrays have the shapes {state}."
        )
    then, now = (
        " and ".join(words[x].format(getattr(form, x)) for x in differ)
        for form in (made, asked)
    )
    unless = f", or the leaf had the shape {other}" if other else ""
    raise ValueError(
        f"The optimizer state of {shown(path)} was made with {then}, but this "
        f"transformation has {now}{unless}."
    )


def _other_shape(path: Any, made: tuple[int, ...], given: tuple[int, ...]) -> str:
    return (
        f"The optimizer state of {shown(path)} is that of a leaf of shape {made} (up to "
        f"padding), but this leaf has the shape {given}."
    )
