"""`dense`: some leaves keep Adam's moments, the others are compressed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_optax import (
    STATIC_ARGS,
    check_checkpoint,
    matching,
    microadam,
    scale_by_microadam,
    smaller_than,
)

PARAMS = {
    "embed": jnp.zeros((64, 32)),
    "blocks": [{"kernel": jnp.zeros((32, 96)), "bias": jnp.zeros(96)}] * 2,
    "scale": jnp.zeros(()),
}
KERNELS = {
    "embed": False,
    "blocks": [{"kernel": True, "bias": False}] * 2,
    "scale": False,
}  # the leaves of 3072 elements
SETTINGS = {"window": 2, "density": 0.06}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), PARAMS
    )


def run(tx, steps=4):
    """The updates of a few steps, and the last state."""
    state, update, seen = tx.init(PARAMS), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(gradients(step), state, PARAMS)
        seen.append(updates)
    return seen, state


def not_kernels(path, leaf):
    del path
    return leaf.size != 32 * 96


WAYS = {
    "a function": not_kernels,
    "a size": smaller_than(3000),
    "a pattern": matching(r"embed|bias|scale$"),
    "a tree": jax.tree.map(lambda x: not x, KERNELS),
    "a prefix": {
        "embed": True,
        "blocks": [{"kernel": np.False_, "bias": True}] * 2,
        "scale": True,
    },
}


@pytest.mark.promotes
@pytest.mark.parametrize("way", WAYS)
def test_each_leaf_is_updated_by_its_own(way):
    """Dense leaves as by Adam, the others as by MicroAdam that knows only them."""
    ours, _ = run(scale_by_microadam(0.8, 0.99, 1e-6, 1e-3, dense=WAYS[way], **SETTINGS))
    adam, _ = run(optax.scale_by_adam(0.8, 0.99, 1e-6, 1e-3))
    micro, _ = run(scale_by_microadam(0.8, 0.99, 1e-6, 1e-3, **SETTINGS))
    for mine, dense, sparse in zip(ours, adam, micro, strict=True):
        expected = jax.tree.map(
            lambda kernel, d, s: s if kernel else d, KERNELS, dense, sparse
        )
        chex.assert_trees_all_equal(mine, expected)


@pytest.mark.promotes
@pytest.mark.parametrize("answer", [True, False])
def test_all_or_none(answer):
    whole = optax.scale_by_adam() if answer else scale_by_microadam(**SETTINGS)
    ours, _ = run(scale_by_microadam(dense=lambda *_: answer, **SETTINGS))
    chex.assert_trees_all_equal(ours, run(whole)[0])
    by_prefix, _ = run(scale_by_microadam(dense=answer, **SETTINGS))
    chex.assert_trees_all_equal(ours, by_prefix)


def test_the_state_holds_each_leaf_once():
    tx = microadam(1.0, dense=not_kernels, **SETTINGS)
    state = jax.eval_shape(tx.init, PARAMS)[0].inner_states
    codes = state["compressed"].inner_state.codes
    assert [x.size for x in jax.tree.leaves(codes)] == [32 * 96 // 2] * 2
    moments = jax.tree.leaves(state["dense"].inner_state.mu)
    assert sorted(x.size for x in moments) == [1, 96, 96, 64 * 32]


@pytest.mark.promotes
def test_weight_decay_reaches_every_leaf():
    params = jax.tree.map(jnp.ones_like, PARAMS)
    tx = microadam(0.5, weight_decay=0.1, dense=not_kernels, **SETTINGS)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    expected = jax.tree.map(lambda p: jnp.full_like(p, -0.05), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.promotes
def test_with_a_grid_and_a_mask():
    """`grid` and `dense` trees name all leaves, also those that others have taken."""
    grid = {"embed": (64, 1), "blocks": [{"kernel": (2, 3), "bias": None}] * 2}
    grid["scale"] = ()
    tx = scale_by_microadam(grid=grid, dense=WAYS["a tree"], **SETTINGS)
    seen, state = run(tx)
    codes = state.inner_states["compressed"].inner_state.codes
    assert codes["blocks"][0]["kernel"].shape[:2] == (2, 3)
    first = {"embed": True, "blocks": [True, False], "scale": True}
    mask = jax.tree.map(lambda x, tree: jax.tree.map(lambda _: x, tree), first, PARAMS)
    inside, _ = run(optax.masked(tx, mask))
    for mine, whole, step in zip(inside, seen, range(4), strict=True):
        expected = jax.tree.map(
            lambda taken, u, g: u if taken else g, mask, whole, gradients(step)
        )
        chex.assert_trees_all_equal(mine, expected)


@pytest.mark.promotes
def test_hyperparameters():
    inject = optax.inject_hyperparams(microadam, static_args=STATIC_ARGS)
    injected, state = run(inject(learning_rate=0.1, dense=smaller_than(3000)))
    plain, _ = run(microadam(0.1, dense=smaller_than(3000)))
    # As float32, 1 - b2 is off by 2**-25 / 0.001, its root is in the update; and the
    # terms of mu, up to the learning rate in size, are off by eps(float32).
    tolerance = {"rtol": 2**-26 / 0.001 + 1e-6, "atol": 0.1 * 2**-23}
    chex.assert_trees_all_close(injected, plain, **tolerance)
    assert "dense" not in state.hyperparams


def test_a_checkpoint_of_other_dense_leaves_is_refused():
    make = functools.partial(microadam, 1.0, **SETTINGS)
    tx = make(dense=smaller_than(3000))
    saved = jax.eval_shape(tx.init, PARAMS)
    check_checkpoint(saved, tx, PARAMS)
    for other in (make(), make(dense=smaller_than(100))):
        with pytest.raises(ValueError, match="The saved optimizer state has"):
            check_checkpoint(saved, other, PARAMS)
    longer = microadam(1.0, window=3, density=0.06, dense=smaller_than(3000))
    with pytest.raises(ValueError, match=r"\['kernel'\] was made with `window` 2"):
        check_checkpoint(saved, longer, PARAMS)


@pytest.mark.parametrize(
    ("dense", "error", "words"),
    [
        ({"embed": True}, ValueError, "`dense` must be a tree of bools like"),
        (lambda _, leaf: leaf.size, TypeError, r"got 96 for \['blocks'\]"),
        ("norm", TypeError, r"a bool a leaf, got 'norm' for \['blocks'\]"),
    ],
)
def test_errors(dense, error, words):
    with pytest.raises(error, match=words):
        scale_by_microadam(dense=dense).init(PARAMS)


def test_size_must_be_an_integer():
    with pytest.raises(TypeError, match=r"`size` must be an integer, got 4096\.0"):
        smaller_than(4096.0)
