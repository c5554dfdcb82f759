"""Trajectories of XLA's path against the float64 oracle, over all options.

The kernels have its bits: test_kernels.py and test_cpu_kernel.py.

If it fails, updates and states are not those of the published algorithm.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import following
import oracle
from compressed import scale_by_microadam
from microadam_optax import PAPER
from quick import quick

pytestmark = pytest.mark.usefixtures("strict")

CASES = {
    "defaults": {},
    "paper": PAPER,
    "paper, two bits": {**PAPER, "error_bits": 2},
    "paper, eight bits": {**PAPER, "error_bits": 8},
    "window 1": {"window": 1, "density": 0.12},
    "window 1, quarter": {"window": 1, "density": 0.25, "error_bits": 8},
    "window 2, one entry": {"window": 2, "density": 0.001},
    "window 3": {"window": 3, "density": 0.04},
    "window 3, quarter": {"window": 3, "density": 0.25, "error_bits": 2},
    "dense": {"window": 4, "density": 1.0},
    "small blocks": {"window": 5, "density": 0.1, "block_size": 64, "shards": 2},
    "one large block": {"window": 3, "density": 0.02, "block_size": 2048, "shards": 1},
    "alpha": {"window": 3, "density": 0.05, "alpha": 0.1},
    "alpha, window 1": {"window": 1, "density": 0.12, "alpha": 0.5, "error_bits": 8},
    "stochastic": {"window": 2, "density": 0.06, "stochastic_rounding": True},
    "stochastic, alpha": {
        "window": 2,
        "density": 0.06,
        "alpha": 0.2,
        "stochastic_rounding": True,
        "seed": 7,
    },
    "eps_root": {"b2": 0.9, "eps_root": 0.01, "window": 3, "density": 0.1},
    "eps_root, window 1": {"eps": 1e-12, "eps_root": 1e-6, "window": 1, "density": 0.12},
    "literal": {"window": 3, "density": 0.05, "match_adam": False},
    "literal, window 1": {"window": 1, "density": 0.12, "match_adam": False},
    "literal, eps_root": {
        "window": 2,
        "density": 0.06,
        "eps_root": 0.01,
        "match_adam": False,
    },
    "decays": {"b1": 0.0, "b2": 0.9, "eps": 1e-3, "window": 3, "density": 0.1},
}

QUICK = (  # each option once
    "defaults",
    "paper",
    "window 1, quarter",
    "window 3",
    "dense",
    "small blocks",
    "one large block",
    "alpha",
    "stochastic",
    "eps_root",
    "literal",
    "decays",
)

SHAPES = [(), (1,), (2,), (700,), (3, 5, 67), (2, 2, 2, 2, 33)]


def gradients(shape, dtype, rng):
    """Heavy tails, a column that is always large, some exact zeros and ties."""
    scale = np.exp(rng.normal(size=shape))
    while True:
        g = rng.normal(size=shape) * scale
        g = np.where(rng.random(shape) < 0.05, 0.0, g)
        g = np.where(rng.random(shape) < 0.05, 0.75, g)
        yield jnp.asarray(g, dtype)


def follow(shape, dtype, arguments, steps):
    """Runs both side by side."""
    tx = scale_by_microadam(**arguments, implementation="xla")
    known = {
        "error_bits": "bits",
        **dict.fromkeys(("stochastic_rounding", "seed", "dense")),
    }
    names = {known.get(name, name): value for name, value in arguments.items()}
    names.pop(None, None)
    random = arguments.get("stochastic_rounding")
    following.follow(
        jax.jit(tx.update),
        tx.init(jnp.zeros(shape, dtype)),
        itertools.islice(gradients(shape, dtype, np.random.default_rng(0)), steps),
        oracle.Options(**names),
        arguments.get("seed", 0) if random else None,
    )


@pytest.mark.parametrize("case", quick(CASES, *QUICK))
def test_options(case):
    follow((13, 40), jnp.float32, CASES[case], 25)


@pytest.mark.parametrize("shape", quick(SHAPES, (), (3, 5, 67)))
def test_shapes(shape):
    follow(shape, jnp.float32, {"window": 3, "density": 0.05}, 6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("window", quick([1, 2, 10], 2))
def test_dtypes(dtype, window):
    follow((8, 64), dtype, {"window": window, "density": 0.05}, 12)


def test_float64():
    with jax.enable_x64(True):
        gradient = jnp.linspace(-1.0, 2.0, 300, dtype=jnp.float64)
        tx = scale_by_microadam(window=2, density=0.1)
        state = tx.init(gradient)
        for _ in range(3):
            updates, state = tx.update(gradient, state)
        assert updates.dtype == jnp.float64
        single, state32 = gradient.astype(jnp.float32), tx.init(gradient)
        for _ in range(3):
            updates32, state32 = tx.update(single, state32)
        np.testing.assert_array_equal(updates, updates32)
        chex.assert_trees_all_equal(state, state32, strict=True)
