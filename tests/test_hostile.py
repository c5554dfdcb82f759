"""Numbers that nobody wants: what each gives is written down in docs/reliability.md.

If it fails, one bad or huge gradient spoils a whole run, or is hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam
from microadam_optax import PAPER
from quick import quick

SETTINGS = {
    "paper": PAPER,
    "window 1": {"window": 1, "density": 0.12},
    "all selected": {"window": 3, "density": 1.0},
    "alpha": {"window": 2, "density": 0.06, "alpha": 0.5},
    "two bits": {"window": 2, "density": 0.06, "error_bits": 2},
    "stochastic": {"window": 1, "density": 0.01, "stochastic_rounding": True},
    "b2 0": {"window": 3, "density": 0.06, "b2": 0.0},
}
IMPLEMENTATIONS = ("xla", "interpret_gpu", "interpret_tpu")
SHAPE, STEPS = (3, 300), 12


def normal(step):
    return np.random.default_rng(step).normal(size=SHAPE)


def outlier(step):
    g = normal(step)
    g[1, 7] = 3e38
    return g


FINITE = {
    "zeros": lambda _: np.zeros(SHAPE),
    "denormal": lambda step: 1e-41 * normal(step),
    "1e-38": lambda step: 1e-38 * normal(step),
    "1e38": lambda step: 1e38 * normal(step),
    "the largest": lambda _: np.full(SHAPE, np.inf),  # limited to the dtype's below
    "the largest, both signs": lambda step: np.where(normal(step) > 0, np.inf, -np.inf),
    "growing": lambda step: normal(step) * 10.0 ** (6 * step - 30),
    "all equal": lambda _: np.full(SHAPE, -0.5),
    "one outlier": outlier,
    "alternating": lambda step: normal(0) * (-1) ** step,
    "ties": lambda step: np.round(normal(step)),
}


def limited(g, dtype):
    most = float(jnp.finfo(dtype).max)
    return jnp.asarray(np.clip(g, -most, most), dtype)


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("setting", "dtype"),
    quick(
        [
            *((x, jnp.float32) for x in SETTINGS),
            ("alpha", jnp.float16),
            ("two bits", jnp.bfloat16),
        ],
        *((x, jnp.float32) for x in SETTINGS),
        several=True,
    ),
)
def test_finite_gradients_give_finite_updates_and_states(setting, dtype):
    tx = scale_by_microadam(**SETTINGS[setting])
    update = jax.jit(tx.update)
    for kind, make in FINITE.items():
        state = tx.init(jnp.zeros(SHAPE, dtype))
        for step in range(STEPS):
            updates, state = update(limited(make(step), dtype), state)
            floats = state._replace(key=None)
            assert finite(updates), (kind, step)
            assert finite(floats), (kind, step)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.slow
def test_kernels_have_the_same_bits_of_them(platform):
    settings = {"window": 2, "density": 0.06}
    one = scale_by_microadam(**settings)
    other = scale_by_microadam(**settings, implementation=f"interpret_{platform}")
    update, interpreted = jax.jit(one.update), jax.jit(other.update)
    for make in FINITE.values():
        state = states = one.init(jnp.zeros(SHAPE))
        for step in range(3):
            g = limited(make(step), jnp.float32)
            updates, state = update(g, state)
            others, states = interpreted(g, states)
            jax.tree.map(np.testing.assert_array_equal, state, states)
            np.testing.assert_allclose(others, updates, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret_gpu"])
@pytest.mark.slow
def test_nothing_on_the_way_is_nan(implementation):
    """Else a search for a NaN, operation by operation, would stop here in vain."""
    tx = scale_by_microadam(window=2, density=0.06, implementation=implementation)
    kinds = ("zeros", "denormal", "1e38", "ties")  # each in rows of its own
    with jax.debug_nans(True), jax.disable_jit():
        state = tx.init(jnp.zeros((len(kinds) * SHAPE[0], *SHAPE[1:])))
        for step in range(2):
            g = np.concatenate([FINITE[kind](step) for kind in kinds])
            updates, state = tx.update(limited(g, jnp.float32), state)
        assert finite(updates)


def test_float64_beyond_float32():
    with jax.enable_x64(True):
        g = jnp.asarray([1e300, -1e300, 1.0, 1e-300])
        tx = scale_by_microadam(window=2, density=0.25, shards=1, match_adam=False)
        updates, state = tx.update(g, tx.init(g))
        assert finite((updates, state))
        np.testing.assert_allclose(updates, [1, -1, 0, 0], rtol=1e-6)


def test_zeros_move_nothing():
    tx = scale_by_microadam(window=2, density=0.06)
    updates, state = tx.update(jnp.zeros(SHAPE), tx.init(jnp.zeros(SHAPE)))
    assert not any(np.any(x) for x in (updates, state.codes, state.ranges, state.values))


def test_size_does_not_matter_up_to_the_limit():
    """Powers of two change no bit of the updates between 2**-40 and 2**58."""
    tx = scale_by_microadam(window=2, density=0.06, eps=1e-30)
    found = []
    for scale in (2.0**-40, 1.0, 2.0**55):
        state = tx.init(jnp.zeros(SHAPE))
        for step in range(5):
            g = jnp.asarray(normal(step) * scale, jnp.float32)
            updates, state = jax.jit(tx.update)(g, state)
        found.append(updates)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[1])


def test_above_the_limit_only_the_sign_counts():
    tx = scale_by_microadam(window=1, density=1.0)
    g = jnp.asarray([3e38, -1e20, 1e19, 1.0, -1.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, jnp.sign(g), rtol=1e-6)


def test_tiny_gradients_move_by_themselves_over_eps():
    """As with Adam; and what is not selected is too small for an error's step."""
    tx = scale_by_microadam(window=2, density=0.06)
    g = jnp.asarray(1e-32 * normal(0), jnp.float32)
    updates, state = tx.update(g, tx.init(g))
    moved = np.asarray(updates) != 0
    np.testing.assert_allclose(updates[moved], g[moved] / 1e-8, rtol=2**-7)
    assert not state.codes.any()


def test_an_outlier_costs_the_rest_of_its_block_nothing():
    """It is selected at once: the error's step is that of the others."""
    tx = scale_by_microadam(window=2, density=0.06, shards=1)
    ranges = [
        tx.update(jnp.asarray(g(0), jnp.float32), tx.init(jnp.zeros(SHAPE)))[1].ranges
        for g in (normal, outlier)
    ]
    steps = [np.asarray(x, np.float32)[..., 0] for x in ranges]
    assert np.all(steps[1] <= 1.05 * steps[0])


def test_alternating_gradients_go_nowhere():
    tx = scale_by_microadam(window=4, density=0.06)
    state, moved = tx.init(jnp.zeros(SHAPE)), np.zeros(SHAPE)
    for step in range(200):
        updates, state = jax.jit(tx.update)(
            jnp.asarray(FINITE["alternating"](step), jnp.float32), state
        )
        moved += np.asarray(updates)
    # Each selection moves by 8.6 at most (a window of 4, see docs/tuning.md); a steady
    # gradient would have moved by some hundred.
    assert np.abs(moved).max() <= 2 * 8.6


BAD = {
    "NaN": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "many NaN": [np.nan] * 30,
    "many infinities": [np.inf, -np.inf] * 15,
}


@pytest.mark.makes_nan
@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS, "xla"))
def test_what_is_not_finite_shows_and_stays_in_its_block(implementation):
    tx = scale_by_microadam(
        window=2, density=0.06, shards=1, block_size=64, implementation=implementation
    )
    for numbers in BAD.values():
        check_that_it_stays(tx, numbers)


def check_that_it_stays(tx, numbers):
    update = jax.jit(tx.update)
    shape = (4, 64)  # a block in each row
    clean = dirty = tx.init(jnp.zeros(shape))
    for step in range(4):
        g = np.random.default_rng(step).normal(size=shape).astype(np.float32)
        good, clean = update(jnp.asarray(g), clean)
        if step == 1:
            g[2, : len(numbers)] = numbers
        bad, dirty = update(jnp.asarray(g), dirty)
        if step == 1:
            assert not np.isfinite(bad[2]).all()  # where it happened, when it happened
        elsewhere = np.array([0, 1, 3])
        np.testing.assert_array_equal(bad[elsewhere], good[elsewhere])
        for x, y in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
            if x.ndim > 1:
                np.testing.assert_array_equal(x[elsewhere], y[elsewhere])
    if len(numbers) == 1:
        assert np.isfinite(bad).all()  # it has left the window
    else:
        assert not np.isfinite(bad[2]).all()  # it is in the error, and not hidden


@pytest.mark.makes_nan
@pytest.mark.parametrize(
    ("shape", "k"), quick([((64, 64), 4), ((8192, 64), 1)], ((64, 64), 4), several=True)
)
def test_what_is_not_finite_is_never_forgotten(shape, k):
    """More of it than is selected, wherever in a block: the error's step shows it.

    Of a leaf that is computed whole, and of one in pieces.
    """
    tx = scale_by_microadam(density=k / 64, shards=1, block_size=64, implementation="xla")
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(shape))
    g = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    _, state = update(jnp.asarray(g), state)
    bad, rows = g.copy(), np.arange(64)
    for i in range(k + 1):
        bad[rows, (rows + i) % 64] = (np.nan, np.inf, -np.inf)[i % 3]
    bad[rows[::2], rows[::2]] = -np.nan
    updates, state = update(jnp.asarray(bad), state)
    for _ in range(3):
        assert not np.isfinite(np.asarray(updates[:64])).all(-1).any()
        assert np.isfinite(updates[64:]).all()
        steps = np.asarray(state.ranges, np.float32)[..., 0].ravel()
        assert not np.isfinite(steps[:64]).any()
        assert np.isfinite(steps[64:]).all()
        updates, state = update(jnp.asarray(g), state)


@pytest.mark.makes_nan
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_apply_if_finite_keeps_it_out(bad):
    tx = optax.apply_if_finite(microadam(0.1, window=3, density=0.06), 5)
    params = jnp.zeros(SHAPE)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(3):
        _, state = update(jnp.asarray(normal(step), jnp.float32), state, params)
    g = jnp.asarray(normal(3), jnp.float32).at[1, 5].set(bad)
    updates, after = update(g, state, params)
    assert not updates.any()
    assert int(after.notfinite_count) == 1
    for x, y in zip(
        jax.tree.leaves(after.inner_state),
        jax.tree.leaves(state.inner_state),
        strict=True,
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
