"""Layer by layer in bfloat16: the ordinary step, in every bit, also rounded at random.

If it fails, a model in bfloat16 trained layer by layer learns something else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import same_bits
from microadam_optax import apply_updates_stochastic, microadam
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
EXACT = {"xla_allow_excess_precision": False}  # no rounding to bfloat16 is skipped


@pytest.mark.parametrize(
    "name", quick(["default", "adamw", "random rounding"], "default", "adamw")
)
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
        new = [
            rounded(key, *jax.tree.map(lambda a, i=i: a[i : i + 1], (params, updates)), i)
            for i in range(LAYERS)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *new)

    return ordinary(tx, params, state, x, target, apply)


def by_layers_at_random(tx, key, params, state, x, target):
    apply = functools.partial(rounded, key)
    return by_layers(tx, params, state, x, target, apply)


def both(tx, steps, options):
    """What comes of either way, rounded at random with the same keys."""
    found = []
    for step in (ordinary_at_random, by_layers_at_random):
        params = parameters(BFLOAT16)
        state = tx.init(params)
        jitted = jax.jit(functools.partial(step, tx), compiler_options=options)
        for i in range(steps):
            key = jax.random.key(i)
            params, state, *others = jitted(key, params, state, *data(BFLOAT16))
        found.append((params, state, *others))
    return found


@pytest.mark.parametrize("name", quick(["default", "adamw"], "default"))
def test_rounded_at_random_it_is_the_ordinary_step(name):
    one, other = both(TRANSFORMATIONS[name], 10, EXACT)
    assert_same_bits(one, other)
    plain = run(ordinary, TRANSFORMATIONS[name], 10, *started(name))
    assert np.asarray(one[0]["up"] != plain[0]["up"]).any()


def started(name):
    params = parameters(BFLOAT16)
    return params, TRANSFORMATIONS[name].init(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default"])
def test_rounded_at_random_as_xla_compiles_by_default(name):
    """One step from the same start: the same state, and parameters that are neighbours.

    XLA may skip the rounding of an update u to bfloat16, which has 8 significant bits, in
    one program and not in the other. So exact sums are at most |u| / 256 apart. Rounded
    with the same noise, which keeps their order, they end at most that and a unit of the
    result apart: |p| / 128 for what comes out. They differ with the probability of that
    distance over the unit, which is above |p| / 256: at most |u| / |p|, and twice that
    is allowed, since either p may be meant.
    """
    tx = TRANSFORMATIONS[name]
    one, other = both(tx, 1, None)
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
def test_bfloat16_parameters_rounded_at_random():
    """Each layer with noise of its own; on average where float32 would be."""
    tx, params = microadam(1e-3), parameters(jnp.bfloat16)
    params["up"] = jnp.broadcast_to(params["up"][:1], params["up"].shape)
    state, keys = tx.init(params), jax.random.split(jax.random.key(0), 20)

    def step(key, params, state, x, target):
        def apply(layer, updates, number):
            own = jax.random.fold_in(key, number)
            return apply_updates_stochastic(layer, updates, own)

        return by_layers(tx, params, state, x, target, apply)

    step = jax.jit(step)
    values = []
    for key in keys:
        params, state, value, _ = step(key, params, state, *data(jnp.bfloat16))
        values.append(float(value))
    assert params["up"].dtype == jnp.bfloat16
    assert values[-1] < 0.9 * values[0]


@pytest.mark.slow
def test_a_model_of_llamas_kind_on_this_device():
    assert same_bits.compare("MicroAdam", "bfloat16", True, steps=3) == {}


def test_another_gradient_is_seen():
    one = {"w": jnp.array([1.0, jnp.nan, 2.0])}
    other = {"w": jnp.array([1.0, jnp.nan, 3.0])}
    assert same_bits.different(one, one) == {}
    assert same_bits.different(one, other) == {"['w']": 1}
