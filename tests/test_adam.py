"""Read this first: with everything selected, MicroAdam is Adam.

If it fails, an Adam user who turns to MicroAdam gets other updates than Adam's.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam

# optax computes 1 - b2**t in float32, which for b2 = 0.999 cancels all but about 14
# of its 24 bits: a relative error of up to 2**-24 / (1 - b2), halved by the root.
OPTAX_ROUNDING = 2.0**-24 / (1 - 0.999)


def gradients(steps, shape=(20, 30)):
    """Numbers that bfloat16, in which the window is stored, represents exactly."""
    for step in range(steps):
        gradient = jax.random.normal(jax.random.key(step), shape)
        yield gradient.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.promotes
@pytest.mark.parametrize("eps_root", [0.0, 0.3])
def test_density_1_within_the_window_is_adam(eps_root):
    window = 5
    ours = scale_by_microadam(eps_root=eps_root, window=window, density=1.0)
    adam = optax.scale_by_adam(eps_root=eps_root)
    state, adam_state = (tx.init(jnp.zeros((20, 30))) for tx in (ours, adam))
    for gradient in gradients(window):
        updates, state = ours.update(gradient, state)
        expected, adam_state = adam.update(gradient, adam_state)
        np.testing.assert_allclose(
            updates, expected, rtol=OPTAX_ROUNDING, atol=OPTAX_ROUNDING
        )


def test_it_forgets_what_left_the_window():
    window = 3
    literal = {"match_adam": False, "eps": 1e-30}
    ours = scale_by_microadam(window=window, density=1.0, **literal)
    state = ours.init(jnp.zeros(8))
    for value in (100.0, 1.0, 1.0):
        updates, state = ours.update(jnp.full(8, value), state)
    assert float(updates[0]) < 0.6  # 100 is in it still
    updates, state = ours.update(jnp.full(8, 1.0), state)
    # Three ones of ages 0, 1, 2 at step 4.
    mu = 0.1 / (1 - 0.9**4) * (1 + 0.9 + 0.81)
    nu = 0.001 / (1 - 0.999**4) * (1 + 0.999 + 0.999**2)
    np.testing.assert_allclose(updates, mu / nu**0.5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_literal_equations_by_the_recipe(window):
    """Without the factors (1 - b): another eps, and another learning rate."""
    b1, b2, eps, rate = 0.9, 0.999, 1e-4, 0.01
    recipe = microadam(
        rate * (1 - b2) ** 0.5 / (1 - b1),
        eps=eps * (1 - b2) ** 0.5,
        window=window,
        density=1.0,
        match_adam=False,
    )
    state = recipe.init(jnp.zeros((20, 30)))
    seen: list[np.ndarray] = []
    for t, gradient in enumerate(gradients(6), start=1):
        updates, state = recipe.update(gradient, state)
        seen = [np.asarray(gradient, np.float64), *seen][:window]
        mu = sum(b1**age * g for age, g in enumerate(seen)) / (1 - b1**t)
        nu = sum(b2**age * g**2 for age, g in enumerate(seen)) / (1 - b2**t)
        literal = -rate * mu / (np.sqrt(nu) + eps)
        # b2 itself is rounded to float32, which moves 1 - b2 by this much.
        size = np.abs(literal) + rate * 2.0**-20
        assert np.all(np.abs(updates - literal) <= 2 * OPTAX_ROUNDING * (size + rate))


def test_a_selected_entry_at_window_1_moves_by_a_constant():
    """The update of window 1 is the sign of what was selected times a number."""
    literal = {"match_adam": False, "eps": 1e-30}
    ours = scale_by_microadam(window=1, density=0.25, **literal)
    state = ours.init(jnp.zeros(256))
    for t, gradient in enumerate(gradients(20, (256,)), start=1):
        updates, state = ours.update(gradient, state)
        mu, nu = 0.1 / (1 - 0.9**t), 0.001 / (1 - 0.999**t)
        moved = np.abs(np.asarray(updates))[np.asarray(updates) == updates]
        moved = moved[moved > 0]
        assert moved.size == 64
        np.testing.assert_allclose(moved, mu / nu**0.5, rtol=1e-4)


@pytest.mark.parametrize("eps_root", [0.0, 0.3])
def test_jit_and_eager_agree(eps_root):
    ours = scale_by_microadam(eps_root=eps_root, window=3, density=0.1)
    states = [ours.init(jnp.zeros((20, 30))) for _ in range(2)]
    for gradient in gradients(5):
        eager, states[0] = ours.update(gradient, states[0])
        jitted, states[1] = jax.jit(ours.update)(gradient, states[1])
        chex.assert_trees_all_equal((eager, states[0]), (jitted, states[1]))
