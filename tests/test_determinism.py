"""The same bits every time, however it is run, and from several threads.

If it fails, a run cannot be repeated to the bit.
"""

import concurrent.futures
import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam
from quick import quick

STEPS = 8
TX = microadam(1e-2, window=3, density=0.06)


def model(width):
    """Parameters, and a loss that is not trivial."""
    keys = jax.random.split(jax.random.key(width), 2)
    params = {"w": jax.random.normal(keys[0], (40, width)), "b": jnp.zeros(width)}
    x = jax.random.normal(keys[1], (16, 40))
    return params, lambda params: jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def step(loss, carry, _=None):
    params, state = carry
    updates, state = TX.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None


def looped(one, carry):
    for _ in range(STEPS):
        carry, _ = one(carry)
    return carry


def scanned(one, carry):
    return jax.jit(lambda carry: jax.lax.scan(one, carry, length=STEPS)[0])(carry)


def train(width, run):
    params, loss = model(width)
    return run(functools.partial(step, loss), (params, TX.init(params)))


def jitted(one, carry):
    return looped(jax.jit(one), carry)


def donated(one, carry):
    return looped(jax.jit(one, donate_argnums=0), jax.tree.map(jnp.copy, carry))


def digest(tree):
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("run", [donated, scanned])
def test_jit_scan_and_donation_give_the_same_bits(run):
    assert digest(train(24, run)) == digest(train(24, jitted))


def test_the_update_has_the_same_bits_when_called_eagerly():
    """Of equal gradients: those of a model may round otherwise without jit."""
    params, loss = model(24)
    gradients = jax.jit(jax.grad(loss))(params)
    states = []
    for update in (TX.update, jax.jit(TX.update)):
        state = TX.init(params)
        for _ in range(STEPS):
            updates, state = update(gradients, state, params)
        states.append((updates, state))
    assert digest(states[0]) == digest(states[1])


@pytest.mark.slow
def test_another_process_gives_the_same_bits():
    """One that compiles for itself."""
    code = "import test_determinism as t; print(t.digest(t.train(24, t.jitted)))"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    pipe = {"stdout": subprocess.PIPE, "text": True}
    run = subprocess.run(command, env=env, check=True, **pipe)
    assert run.stdout.strip() == digest(train(24, jitted))


def test_one_transformation_serves_two_models_in_two_threads():
    """Interleaved and at once: each as if it was alone."""
    widths = (24, 56)
    alone = {width: digest(train(width, jitted)) for width in widths}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = [(width, pool.submit(train, width, jitted)) for width in widths * 2]
        for width, run in runs:
            assert digest(run.result()) == alone[width]


def test_states_of_other_models_are_refused():
    (one, _), (other, _) = model(24), model(56)
    state = TX.init(one)
    with pytest.raises(ValueError, match=r"\['b'\] is that of .* \(24,\) .* \(56,\)"):
        TX.update(other, state, other)
    renamed = {"v": one["w"], "b": one["b"]}
    with pytest.raises(ValueError, match=r"there is no gradient for \['w'\]"):
        TX.update(renamed, state, renamed)
    reshaped = {"w": one["w"].reshape(20, 48), "b": one["b"]}
    with pytest.raises(ValueError, match=r"\['w'\] is (not )?that of .* \(20, 48\)"):
        jax.jit(TX.update)(reshaped, state, reshaped)


@pytest.mark.parametrize("shape", quick([(40, 64), (512, 1024)], (40, 64)))
def test_stochastic_rounding_does_not_depend_on_the_default_generator(shape):
    """Of a leaf that is computed whole, and of one in pieces."""
    tx = scale_by_microadam(stochastic_rounding=True, seed=3)
    gradient = jax.random.normal(jax.random.key(0), shape)
    state = tx.init(gradient)
    want = jax.jit(tx.update)(gradient, state)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(tx.init(gradient).key, state.key)
        got = jax.jit(tx.update)(gradient, state)
    assert digest(got) == digest(want)
