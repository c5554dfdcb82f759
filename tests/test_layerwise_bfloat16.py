"""Layer by layer in bfloat16: the ordinary step, in every bit, also rounded at random.

If it fails, a model in bfloat16 trained layer by layer learns something else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import same_bits
from microadam_optax import apply_updates_stochastic
from quick import quick
from stacked_layers import (
    LAYERS,
    TRANSFORMATIONS,
    assert_same_bits,
    by_layers,
    data,
    ordinary,
    parameters,
    run,
)

BFLOAT16 = jnp.bfloat16
TX = TRANSFORMATIONS["default"]
EXACT = {"xla_allow_excess_precision": False}  # no rounding to bfloat16 is skipped


@pytest.mark.parametrize("name", quick(["default", "random rounding"], "default"))
def test_it_is_the_ordinary_step(name):
    """Parameters, state, loss and the gradient of the input, in every bit."""
    tx, params = TRANSFORMATIONS[name], parameters(BFLOAT16)
    found = [
        run(step, tx, 20, parameters(BFLOAT16), tx.init(params))
        for step in (ordinary, by_layers)
    ]
    assert found[0][0]["up"].dtype == BFLOAT16
    assert_same_bits(*found)
    moved = np.asarray(found[0][0]["up"] != params["up"])
    assert moved.mean() > 0.1


def rounded(key, layer, updates, number):
    return apply_updates_stochastic(layer, updates, jax.random.fold_in(key, number))


def ordinary_at_random(tx, key, params, state, x, target):
    """All gradients first; then each layer is rounded with noise of its own."""

    def apply(params, updates):
        stacked = jax.tree.map(lambda a: a[:, None], (params, updates))
        one = functools.partial(jax.tree.map, lambda a: a[0])
        each = jnp.arange(LAYERS), *stacked
        return jax.lax.map(lambda x: one(rounded(key, *x[1:], x[0])), each)

    return ordinary(tx, params, state, x, target, apply)


def by_layers_at_random(tx, key, params, state, x, target):
    apply = functools.partial(rounded, key)
    return by_layers(tx, params, state, x, target, apply)


def run_at_random(step, steps, first=0):
    """What comes of some steps, with a key for each."""
    params = parameters(BFLOAT16)
    state = TX.init(params)
    for i in range(first, first + steps):
        params, state, *others = step(jax.random.key(i), params, state, *data(BFLOAT16))
    return params, state, *others


def both(options):
    return [
        jax.jit(functools.partial(step, TX), compiler_options=options)
        for step in (ordinary_at_random, by_layers_at_random)
    ]


def test_rounded_at_random_it_is_the_ordinary_step():
    one, other = both(EXACT)
    found = run_at_random(one, 10)
    assert_same_bits(run_at_random(other, 10), found)
    with_other_keys = run_at_random(one, 10, first=10)
    assert np.asarray(found[0]["up"] != with_other_keys[0]["up"]).any()


@pytest.mark.slow
def test_rounded_at_random_as_xla_compiles_by_default():
    """One step from the same start: the same state, and parameters that are neighbours.

    XLA may skip the rounding of an update u to bfloat16, which has 8 significant bits, in
    one program and not in the other. So exact sums are at most |u| / 256 apart. Rounded
    with the same noise, which keeps their order, they end at most that and a unit of the
    result apart: |p| / 128 for what comes out. They differ with the probability of that
    distance over the unit, which is above |p| / 256: at most |u| / |p|, and twice that
    is allowed, since either p may be meant.
    """
    one, other = (run_at_random(step, 1) for step in both(None))
    assert_same_bits(one[1:], other[1:])
    for leaf, start in parameters(BFLOAT16).items():
        p, got, want = (
            np.asarray(x, np.float32) for x in (start, one[0][leaf], other[0][leaf])
        )
        unit = np.maximum(np.abs(got), np.abs(want)) / 128
        update = np.abs(want - p) + unit  # at most, before it was rounded
        assert (np.abs(got - want) <= update / 256 + unit).all()
        share = np.minimum(1, 2 * update / np.maximum(np.abs(want), 1e-30))
        assert (got != want).mean() <= share.mean()


@pytest.mark.slow
def test_a_model_of_llamas_kind_on_this_device():
    assert same_bits.compare("MicroAdam", "bfloat16", True, steps=3) == {}


def test_another_gradient_is_seen():
    one = {"w": jnp.array([1.0, jnp.nan, 2.0])}
    other = {"w": jnp.array([1.0, jnp.nan, 3.0])}
    assert same_bits.different(one, one) == {}
    assert same_bits.different(one, other) == {"['w']": 1}
