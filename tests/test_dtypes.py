"""Gradients and parameters of different dtypes: updates have that of optax.adam's.

If it fails, mixed precision breaks: updates come in another dtype than from optax.adam.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
PAIRS = [(x, y) for x in (F32, BF16, F16) for y in (F32, BF16, F16)]


def gradient(dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=(5, 60)), dtype)


@pytest.mark.promotes
@pytest.mark.parametrize(("own", "param"), PAIRS)
def test_updates_have_the_dtype_of_adam(own, param):
    g, params = gradient(own), jnp.ones((5, 60), param)
    adam = optax.adam(0.1)
    want, _ = adam.update(g, adam.init(params), params)
    for dense in (None, True):
        tx = microadam(0.1, dense=dense)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, g, state, params)
        assert updates.dtype == want.dtype
        if dense is None:
            chex.assert_trees_all_equal_dtypes(state, after)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("own", "param"), PAIRS)
def test_parameters_change_no_bit_of_the_state(own, param):
    """And an update is the one that is rounded to the gradient's dtype without them."""
    tx = scale_by_microadam()
    g, params = gradient(own), jnp.ones((5, 60), param)
    states = [tx.init(params)] * 2
    for _ in range(3):
        alone, states[0] = tx.update(g, states[0])
        updates, states[1] = tx.update(g, states[1], params)
        assert alone.dtype == own
        np.testing.assert_array_equal(updates.astype(own), alone)
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_parameters_that_are_no_guide_are_left_alone():
    tx = scale_by_microadam()
    g = {"a": gradient(BF16), "b": gradient(BF16)}
    state = tx.init(g)
    others = (
        None,
        {"a": 1.0, "b": jnp.ones((5, 60), jnp.int32)},
        {"a": jnp.ones((5, 60), jnp.float8_e4m3fn), "b": optax.MaskedNode()},
        [jnp.ones(3)],
    )
    for params in others:
        updates, _ = tx.update(g, state, params)
        assert all(x.dtype == BF16 for x in jax.tree.leaves(updates))


@pytest.mark.promotes
@pytest.mark.parametrize(("own", "param"), [(BF16, F32), (F32, BF16)])
def test_training(own, param):
    """In a scan, and with `optax.MultiSteps` around: dtypes stay."""
    tx = optax.MultiSteps(microadam(0.1, weight_decay=0.1), 2)
    params = jnp.ones((5, 60), param)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(own), state, params)
        return (optax.apply_updates(params, updates), state), updates

    first = params, tx.init(params)
    (params, _), updates = jax.lax.scan(step, first, length=4)
    assert params.dtype == param
    assert updates.dtype == F32
    assert not np.asarray(updates[0]).any()
    assert np.asarray(updates[1]).any()
