"""Decoupled weight decay, of all leaves or of some."""

import functools
from typing import Any

import jax
import optax

from microadam_optax import _bools, _checks


def decay(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, but that it says what is wrong with `mask`."""
    if not callable(weight_decay):  # newer versions of optax take a schedule
        _checks.check_scalar("weight_decay", weight_decay, "a finite number")
    if mask is None and _checks.is_number(weight_decay) and weight_decay == 0:
        return optax.identity()  # the same empty state, and needs no parameters
    checked = None if mask is None else functools.partial(_chosen, mask)
    return optax.add_decayed_weights(weight_decay, checked)


def _chosen(mask: Any, params: optax.Params) -> Any:
    """A tree like `params` of what decays."""
    given = mask(params) if _bools.is_function(mask) else mask
    tree: Any = jax.tree.structure(params)
    return tree.unflatten(_bools.per_leaf("mask", given, params))
