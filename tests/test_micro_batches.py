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


@pytest.mark.parametrize(
    ("implementation", "every"),
    quick(
        [*((x, 3) for x in IMPLEMENTATIONS), (None, 7)],
        *((x, 3) for x in IMPLEMENTATIONS),
        several=True,
    ),
)
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
    inner = microadam(1e-2, window=1, density=0.1, implementation="xla")
    leaf = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)

    def temporary(tx):
        def step(gradient, state, params):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(1, 2))
        compiled = jitted.lower(leaf, jax.eval_shape(tx.init, leaf), leaf).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(accumulate(inner, 4)) < temporary(inner) + leaf.size


def test_a_part_that_is_jitted_by_itself():
    """Each micro-batch has its own number there, though the part is compiled once."""
    one = scale_by_microadam(dense=None)
    part = optax.GradientTransformation(one.init, jax.jit(one.update))
    known, tx = accumulate(one, 3), accumulate(optax.chain(part), 3)
    state, states = known.init(jnp.zeros(SHAPE)), tx.init(jnp.zeros(SHAPE))
    rng = np.random.default_rng(0)
    for i in range(1, 7):
        g = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
        _, state = jax.jit(known.update)(g, state)
        updates, states = tx.update(g, states)
        own = states.inner_opt_state[0]
        jax.tree.map(np.testing.assert_array_equal, own, state.inner_opt_state)
        assert np.any(updates) == (i % 3 == 0)
    assert int(own.count) == 2


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_part_that_is_vmapped_by_itself(implementation):
    """Each of the leaves along the axis has the bits that it has alone."""
    settings = {"window": 1, "density": 0.1, "dense": None}
    one = scale_by_microadam(implementation=implementation, **settings)
    alone = accumulate(one, 3)
    several = optax.GradientTransformation(
        jax.vmap(one.init), lambda g, state, _=None: jax.vmap(one.update)(g, state)
    )
    tx = accumulate(several, 3)
    shape = (2, *SHAPE)
    state, states = tx.init(jnp.zeros(shape)), [alone.init(jnp.zeros(SHAPE))] * 2
    rng = np.random.default_rng(0)
    for _ in range(4):
        g = jnp.asarray(rng.normal(size=shape), jnp.float32)
        _, state = jax.jit(tx.update)(g, state)
        for i in range(2):
            _, states[i] = jax.jit(alone.update)(g[i], states[i])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(x.inner_opt_state for x in states))
    jax.tree.map(np.testing.assert_array_equal, state.inner_opt_state, stacked)
    assert state.inner_opt_state.count.tolist() == [1, 1]
