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
    "window 1, quarter": {"window": 1, "density": 0.25, "error_bits": 8},
    "window 3": {"window": 3, "density": 0.02, "block_size": 2048, "shards": 1},
    "window 3, quarter": {"window": 3, "density": 0.25, "error_bits": 2},
    "dense": {"window": 4, "density": 1.0},
    "alpha": {"window": 2, "density": 0.05, "alpha": 0.1},
    "stochastic": {"window": 1, "density": 0.06, "stochastic_rounding": True},
    "stochastic, alpha": {
        "window": 2,
        "density": 0.06,
        "alpha": 0.2,
        "stochastic_rounding": True,
        "seed": 7,
    },
    "literal": {"window": 3, "density": 0.05, "match_adam": False},
    "decays": {
        "b1": 0.0,
        "b2": 0.9,
        "eps": 1e-3,
        "eps_root": 0.01,
        "window": 2,
        "density": 0.04,
        "block_size": 64,
        "shards": 2,
    },
}

QUICK = (  # each option once; few bits and more of the entries are slow
    "defaults",
    "paper",
    "window 1, quarter",
    "window 3",
    "alpha",
    "stochastic",
    "literal",
    "decays",
)

SHAPES = [(), (700,), (3, 5, 67)]


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
    follow(shape, jnp.float32, {"window": 2, "density": 0.02}, 6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dtypes(dtype):
    follow((8, 64), dtype, {"window": 2, "density": 0.05}, 12)


def test_float64():
    with jax.enable_x64(True):
        gradient = jnp.linspace(-1.0, 2.0, 300, dtype=jnp.float64)
        tx = scale_by_microadam(window=2, density=0.1)
        update, state = jax.jit(tx.update), tx.init(gradient)
        single, state32 = gradient.astype(jnp.float32), state
        for _ in range(3):
            updates, state = update(gradient, state)
            updates32, state32 = update(single, state32)
        assert updates.dtype == jnp.float64
        np.testing.assert_array_equal(updates, updates32)
        chex.assert_trees_all_equal(state, state32, strict=True)
