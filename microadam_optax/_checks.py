"""Bad input: one clear sentence, before anything is computed."""

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from microadam_optax import _dispatch
from microadam_optax._blocks import Layout, layout
from microadam_optax._state import Form, LeafState, Settings, form_of

STATIC_ARGS = (
    "window",
    "density",
    "block_size",
    "error_bits",
    "shards",
    "grid",
    "dense",
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
    known = (None, *_dispatch.NAMES)
    names = '"xla", "pallas", "numba" or None'
    _require(implementation in known, "implementation", names, implementation)
    if implementation is not None and implementation != "xla" and stochastic_rounding:
        raise _dispatch.no_kernel(implementation, "`stochastic_rounding`")


def check_decays(**values: Any) -> None:
    """Raises ValueError for decays or an eps that can only give NaN; arrays pass."""
    for argument, value in values.items():
        if not isinstance(value, int | float):
            continue
        if argument == "eps":
            above = float(np.float32(value)) > 0
            _require(above, argument, "a number above 0", value)
        else:
            _require(0 <= value < 1, argument, "a number in [0, 1)", value)


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


def check_size(size: int) -> None:
    """Raises TypeError if a number of elements is not an integer."""
    _integer("size", size, "an integer")


def check_dense(dense: Any, params: Any, leaves: list[tuple[Any, Any]]) -> list[bool]:
    """For each leaf, whether it is dense; an error if `dense` does not tell."""
    if not leaves:
        return []
    if callable(dense):
        choices = [dense(path, leaf) for path, leaf in leaves]
    else:
        try:
            whole: Any = jax.tree.structure(params)
            choices = whole.flatten_up_to(jax.tree.broadcast(dense, params))
        except ValueError as error:
            raise ValueError(
                f"`dense` must be a tree of bools like the parameters: {error}"
            ) from error
    for (path, _), choice in zip(leaves, choices, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(
                f"`dense` must give a bool a leaf, got {choice!r} for {name(path)}."
            )
    return choices


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
    path: Any,
    shape: tuple[int, ...],
    state: LeafState,
    ages: Any,
    settings: Settings,
) -> Layout:
    """The layout of a leaf's state; ValueError if it is not the state of such a leaf."""
    window = 1 if ages is None else ages.size + 1
    found = LeafState(*(None if x is None else x.shape for x in state))
    made = form_of(shape, found, window)
    if made is None:
        raise ValueError(
            f"The optimizer state of {name(path)} is not that of a gradient of shape "
            f"{shape}; its arrays have the shapes {found}."
        )
    at = layout(shape, settings.block_size, grid=made.grid)
    k = settings.k(at.block) if settings.window > 1 else None
    check_form(path, made, Form(settings.window, settings.bits, at.block, k, at.grid))
    return at


def check_form(path: Any, made: Form, asked: Form) -> None:
    """Raises ValueError that names what differs, as it was made and as it is asked."""
    words = {
        "window": "`window` {}",
        "bits": "`error_bits` {}",
        "block": "blocks of {} elements (`block_size`)",
        "k": "{} entries selected in a block (`density`)",
        "grid": "grid {} (`shards` or `grid`)",
    }
    differ = [x for x in Form._fields if getattr(made, x) != getattr(asked, x)]
    if len(differ) > 1 and None in (made.k, asked.k):
        differ = [x for x in differ if x != "k"]  # a window of 1 does not tell
    if differ:
        then, now = (
            " and ".join(words[x].format(getattr(form, x)) for x in differ)
            for form in (made, asked)
        )
        raise ValueError(
            f"The optimizer state of {name(path)} was made with {then}, but this "
            f"transformation has {now}."
        )


def key(path: Any) -> str:
    """A leaf's path as its names joined by slashes, without the types of containers."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
