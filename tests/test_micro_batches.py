"""Micro-batches have the same bits whoever computes them, however they get there.

If it fails, a run goes on otherwise on another device, or a transformation that is
jitted or vmapped by itself trains wrongly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from following import state_blocks
from microadam_optax import accumulate, microadam, scale_by_microadam
from quick import quick

IMPLEMENTATIONS = [None, "xla", "interpret_gpu", "interpret_tpu"]
SHAPE = (64, 64)


def codes_and_steps(state):
    codes, ranges, *_ = state_blocks(state.inner_opt_state, 4)
    ranges = np.asarray(ranges)
    return codes - ranges[:, 1:], ranges[:, :1]


def gradient(total, error, every):
    """Whose share and the error add up to `total`, in float32 without a rounding."""
    lane = np.arange(SHAPE[1])
    ends = np.where(lane == 0, 1.0, -1.0)  # they determine the step
    exact = every * (np.where(lane < 2, ends, total) - error)
    assert np.all(exact == exact.astype(np.float32))
    return jnp.asarray(exact, jnp.float32)


@pytest.mark.parametrize("every", quick([3, 5, 6, 7], 3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shares_are_rounded_before_they_are_added(implementation, every):
    """Halfway between two codes, where the last bit of a share decides."""
    tx = scale_by_microadam(
        dense=None, implementation=implementation, block_size=64, shards=1
    )
    tx = accumulate(tx, every)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(SHAPE))
    rng = np.random.default_rng(0)
    first = rng.integers(-1000, 1000, SHAPE) / 1024
    _, state = update(gradient(first, 0, every), state)
    points, steps = codes_and_steps(state)
    error = points * steps
    g = gradient((rng.integers(-6, 6, SHAPE) + 0.5) * steps, error, every)
    _, state = update(g, state)
    total = np.asarray(g) * np.float32(1 / every) + error.astype(np.float32)
    points, after = codes_and_steps(state)
    np.testing.assert_array_equal(after, steps)
    np.testing.assert_array_equal(points, np.floor(total / steps + 0.5))


def test_a_gradient_that_is_an_argument_is_copied_once():
    """As without micro-batches: an argument that is not donated cannot be written."""
    inner = microadam(1e-2, implementation="xla")
    leaf = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)

    def temporary(tx):
        def step(gradient, state, params):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(1, 2))
        compiled = jitted.lower(leaf, jax.eval_shape(tx.init, leaf), leaf).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(accumulate(inner, 4)) < temporary(inner) + leaf.size
