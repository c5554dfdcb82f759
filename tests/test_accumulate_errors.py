"""What `accumulate` cannot do is said in one sentence, before anything is computed.

If it fails, a mistake around micro-batches trains wrongly, or ends in a riddle.
"""

import jax.numpy as jnp
import optax
import pytest

from microadam_optax import accumulate, microadam

PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.ones(8)}


@pytest.mark.parametrize("kind", [tuple, list, "inner"])
def test_states_of_something_else(kind):
    tx, inner = accumulate(microadam(1e-2), 2), microadam(1e-2)
    state = inner.init(PARAMS) if kind == "inner" else kind(tx.init(PARAMS))
    name = type(state).__name__
    message = rf"^The state must be an AccumulateState, got a {name}: .*\.$"
    with pytest.raises(TypeError, match=message):
        tx.has_updated(state)
    with pytest.raises(TypeError, match=message):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("tx", [microadam, None, microadam(1e-2).update])
def test_what_is_no_transformation(tx):
    with pytest.raises(TypeError, match=r"^`tx` must be an optax\.Gradient.*, got .*\.$"):
        accumulate(tx, 2)


def several(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


@pytest.mark.parametrize("make", [lambda tx: accumulate(tx, 2), several])
def test_accumulating_twice(make):
    tx = accumulate(optax.chain(make(microadam(1e-2))), 2)
    with pytest.raises(ValueError, match=r"^`tx` must not accumulate micro-batches"):
        tx.init(PARAMS)
    outside = several(accumulate(microadam(1e-2), 2))
    outside.update(PARAMS, outside.init(PARAMS), PARAMS)


def test_a_flattened_tree():
    tx = accumulate(optax.flatten(microadam(1e-2)), 2)
    with pytest.raises(ValueError, match=r"state of the only leaf, which .*flatten.*\.$"):
        tx.init(PARAMS)
    tx = optax.flatten(accumulate(microadam(1e-2), 2))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_leaves_that_are_numbers_of_python_are_taken():
    tx = accumulate(microadam(1e-2), 2)
    state = tx.init({"x": 1.0})
    for _ in range(2):
        updates, state = tx.update({"x": 1.0}, state, {"x": 1.0})
    assert updates["x"] < 0


@pytest.mark.parametrize(
    ("gradient", "error", "words"),
    [
        (jnp.ones(9), ValueError, r"\(9,\), but the state of `accumulate` \(8,\)\.$"),
        ("one", TypeError, r"must be arrays, but \['b'\] is str\.$"),
        (jnp.ones(8, int), TypeError, r"floating-point arrays, but \['b'\] is int32;"),
    ],
)
def test_gradients_of_leaves_that_are_summed(gradient, error, words):
    tx, params = accumulate(microadam(1e-2), 2), {"b": jnp.ones(8)}
    with pytest.raises(error, match=words):
        tx.update({"b": gradient}, tx.init(params), params)
