"""Derivatives through an update: what is selected does not change, codes have none.

If it fails, whoever differentiates through an update gets wrong gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam
from quick import quick

WHOLE, CHUNKED = (40, 256), (512, 1024)
NUMBERS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 0.05}
WAYS = {
    "window 2": (WHOLE, jnp.float32, 2),
    "in pieces, window 1": (CHUNKED, jnp.float32, 1),
    "in pieces, window 4": (CHUNKED, jnp.bfloat16, 4),
}


def random(shape, dtype=jnp.float32, seed=0):
    """Numbers that bfloat16 represents."""
    x = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return x.astype(dtype)


def traced(numbers):
    return jax.tree.map(jnp.float32, numbers)


def plain(gradient, numbers, mask, newest, older, count):
    """The update of what is selected, which has the values `newest`, in rows.

    `older` has for each slot its age and its dense values.
    """
    moved = newest + (gradient - jax.lax.stop_gradient(gradient)) * mask
    mu = moved + sum(numbers["b1"] ** age * x for age, x in older)
    nu = moved**2 + sum(numbers["b2"] ** age * x**2 for age, x in older)
    mu *= (1 - numbers["b1"]) / (1 - numbers["b1"] ** count)
    nu *= (1 - numbers["b2"]) / (1 - numbers["b2"] ** count)
    return mu / (jnp.sqrt(nu + numbers["eps_root"]) + numbers["eps"])


def dense(indices, values, block):
    """A slot's entries in their rows; and 1 where there are any."""
    rows = np.zeros((len(indices), block), np.float32)
    np.put_along_axis(rows, indices.astype(int), values.astype(np.float32), -1)
    mask = np.zeros_like(rows)
    np.put_along_axis(mask, indices.astype(int), np.float32(1), -1)
    return rows, mask


def expected(state, gradient, after, updates):
    """`plain` of what was selected, as a function of gradient and numbers."""
    block, count = state.codes.shape[-1] * 2, int(after.count)
    rows = (-1, block)
    if state.indices is None:  # the first step, without an error
        mask = (np.asarray(updates).reshape(rows) != 0).astype(np.float32)
        newest, older = np.asarray(gradient, np.float32).reshape(rows) * mask, []
    else:
        slots, ages = state.ages.size, np.asarray(state.ages)
        now, then = (
            [
                dense(*both, block)
                for both in zip(
                    *(
                        np.split(np.asarray(x).reshape(-1, x.shape[-1]), slots, -1)
                        for x in (s.indices, s.values)
                    ),
                    strict=True,
                )
            ]
            for s in (after, state)
        )
        newest, mask = now[ages.argmax()]
        older = [(int(age), x) for age, (x, _) in zip(ages, then, strict=True)]

    def f(gradient, numbers):
        x = gradient.astype(jnp.float32).reshape(rows)
        return plain(x, numbers, mask, newest, older, count).reshape(gradient.shape)

    return f


@pytest.mark.promotes
@pytest.mark.parametrize("way", quick(WAYS, "window 2"))
def test_of_what_is_selected(way):
    """Forwards and backwards, by the gradient and by the numbers."""
    shape, dtype, window = WAYS[way]
    numbers = traced(NUMBERS)

    def update(gradient, numbers, state):
        literal = {"match_adam": False, "implementation": "xla"}
        tx = scale_by_microadam(**numbers, window=window, **literal)
        return tx.update(gradient, state)

    gradient, state = random(shape, dtype), scale_by_microadam(window=window).init
    state = state(gradient)
    for seed in range(1, window):
        _, state = jax.jit(update)(random(shape, dtype, seed), numbers, state)
    updates, after = jax.jit(update)(gradient, numbers, state)
    g = expected(state, gradient, after, updates)

    def f(gradient, numbers):
        return update(gradient, numbers, state)[0]

    moved = random(shape, dtype, 7), traced(dict.fromkeys(NUMBERS, 0.5))
    got = jax.jit(functools.partial(jax.jvp, f))((gradient, numbers), moved)
    want = jax.jvp(g, (gradient, numbers), moved)
    np.testing.assert_array_equal(got[0], updates)
    rtol = max(2.0**-18, float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(got[1].astype(jnp.float32), want[1], rtol=rtol, atol=rtol)

    cotangent = random(shape, dtype, 8)
    back = jax.jit(lambda *x: jax.vjp(f, *x)[1](cotangent))(gradient, numbers)
    want = jax.vjp(g, gradient, numbers)[1](cotangent.astype(jnp.float32))
    np.testing.assert_allclose(
        back[0].astype(jnp.float32), want[0].astype(jnp.float32), rtol=rtol, atol=rtol
    )
    size = float(jnp.sum(jnp.abs(cotangent.astype(jnp.float32))))
    for name in NUMBERS:
        error = abs(float(back[1][name]) - float(want[1][name]))
        assert error <= rtol * size, name
        if window > 1:  # at the first step the decays change nothing
            assert abs(float(want[1][name])) > 10 * rtol, name


@functools.partial(jax.jit, static_argnums=0)
def moved_by(f, point, tangents):
    """What a result moves by."""
    return jax.jvp(f, point, tangents)[1]


@pytest.mark.promotes
@pytest.mark.slow
def test_all_selected_is_adam():
    """Through several steps, by every gradient and by the numbers."""
    steps = 3
    numbers = traced(NUMBERS)
    gradients = [random((20, 32), seed=i) for i in range(steps)]

    def last(make, gradients, numbers):
        tx = make(**numbers)
        state = tx.init(gradients[0])
        for gradient in gradients:
            updates, state = tx.update(gradient, state)
        return updates

    ours = functools.partial(scale_by_microadam, window=steps, density=1.0)
    both = [functools.partial(last, make) for make in (ours, optax.scale_by_adam)]
    moved = [random((20, 32), seed=9 + i) for i in range(steps)]
    for way in (moved, [0 * x for x in moved[1:]] + moved[:1]):
        tangents = way, traced(dict.fromkeys(NUMBERS, 0.5))
        got, want = (moved_by(f, (gradients, numbers), tangents) for f in both)
        # Derivatives of entries in the window are stored in bfloat16, as those are.
        rtol = 2.0**-7 if way is moved else 2.0**-17
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("density", [0.06, 1.0])
def test_at_zero(density):
    """By itself over eps, as the update of any small gradient; and no NaN."""
    eps, zero = 1e-3, jnp.zeros((4, 64))
    tx = scale_by_microadam(eps=eps, density=density)
    update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
    _, got = jax.jvp(update, (zero,), (jnp.ones_like(zero),))
    selected = np.asarray(got) != 0
    assert selected.sum() == 4 * 4 if density < 1 else selected.all()
    np.testing.assert_allclose(np.asarray(got)[selected], 1 / eps, rtol=1e-6)
    back = jax.grad(lambda g: update(g).sum())(zero)
    np.testing.assert_allclose(back, got, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.slow
def test_decays_of_zero(steps):
    """Whose logarithm has no derivative."""
    gradients = [jnp.round(8 * random((3, 64), seed=i)) + 0.5 for i in range(steps)]

    def last(make, b1, b2):
        tx = make(b1=b1, b2=b2)
        state = tx.init(gradients[0])
        for gradient in gradients:
            updates, state = tx.update(gradient, state)
        return updates

    ours = functools.partial(scale_by_microadam, window=steps, density=1.0)
    zeros, ones = (jnp.float32(0),) * 2, (jnp.float32(1),) * 2
    got, want = (
        moved_by(functools.partial(last, make), zeros, ones)
        for make in (ours, optax.scale_by_adam)
    )
    np.testing.assert_allclose(got, want, rtol=2.0**-18, atol=2.0**-18)


@pytest.mark.slow
def test_learning_rate():
    """Through steps in a scan: what was moved at a learning rate of 1."""
    gradients = jnp.stack([random((8, 64), seed=i) for i in range(5)])

    def trained(rate):
        tx = microadam(rate)

        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.zeros((8, 64))
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0]

    rate = jnp.float32(0.5)
    want = jax.jit(trained)(jnp.float32(1))
    slope = jax.jit(jax.jacfwd(trained))(rate), jax.jit(jax.jacrev(trained))(rate)
    for got in slope:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
