"""A user who keeps Adam's learning rate moves as fast as with Adam.

If it fails, a learning rate that suits Adam is too high or too low with `match_adam`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compressed
import microadam_optax
from meshes import make_mesh
from microadam_optax import PAPER, _blocks, smaller_than, static_args
from microadam_optax._state import Settings
from quick import quick

# Blocks of 256, which the default grid would cut.
scale_by_microadam = functools.partial(compressed.scale_by_microadam, shards=1)
SETTINGS = [(1, 0.04), (2, 0.06), (10, 0.01)]
BITS = [
    *((*x, "jit") for x in ((1, 0.04), (2, 0.06), (20, 0.02))),
    (2, 0.06, "vmap"),
    (2, 0.06, "explicit mesh"),
]


def run(tx, gradients):
    """Updates of all steps, and the last state."""
    state, found = tx.init(gradients[0]), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state)
        found.append(updates)
    return found, state


def noise(steps, shape=(8, 256)):
    return [jax.random.normal(jax.random.key(step), shape) for step in range(steps)]


def selected(updates):
    moved = np.abs(np.asarray(updates, np.float64))
    return moved[moved > 0]


@pytest.mark.parametrize("density", [0.04, 1.0])
def test_window_1_moves_by_one_number_from_the_first_step_on(density):
    tx = scale_by_microadam(window=1, density=density, eps=1e-30, match_adam=True)
    k = max(1, np.ceil(round(256 * density, 6)))
    for updates in run(tx, noise(20))[0]:
        expected = (k / 256) ** -0.5
        np.testing.assert_allclose(selected(updates), expected, rtol=1e-5)


@pytest.mark.parametrize(("window", "density"), SETTINGS)
def test_it_moves_in_all_as_the_formula_says(window, density):
    """One large gradient, then zeros."""
    tx = scale_by_microadam(window=window, density=density, eps=1e-30, match_adam=True)
    steps = 3 * window
    gradients = [g.at[0, 7].set(0.0) for g in noise(steps, (1, 256))]
    gradients += [jnp.zeros((1, 256)).at[0, 7].set(1e6)]
    gradients += [jnp.zeros((1, 256))] * window
    moves = [float(u[0, 7]) for u in run(tx, gradients)[0][steps:]]
    ages, share = np.arange(window), np.ceil(round(256 * density, 6)) / 256
    w1, w2 = (b**ages / np.sum(b**ages) for b in (0.9, 0.999))
    factor = 1 / (share**0.5 * np.sum(w1 / np.sqrt(share + (1 - share) * w2)))
    np.testing.assert_allclose(moves[:window], factor * w1 / np.sqrt(w2), rtol=1e-4)
    assert moves[window] == 0


@pytest.mark.parametrize(("window", "density"), SETTINGS)
@pytest.mark.parametrize("size", [1e-10, 1.0])
def test_eps_means_what_it_means_in_adam(window, density, size):
    """The same gradient at every step, small beside eps or large."""
    sizes = size * np.random.default_rng(0).uniform(0.5, 2, size=(4, 256))
    steps = 10 * round(1 / density)
    gradients = [jnp.asarray(sizes, jnp.float32)] * steps
    tx = scale_by_microadam(window=window, density=density, match_adam=True)
    ways = [
        np.mean([np.mean(u) for u in run(t, gradients)[0]])
        for t in (tx, optax.scale_by_adam())
    ]
    share = -(-256 * density // 1) / 256
    agreeing = 1 if size < 1e-8 else share**0.5  # of Adam's way, where gradients agree
    assert agreeing / 2 < ways[0] / ways[1] < 2 * agreeing


@pytest.mark.parametrize(("window", "density"), SETTINGS)
def test_the_state_is_that_of_the_literal_method(window, density):
    """So a run may change from one to the other."""
    states = [
        run(scale_by_microadam(window=window, density=density, match_adam=x), noise(5))[1]
        for x in (True, False)
    ]
    chex.assert_trees_all_equal(*states)


def test_the_share_is_of_real_elements():
    """A leaf of one element in a block of 8 is selected at every step."""
    tx = scale_by_microadam(window=2, density=0.06, match_adam=True)
    gradients = [jax.random.normal(jax.random.key(i), ()) for i in range(2)]
    gradients = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in gradients]
    ours, adam = run(tx, gradients)[0], run(optax.scale_by_adam(), gradients)[0]
    np.testing.assert_allclose(ours, adam, rtol=1e-4)


@pytest.mark.parametrize(
    ("window", "density", "way"), quick(BITS, *BITS[:-2], several=True)
)
def test_updates_have_the_same_bits(window, density, way):
    """Also where XLA knows the decays while it compiles, and where it does not."""
    tx = compressed.scale_by_microadam(window=window, density=density, match_adam=True)
    gradients = noise(5, (16, 256))
    state, mine = (tx.init(gradients[0]) for _ in range(2))
    update = jax.jit(tx.update)
    if way == "vmap":
        mine = jax.tree.map(lambda x: x[None], mine)
        update = jax.jit(jax.vmap(tx.update))
    mesh = make_mesh("fsdp 4, tp 2", jax.sharding.AxisType.Explicit)
    for gradient in gradients:
        updates, state = tx.update(gradient, state)
        if way == "explicit mesh":
            with jax.set_mesh(mesh):
                own = jax.device_put(gradient, NamedSharding(mesh, P("fsdp", "tp")))
                mine = tx.init(own) if mine.count == 0 else mine
                found, mine = update(own, mine)
        else:
            found, mine = update(gradient[None] if way == "vmap" else gradient, mine)
        np.testing.assert_array_equal(jnp.reshape(found, gradient.shape), updates)


@pytest.mark.parametrize(
    ("shape", "size", "density"),
    [((512, 9), 8, 0.06), ((512, 9), 8, 0.5), ((8964,), 256, 0.06), ((5, 700), 256, 0.5)],
)
def test_the_share_counts_no_padding(shape, density, size):
    """With 9 elements in blocks of 8, the last block has fewer than are selected."""
    at = _blocks.layout_of(shape, size, shards=1, grid=(shape[0], 1)[: len(shape)])
    k = Settings(2, density, 256, 4, 0.0).k(at.block)
    ones = jnp.ones((*at.grid, at.cell))
    real = _blocks.pad(ones, at.blocks, at.block).reshape(-1, at.block).sum(1)
    assert at.share(k) == pytest.approx(jnp.minimum(real, k).sum() / np.prod(shape))


def test_decays_injected_give_the_same_bits():
    gradients = noise(5)
    given = {"window": 10, "density": 0.01, "match_adam": True, "dense": None}
    make = microadam_optax.scale_by_microadam
    injected = optax.inject_hyperparams(make, static_args=static_args(make))(**given)
    found, expected = (run(tx, gradients)[0] for tx in (injected, make(**given)))
    chex.assert_trees_all_equal(found, expected)


def test_dense_leaves_are_adams():
    make = microadam_optax.scale_by_microadam
    tx = make(dense=smaller_than(4096), match_adam=True)
    gradients = noise(3, (4, 100))
    ours, adam = run(tx, gradients)[0], run(optax.scale_by_adam(), gradients)[0]
    chex.assert_trees_all_equal(ours, adam)


def test_the_papers_setting_is_literal():
    assert PAPER["match_adam"] is False


@pytest.mark.parametrize("wrong", [1, "yes", None, jnp.bool_(True)])
def test_other_than_a_bool_is_refused(wrong):
    with pytest.raises(TypeError, match=r"`match_adam` must be a (Python )?bool"):
        scale_by_microadam(match_adam=wrong)


@pytest.mark.slow
def test_derivatives_with_respect_to_decays():
    gradient = noise(1)[0]

    @jax.jit
    def moved(b1, b2):
        tx = scale_by_microadam(b1, b2, window=3, match_adam=True)

        def step(state, _):
            updates, state = tx.update(gradient, state)
            return state, jnp.sum(updates**2)

        return jnp.sum(jax.lax.scan(step, tx.init(gradient), length=3)[1])

    slopes = jax.jit(jax.grad(moved, (0, 1)))
    for b1, b2 in [(0.0, 0.0), (0.9, 0.99)]:
        found, other = slopes(jnp.float32(b1), jnp.float32(b2))
        assert np.isfinite(found)
        assert np.isfinite(other)
    h = 1e-2
    numeric = (moved(0.9 + h, 0.99) - moved(0.9 - h, 0.99)) / (2 * h)
    np.testing.assert_allclose(found, numeric, rtol=0.05)
