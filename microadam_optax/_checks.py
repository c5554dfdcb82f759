"""Arguments: one clear sentence for a bad one, before anything is computed."""

import numbers
from typing import Any

import jax
import numpy as np

from microadam_optax import _dispatch


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
    check_integer("window", window, positive)
    _require(window >= 1, "window", positive, window)
    _number("density", density, "a number in (0, 1]")
    _require(0 < density <= 1, "density", "a number in (0, 1]", density)
    check_integer("block_size", block_size, size_ok)
    fits = 8 <= block_size <= 65536 and block_size % 8 == 0
    _require(fits, "block_size", size_ok, block_size)
    check_integer("error_bits", error_bits, "2, 4 or 8")
    _require(error_bits in (2, 4, 8), "error_bits", "2, 4 or 8", error_bits)
    check_integer("shards", shards, positive)
    _require(shards >= 1, "shards", positive, shards)
    _number("alpha", alpha, "a number in [0, 1)")
    _require(0 <= alpha < 1, "alpha", "a number in [0, 1)", alpha)
    bools = {"stochastic_rounding": stochastic_rounding, "match_adam": match_adam}
    for argument, value in bools.items():
        _not_array(argument, value, "bool")
        if not isinstance(value, bool | np.bool_):
            raise TypeError(_sentence(argument, "a bool", value))
    check_integer("seed", seed, "an integer")
    known = (None, *_dispatch.NAMES)
    names = '"xla", "pallas", "numba" or None'
    _require(implementation in known, "implementation", names, implementation)
    if implementation is not None and implementation != "xla" and stochastic_rounding:
        raise _dispatch.no_kernel(implementation, "`stochastic_rounding`")


def check_decays(**values: Any) -> None:
    """Raises an error for decays and epsilons that can only give NaN; arrays pass."""
    words = {"eps": "a number above 0", "eps_root": "a number of at least 0"}
    for argument, value in values.items():
        expected = words.get(argument, "a number in [0, 1)")
        if check_scalar(argument, value, expected):
            continue  # its value is known when it runs
        single = np.float32(value)
        good = {"eps": single > 0, "eps_root": value >= 0}
        fits = good.get(argument, value >= 0 and single < 1)
        _require(fits, argument, expected, value)


def check_scalar(argument: str, value: Any, expected: str) -> bool:
    """Whether it is a scalar array or traced; an error if it is no finite number."""
    if not is_number(value) and getattr(value, "shape", None) != ():
        raise TypeError(_sentence(argument, expected, value))
    _require(not is_number(value) or np.isfinite(value), argument, expected, value)
    return not is_number(value)


def is_number(value: Any) -> bool:
    """Whether it is a Python or NumPy number, neither an array nor traced."""
    return isinstance(value, int | float | np.number)


def check_integer(argument: str, value: Any, expected: str) -> None:
    """Raises TypeError if an argument is not an integer."""
    _not_array(argument, value)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(_sentence(argument, expected, value))


def _number(argument: str, value: Any, expected: str) -> None:
    _not_array(argument, value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(_sentence(argument, expected, value))


def _not_array(argument: str, value: Any, kind: str = "number") -> None:
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"`{argument}` must be a Python {kind}, got an array; it shapes the program, "
            "so with optax.inject_hyperparams pass `static_args="
            "microadam_optax.static_args(f)`, f being the function that it wraps."
        )


def _require(condition: bool, argument: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(_sentence(argument, expected, value))


def _sentence(argument: str, expected: str, value: Any) -> str:
    return f"`{argument}` must be {expected}, got {value!r}."
