"""The optimizers that are compared, each a function of the learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from microadam_optax import microadam, smaller_than

SMALL = 4096  # leaves of fewer elements are dense, where a method says so


class Method(NamedTuple):
    """An optimizer, and the learning rate that its search begins around.

    None is Adam's best rate, without a search.
    """

    make: Callable[[Any], optax.GradientTransformation]
    centre: float | None


def micro(window: int, density: float, **kwargs: Any) -> Method:
    """MicroAdam as it comes, at Adam's rate."""
    kwargs = {"dense": smaller_than(SMALL), **kwargs}
    return Method(
        lambda rate: microadam(rate, window=window, density=density, **kwargs), None
    )


def literal(window: int, density: float, centre: float, **kwargs: Any) -> Method:
    """MicroAdam with `match_adam=False`, at a rate of its own."""
    return micro(window, density, match_adam=False, **kwargs)._replace(centre=centre)


def galore(rate: Any) -> optax.GradientTransformation:
    return optax.contrib.galore(rate, rank=32)


PEERS = {
    "Adam": Method(optax.adam, 2e-3),
    "AdamW, mu in bfloat16": Method(
        lambda rate: optax.adamw(rate, mu_dtype=jnp.bfloat16), 2e-3
    ),
    "Adafactor": Method(optax.adafactor, 2e-2),
    "Lion": Method(optax.lion, 3e-4),
    "GaLore, rank 32": Method(galore, 5e-3),
}

PAPER = "MicroAdam (10, 1 %), all compressed"
DEFAULT, LEAST = "MicroAdam (2, 6 %)", "MicroAdam (1, 4 %)"
OURS = {
    PAPER: literal(10, 0.01, 2e-3, dense=None),
    DEFAULT: micro(2, 0.06),
    LEAST: micro(1, 0.04),
}
MAIN = {**PEERS, **OURS}

WINDOWS = {
    f"MicroAdam ({window}, {round(100 * density)} %), literal": literal(
        window, density, centre
    )
    for window, density, centre in [
        (10, 0.01, 2e-3),
        (5, 0.02, 4e-3),
        (3, 0.04, 4e-3),
        (2, 0.06, 4e-3),
        (2, 0.12, 2e-3),
        (1, 0.01, 8e-3),
        (1, 0.04, 8e-3),
        (1, 0.12, 4e-3),
        (1, 0.25, 8e-3),
    ]
}


def options(name: str, window: int, density: float, centre: float) -> dict[str, Method]:
    """A setting with one thing changed at a time."""
    changes: dict[str, dict[str, Any]] = {
        "block 64": {"block_size": 64},
        "block 4096": {"block_size": 4096},
        "2 bits": {"error_bits": 2},
        "8 bits": {"error_bits": 8},
        "stochastic rounding": {"stochastic_rounding": True},
        "alpha 0.1": {"alpha": 0.1},
        "all compressed": {"dense": None},
        "b2 0.99": {"b2": 0.99},
        "b2 0.95": {"b2": 0.95},
    }
    return {
        f"MicroAdam {name}, {change}, literal": literal(window, density, centre, **kwargs)
        for change, kwargs in changes.items()
    }


def scaled(methods: dict[str, Method], factor: float) -> dict[str, Method]:
    """The same with other rates to begin with: fine-tuning wants smaller ones."""
    return {
        name: method._replace(centre=method.centre and method.centre * factor)
        for name, method in methods.items()
    }


SHORT_OPTIONS = {
    "MicroAdam (1, 4 %), all compressed, literal": literal(1, 0.04, 8e-3, dense=None),
    **options("(2, 6 %)", 2, 0.06, 4e-3),
}
LONG_OPTIONS = options("(10, 1 %)", 10, 0.01, 2e-3)
del LONG_OPTIONS["MicroAdam (10, 1 %), all compressed, literal"]  # which is PAPER
OPTIONS = {**LONG_OPTIONS, **SHORT_OPTIONS}
ALL = {**MAIN, **WINDOWS, **OPTIONS}
