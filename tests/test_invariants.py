"""What holds over many steps, and what the paper's theory rests on.

If it fails, long runs diverge: the error grows, or what is not selected is lost.

reliability/long_runs.py runs the same checks for 100,000 steps.
"""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import long_runs
from compressed import scale_by_microadam
from microadam_optax import _topk
from quick import quick

MOST = np.iinfo(np.int32).max


OURS, RANDOM = "(2, 6 %)", "(2, 6 %), stochastic"


@pytest.mark.parametrize("setting", quick([OURS, RANDOM], OURS))
def test_the_error_stays_bounded(setting):
    found = long_runs.error_norms(setting, steps=2000)
    assert found["largest_of_last_half"] <= 1.25 * found["largest_of_first_half"]


@pytest.mark.parametrize("setting", quick(["(10, 1 %)", OURS], OURS))
def test_nothing_is_lost_over_many_steps(setting):
    found = long_runs.conservation(setting, steps=500)
    assert found["largest_gap_over_bound"] <= 1
    assert found["largest_gap"] > 0  # there is rounding, and it is seen


def test_untouched_coordinates_and_padding_stay():
    found = long_runs.untouched(OURS, steps=2000)
    assert found.pop("others_moved") > 0.9
    assert found == {"moved": 0, "error": 0, "padding": 0}


@given(
    arrays.arrays(np.float32, 24, elements=st.floats(-(2.0**50), 2.0**50, width=32)),
    st.sampled_from([1, 7, 24]),
)
@settings(max_examples=50)
def test_selection_contracts(x, k):
    """What is left has at most ``1 - k / b`` of the square."""
    mask = np.asarray(jax.jit(_topk.largest, static_argnums=1)(x[None], k))[0]
    rest = np.where(mask, 0, x).astype(np.float64)
    whole = x.astype(np.float64)
    assert rest @ rest <= (1 - k / x.size) * (whole @ whole) * (1 + 1e-12)


@pytest.mark.promotes
def test_the_last_count_stays():
    """At the end of int32 the number of steps stays where it is, as optax's does."""
    tx, adam = scale_by_microadam(window=3, density=0.25), optax.scale_by_adam()
    g = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    state = tx.init(g)._replace(count=jnp.int32(MOST - 2))
    other = adam.init(g)._replace(count=jnp.int32(MOST - 2))
    for _ in range(4):
        updates, state = jax.jit(tx.update)(g, state)
        _, other = jax.jit(adam.update)(g, other)
        assert np.isfinite(updates).all()
    assert int(state.count) == int(other.count) == MOST
    assert np.any(updates)


@pytest.mark.parametrize("window", [2, 5])
def test_slots_are_overwritten_in_turn(window):
    """A gradient that names its step: each slot holds one of the last steps."""
    tx = scale_by_microadam(window=window, density=1 / 64, shards=1)
    state, slots = tx.init(jnp.zeros(64)), window - 1
    update = jax.jit(tx.update)
    for step in range(1, 4 * window):
        g = jnp.zeros(64).at[step % 64].set(float(step))
        _, state = update(g, state)
        held = np.asarray(state.values, np.float32).ravel()
        last = [s for s in range(step, step - slots, -1) if s > 0]
        assert sorted(held[held != 0]) == sorted(last)
        assert held[(step - 1) % slots] == step
        assert int(state.indices.ravel()[(step - 1) % slots]) == step % 64


@pytest.mark.parametrize("window", [2, 4])
def test_no_position_stands_twice_in_a_slot(window):
    """Not before the first step either: the scatter relies on it."""
    tx = scale_by_microadam(window=window, density=0.1)
    state = tx.init(jnp.zeros((2, 64)))
    slots = np.asarray(state.indices).reshape(-1, window - 1, 7)
    assert all(len(set(slot)) == 7 for row in slots for slot in row.tolist())
