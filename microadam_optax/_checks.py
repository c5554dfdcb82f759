"""Bad input: one clear sentence, before anything is computed."""

import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from microadam_optax import _dispatch
from microadam_optax._blocks import Layout
from microadam_optax._state import Settings


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
    match_adam: bool,
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
    bools = {"stochastic_rounding": stochastic_rounding, "match_adam": match_adam}
    for argument, value in bools.items():
        _not_array(argument, value)
        if not isinstance(value, bool | np.bool_):
            raise TypeError(_sentence(argument, "a bool", value))
    _integer("seed", seed, "an integer")
    known = (None, *_dispatch.NAMES)
    names = '"xla", "pallas", "numba" or None'
    _require(implementation in known, "implementation", names, implementation)
    if implementation is not None and implementation != "xla" and stochastic_rounding:
        raise _dispatch.no_kernel(implementation, "`stochastic_rounding`")


def check_decays(**values: Any) -> None:
    """Raises ValueError for decays and epsilons that can only give NaN; arrays pass."""
    for argument, value in values.items():
        if not is_number(value):
            continue
        if argument == "eps":
            above = float(np.float32(value)) > 0
            _require(above, argument, "a number above 0", value)
        elif argument == "eps_root":
            _require(0 <= value < float("inf"), argument, "a number of at least 0", value)
        else:
            below = float(np.float32(value)) < 1
            _require(value >= 0 and below, argument, "a number in [0, 1)", value)


def check_kernel(path: Any, dtype: Any, at: Layout, settings: Settings) -> None:
    """Raises NotImplementedError if a kernel is named that cannot update a leaf."""
    chosen = settings.implementation
    if chosen is None or chosen == "xla":
        return
    reason = _dispatch.unavailable(chosen)
    if reason is not None:
        raise _dispatch.no_kernel(chosen, reason)
    reason = _dispatch.reason_against(at, dtype, settings, stochastic=False)
    if reason is not None:
        raise _dispatch.no_kernel(chosen, f"{reason}, as in {name(path)}")


def check_leaf(what: str, path: Any, leaf: Any, dense: bool = False) -> None:
    """Raises TypeError if a leaf is no real floating-point array; a dense one any."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
        kind = type(leaf).__name__
    else:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact if dense else jnp.floating):
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
    if (
        not _is_grid(grid)
        or len(grid) != len(shape)
        or any(map(operator.mod, shape, grid))
    ):
        raise ValueError(
            f"`grid` of {name(path)} must be a tuple of positive divisors of its "
            f"shape {shape}, one an axis, got {grid!r}."
        )
    return tuple(int(n) for n in grid)


def check_grids(params: Any, grid: Any) -> list[Any]:
    """What `grid` has for each leaf; ValueError if it is not a tree like `params`."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    tree: Any = jax.tree.structure(params, is_leaf=is_masked)
    try:
        return tree.flatten_up_to(grid)
    except ValueError as error:
        known = _paths(params, is_masked)
        given = _paths(grid, lambda x: x is None or _is_grid(x))
        missing = [name(path) for path in known if path not in given]
        extra = [name(path) for path in given if path not in known]
        difference = "the containers differ in type"
        if missing:
            difference = f"it has nothing for {missing[0]}"
        elif extra:
            difference = f"the parameters have no {extra[0]}"
        raise ValueError(
            f"`grid` must be a tree like the parameters, but {difference}."
        ) from error


def check_size(size: int) -> None:
    """Raises TypeError if a number of elements is not an integer."""
    _integer("size", size, "an integer")


def check_sharding(path: Any, sharding: Any) -> Sharding:
    """A parameter's sharding; an error if it is none."""
    if sharding is None:
        raise ValueError(
            f"`shardings` has none for {name(path)}, nor has the parameter itself."
        )
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"`shardings` of {name(path)} must be a jax.sharding.Sharding, or a "
            f"PartitionSpec under jax.set_mesh, got {sharding!r}."
        )
    return sharding


def key(path: Any) -> str:
    """A leaf's path as its names joined by slashes, without the types of containers."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def name(path: Any) -> str:
    """A leaf's path as people write it."""
    return jax.tree_util.keystr(path) or "the only leaf"


def is_number(value: Any) -> bool:
    """Whether it is a Python or NumPy number, neither an array nor traced."""
    return isinstance(value, int | float | np.number)


def _is_grid(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(
        isinstance(n, numbers.Integral) and int(n) >= 1 for n in x
    )


def _paths(tree: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    return [p for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


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
            "so with optax.inject_hyperparams pass `static_args="
            "microadam_optax.static_args(f)`, f being the function that it wraps."
        )


def _require(condition: bool, argument: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(_sentence(argument, expected, value))


def _sentence(argument: str, expected: str, value: Any) -> str:
    return f"`{argument}` must be {expected}, got {value!r}."
