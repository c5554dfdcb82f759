"""Bad input: one clear sentence, before anything is computed."""

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microadam_optax._blocks import Layout
from microadam_optax._state import LeafState, Settings, layout_of, shapes

STATIC_ARGS = (
    "window",
    "density",
    "block_size",
    "error_bits",
    "shards",
    "grid",
    "alpha",
    "stochastic_rounding",
    "seed",
    "implementation",
)


def check_arguments(
    *,
    window: int,
    density: float,
    block_size: int,
    error_bits: int,
    shards: int,
    alpha: float,
    stochastic_rounding: bool,
    seed: int,
    implementation: str | None,
) -> None:
    """Raises TypeError or ValueError naming the first bad argument."""
    positive, size_ok = "an integer of at least 1", "a multiple of 8 in [8, 65536]"
    _integer("window", window, positive)
    _require(window >= 1, "window", positive, window)
    _number("density", density, "a number in (0, 1]")
    _require(0 < density <= 1, "density", "a number in (0, 1]", density)
    _integer("block_size", block_size, size_ok)
    fits = 8 <= block_size <= 65536 and block_size % 8 == 0
    _require(fits, "block_size", size_ok, block_size)
    _integer("error_bits", error_bits, "2, 4 or 8")
    _require(error_bits in (2, 4, 8), "error_bits", "2, 4 or 8", error_bits)
    _integer("shards", shards, positive)
    _require(shards >= 1, "shards", positive, shards)
    _number("alpha", alpha, "a number in [0, 1)")
    _require(0 <= alpha < 1, "alpha", "a number in [0, 1)", alpha)
    _not_array("stochastic_rounding", stochastic_rounding)
    if not isinstance(stochastic_rounding, bool | np.bool_):
        raise TypeError(_sentence("stochastic_rounding", "a bool", stochastic_rounding))
    _integer("seed", seed, "an integer")
    if implementation == "pallas":
        raise NotImplementedError(
            '`implementation="pallas"` does not exist yet; use "xla" or None.'
        )
    known = implementation is None or implementation == "xla"
    _require(known, "implementation", '"xla" or None', implementation)


def check_leaf(what: str, path: Any, leaf: Any) -> None:
    """Raises TypeError if a leaf is not an array of real floating-point numbers."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
        kind = type(leaf).__name__
    else:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            return
        kind = dtype.name
    raise TypeError(
        f"{what} must be real floating-point arrays, but {name(path)} is {kind}; "
        "leave such leaves to another transformation with optax.masked."
    )


def check_grid(path: Any, shape: tuple[int, ...], grid: Any) -> tuple[int, ...] | None:
    """A leaf's grid as a tuple; ValueError if it does not cut it into equal cells."""
    if grid is None:
        return None
    numeric = isinstance(grid, tuple | list) and all(
        isinstance(n, numbers.Integral) and int(n) >= 1 for n in grid
    )
    if not numeric or len(grid) != len(shape) or any(map(operator.mod, shape, grid)):
        raise ValueError(
            f"`grid` of {name(path)} must be a tuple of positive divisors of its "
            f"shape {shape}, one an axis, got {grid!r}."
        )
    return tuple(int(n) for n in grid)


def check_structure(updates: Any, state_tree: Any) -> None:
    """Raises ValueError if the gradients are not a tree like the state's."""
    structures: list[Any] = [jax.tree.structure(x) for x in (updates, state_tree)]
    if structures[0] == structures[1]:
        return
    given, known = (
        [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (updates, state_tree)
    )
    missing = [name(path) for path in known if path not in given]
    extra = [name(path) for path in given if path not in known]
    if missing:
        difference = f"there is no gradient for {missing[0]}"
    elif extra:
        difference = f"the state knows no {extra[0]}"
    else:
        difference = "the containers differ in type"
    raise ValueError(
        "The gradient tree does not match the optimizer state: "
        f"{difference} ({len(given)} leaves given, {len(known)} in the state)."
    )


def check_state(
    path: Any, shape: tuple[int, ...], state: LeafState, settings: Settings
) -> Layout:
    """The layout of a leaf's state; ValueError if it is not the state of such a leaf."""
    at = layout_of(shape, state, settings.bits)
    found = LeafState(*(None if x is None else x.shape for x in state))
    if at is None or found != shapes(at, settings):
        raise ValueError(
            f"The optimizer state of {name(path)} does not fit a gradient of shape "
            f"{shape} with `window`={settings.window}, `density`={settings.density} "
            f"and `error_bits`={settings.bits}; it must have been made for the same "
            f"parameters and arguments, but its arrays have the shapes {found}."
        )
    return at


def name(path: Any) -> str:
    """A leaf's path as people write it."""
    return jax.tree_util.keystr(path) or "the only leaf"


def _integer(argument: str, value: Any, expected: str) -> None:
    _not_array(argument, value)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(_sentence(argument, expected, value))


def _number(argument: str, value: Any, expected: str) -> None:
    _not_array(argument, value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(_sentence(argument, expected, value))


def _not_array(argument: str, value: Any) -> None:
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"`{argument}` must be a Python number, got an array; it shapes the state, "
            "so with optax.inject_hyperparams pass "
            "`static_args=microadam_optax.STATIC_ARGS`."
        )


def _require(condition: bool, argument: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(_sentence(argument, expected, value))


def _sentence(argument: str, expected: str, value: Any) -> str:
    return f"`{argument}` must be {expected}, got {value!r}."
