"""Stochastic rounding of bfloat16 parameters: unbiased, to neighbours, nothing hidden.

If it fails, parameters in bfloat16 lose small updates, or drift.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_optax import apply_updates_stochastic, lost_updates

SAMPLES = 200_000
ULP = 2.0**-7  # of bfloat16 between 1 and 2


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("value", [1.0, -1.5, 3.0e-5, -7.0e20])
def test_unbiased(value, part):
    """The mean is right within five standard deviations (a chance of 6e-7 to fail)."""
    start = jnp.full(SAMPLES, value, jnp.bfloat16)
    at = np.float32(start[0])
    ulp = float(np.spacing(np.abs(at)) * 2**16)
    update = np.float32(part * ulp)
    new = apply_updates_stochastic(
        start, jnp.full(SAMPLES, update, jnp.float32), jax.random.key(1)
    )
    exact = np.float64(np.float32(at + update))
    found = np.asarray(new, np.float64)
    assert set(np.unique(found)) <= {at, np.float64(at + np.float64(ulp))}
    share = (exact - at) / ulp
    sigma = ulp * np.sqrt(max(share * (1 - share), 1e-12) / SAMPLES)
    # Of the 16 bits that decide none is missing: the share is exact to 2**-16.
    assert abs(found.mean() - exact) <= 5 * sigma + 2.0**-16 * ulp


def test_updates_add_up():
    """A thousand updates of a hundredth of a unit each move by ten units."""

    def body(step, x):
        return apply_updates_stochastic(
            x, jnp.full(4096, ULP / 100), jax.random.fold_in(jax.random.key(0), step)
        )

    start = jnp.ones(4096, jnp.bfloat16)
    end = jax.lax.fori_loop(0, 1000, body, start)
    # Each step's rounding has a variance of 0.01 * 0.99 units.
    sigma = ULP * np.sqrt(1000 * 0.01 * 0.99 / 4096)
    assert abs(np.asarray(end, np.float64).mean() - (1 + 10 * ULP)) < 5 * sigma
    ordinary = optax.apply_updates(start, jnp.full(4096, ULP / 100))
    np.testing.assert_array_equal(ordinary, start)


def test_what_fits_is_exact():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal(999), jnp.bfloat16)
    new = apply_updates_stochastic(
        jnp.zeros(999, jnp.bfloat16), values, jax.random.key(0)
    )
    np.testing.assert_array_equal(new, values)


@pytest.mark.makes_nan
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(value):
    new = apply_updates_stochastic(
        jnp.ones(999, jnp.bfloat16), jnp.full(999, value), jax.random.key(0)
    )
    np.testing.assert_array_equal(np.asarray(new, np.float32), np.full(999, value))


def test_other_dtypes_are_optax_s():
    params = {"half": jnp.ones(9, jnp.float16), "full": jnp.ones(9), "none": None}
    updates = {"half": jnp.full(9, 1e-5), "full": jnp.full(9, 1e-5), "none": None}
    new = apply_updates_stochastic(params, updates, jax.random.key(0))
    chex.assert_trees_all_equal(new, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal_dtypes(new, params)


def test_leaves_and_keys_draw_apart():
    params = {"a": jnp.ones(999, jnp.bfloat16), "b": jnp.ones(999, jnp.bfloat16)}
    updates = jax.tree.map(lambda _: jnp.full(999, ULP / 2), params)
    one = apply_updates_stochastic(params, updates, jax.random.key(0))
    again = jax.jit(apply_updates_stochastic)(params, updates, jax.random.key(0))
    other = apply_updates_stochastic(params, updates, jax.random.key(1))
    chex.assert_trees_all_equal(one, again)
    assert (one["a"] != one["b"]).any()
    assert (one["a"] != other["a"]).any()


@pytest.mark.promotes
def test_lost_updates():
    params = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4)}
    updates = {"a": jnp.array([0.0, ULP / 3, ULP, ULP / 3]), "b": jnp.full(4, 1e-6)}
    assert float(jax.jit(lost_updates)(params, updates)) == pytest.approx(2 / 7)
    assert float(lost_updates(params, jax.tree.map(jnp.zeros_like, updates))) == 0
    assert float(lost_updates({}, {})) == 0


@pytest.mark.parametrize("update", [None, 1.0])
def test_none_for_a_parameter_stays(update):
    """As with optax: whatever its update is, and nothing of it is counted as lost."""
    params, updates = {"a": None, "b": 1.0}, {"a": update, "b": 1e-9}
    new = apply_updates_stochastic(params, updates, jax.random.key(0))
    chex.assert_trees_all_equal(new, optax.apply_updates(params, updates))
    assert new["a"] is None
    assert float(lost_updates(params, updates)) == 1


@pytest.mark.parametrize(
    "function",
    [lost_updates, lambda *trees: apply_updates_stochastic(*trees, jax.random.key(0))],
)
def test_none_for_an_update(function):
    """Where optax raises an error, too, but does not say where."""
    trees = {"a": {"b": jnp.ones(2)}}, {"a": {"b": None}}
    with pytest.raises(TypeError):
        optax.apply_updates(*trees)
    with pytest.raises(TypeError, match=r"`updates` has None for \['a'\]\['b'\]"):
        function(*trees)


def test_python_numbers():
    params = {"full": 1.0, "half": jnp.ones([], jnp.bfloat16)}
    updates = {"full": 0.5, "half": 0.5}
    new = apply_updates_stochastic(params, updates, jax.random.key(0))
    chex.assert_trees_all_equal(new, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal_dtypes(new, optax.apply_updates(params, updates))
    assert float(lost_updates(params, {"full": 1e-9, "half": ULP})) == 0.5
