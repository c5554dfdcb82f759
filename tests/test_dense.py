"""`dense`: some leaves keep Adam's moments, the others are compressed.

If it fails, biases and norms are not updated as Adam would.
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import microadam_optax as package
from compressed import microadam, scale_by_microadam
from microadam_optax import (
    check_checkpoint,
    diagnostics,
    matching,
    smaller_than,
    static_args,
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
def test_each_leaf_is_updated_by_its_own():
    """Dense leaves as by Adam, the others as by MicroAdam that knows only them."""
    dense = not_kernels
    ours, _ = run(scale_by_microadam(0.8, 0.99, 1e-6, 1e-3, dense=dense, **SETTINGS))
    adam, _ = run(optax.scale_by_adam(0.8, 0.99, 1e-6, 1e-3))
    micro, _ = run(scale_by_microadam(0.8, 0.99, 1e-6, 1e-3, **SETTINGS))
    for mine, dense, sparse in zip(ours, adam, micro, strict=True):
        expected = jax.tree.map(
            lambda kernel, d, s: s if kernel else d, KERNELS, dense, sparse
        )
        chex.assert_trees_all_equal(mine, expected)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_say_which(way):
    """State and update are those of a function that names the same leaves."""
    known, tx = (
        scale_by_microadam(dense=dense, **SETTINGS) for dense in (not_kernels, WAYS[way])
    )
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(state, known.init(PARAMS))
    programs = [jax.make_jaxpr(x.update)(PARAMS, state) for x in (known, tx)]
    assert str(programs[0]) == str(programs[1])


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
    state = jax.eval_shape(tx.init, PARAMS)[0]
    assert [x.size for x in jax.tree.leaves(state.codes)] == [32 * 96 // 2] * 2
    for moments in (state.mu, state.nu):
        assert sorted(x.size for x in jax.tree.leaves(moments)) == [1, 96, 96, 64 * 32]
    for field in (state.codes, state.ranges, state.indices, state.values):
        assert isinstance(field["embed"], optax.MaskedNode)
    assert isinstance(state.mu["blocks"][0]["kernel"], optax.MaskedNode)


@pytest.mark.promotes
def test_weight_decay_reaches_every_leaf():
    params = jax.tree.map(jnp.ones_like, PARAMS)
    tx = microadam(0.5, weight_decay=0.1, dense=not_kernels, **SETTINGS)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(still, tx.init(params), params)
    expected = jax.tree.map(lambda p: jnp.full_like(p, -0.05), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.promotes
def test_with_a_grid_and_a_mask():
    """`grid` and `dense` trees name all leaves, also those that others have taken."""
    grid = {"embed": (64, 1), "blocks": [{"kernel": (2, 3), "bias": None}] * 2}
    grid["scale"] = ()
    tx = scale_by_microadam(grid=grid, dense=WAYS["a tree"], **SETTINGS)
    seen, state = run(tx)
    assert state.codes["blocks"][0]["kernel"].shape[:2] == (2, 3)
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
    inject = optax.inject_hyperparams(microadam, static_args=static_args(microadam))
    injected, state = run(inject(learning_rate=0.1, dense=smaller_than(3000)))
    plain, _ = run(microadam(0.1, dense=smaller_than(3000)))
    # As float32, 1 - b2 is off by 2**-25 / 0.001, its root is in the update; and the
    # terms of mu, up to the learning rate in size, are off by eps(float32).
    tolerance = {"rtol": 2**-26 / 0.001 + 1e-6, "atol": 0.1 * 2**-23}
    chex.assert_trees_all_close(injected, plain, **tolerance)
    assert "dense" not in state.hyperparams


@pytest.mark.parametrize("make", [package.microadam, package.scale_by_microadam])
def test_by_default_small_leaves_are_dense(make):
    params = {"small": jnp.zeros(4095), "large": jnp.zeros(4096)}
    arguments = {"learning_rate": 0.1} if make is package.microadam else {}
    state = optax.tree.get(jax.eval_shape(make(**arguments).init, params), "mu")
    assert state["small"].shape == (4095,)
    assert isinstance(state["large"], optax.MaskedNode)
    paper = jax.eval_shape(make(**arguments, **package.PAPER).init, params)
    assert optax.tree.get(paper, "codes")["small"].shape


@pytest.mark.parametrize(
    ("dense", "window"), [(None, 1), (not_kernels, 2), (lambda *_: True, 1)]
)
def test_the_state_is_one_whatever_is_dense(dense, window):
    """What reads or maps over states does not care which leaves are dense."""
    tx = microadam(0.1, dense=dense, window=window)
    state = tx.init(PARAMS)
    assert isinstance(state[0], package.MicroAdamState)
    assert optax.tree.get(state, "count") == 0
    shapes = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    check_checkpoint(shapes, tx, PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert ones[0].count == 0
    for field in (*ones[0][2:6], ones[0].mu, ones[0].nu):
        assert all((x == 1).all() for x in jax.tree.leaves(field))
    step = jax.jit(tx.update)
    updates, after = step(gradients(0), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, shapes)
    step(gradients(1), after, PARAMS)
    assert step._cache_size() == 1
    if dense is not None and not dense((), jnp.zeros((32, 96))):
        leaves = diagnostics(after, gradients(0), updates).leaves
        assert set(leaves) == {"blocks/0/kernel", "blocks/1/kernel"}


class Module(eqx.Module):
    """A callable tree."""

    weight: object
    bias: object

    def __call__(self, x):
        return self.weight @ x + self.bias


@pytest.mark.promotes
def test_a_callable_tree_is_a_tree():
    params = Module(jnp.ones((64, 96)), jnp.ones(64))
    tx = scale_by_microadam(dense=Module(False, True))
    state = tx.init(params)
    assert state.mu.bias.shape == (64,)
    assert isinstance(state.mu.weight, optax.MaskedNode)
    tx.update(params, state)


@pytest.mark.parametrize(
    "dense", [lambda leaf: leaf.ndim < 2, lambda: True, lambda *, path: path]
)
def test_a_function_of_other_arguments(dense):
    with pytest.raises(TypeError, match="a leaf's path and the leaf, such as `lambda"):
        microadam(0.1, dense=dense)


def test_a_pattern_that_matches_nothing():
    tx = microadam(0.1, dense=matching("kernels"))
    words = r"`dense=matching\('kernels'\)` matches no leaf; .* 'blocks/0/bias'"
    with pytest.raises(ValueError, match=words):
        tx.init(PARAMS)
    tx.init({})


@pytest.mark.promotes
@pytest.mark.parametrize("make", [package.microadam, package.scale_by_microadam])
def test_injected_functions_stay_functions(make):
    """optax would take `dense` for a schedule, and `mask` too, which ends all decay."""
    arguments = {"dense": not_kernels, "b1": 0.8}
    if make is package.microadam:
        mask = functools.partial(jax.tree.map, lambda x: x.ndim == 2)
        arguments |= {"learning_rate": 0.1, "weight_decay": 0.5, "mask": mask}
    params = jax.tree.map(jnp.ones_like, PARAMS)
    still = jax.tree.map(jnp.zeros_like, params)
    inject = optax.inject_hyperparams(make, static_args=static_args(make))
    plain, injected = make(**arguments), inject(**arguments)
    expected, _ = plain.update(still, plain.init(params), params)
    updates, state = injected.update(still, injected.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    if make is package.microadam:
        assert expected["embed"][0, 0] == pytest.approx(-0.05)
    assert not {"dense", "mask"} & set(state.hyperparams)


def test_numbers_of_numpy_are_checked_like_pythons():
    with pytest.raises(ValueError, match="`b2` must be a number in"):
        scale_by_microadam(b2=np.float32(1.0))
    tx = microadam(0.1, weight_decay=np.float32(0))
    tx.update(PARAMS, tx.init(PARAMS))  # without parameters


def test_a_checkpoint_of_other_dense_leaves_is_refused():
    make = functools.partial(microadam, 1.0, **SETTINGS)
    tx = make(dense=smaller_than(3000))
    saved = jax.eval_shape(tx.init, PARAMS)
    check_checkpoint(saved, tx, PARAMS)
    names = r"names \['blocks'\]\[0\]\['bias'\], .*, but the `dense`"
    for other, words in [
        (make(), names + r".* lacks \['blocks'\]\[0\]\['bias'\]"),
        (make(dense=smaller_than(10**6)), names + r".* names .*\['kernel'\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_checkpoint(saved, other, PARAMS)
    longer = microadam(1.0, window=3, density=0.06, dense=smaller_than(3000))
    with pytest.raises(ValueError, match=r"\['kernel'\] was made with `window` 2"):
        check_checkpoint(saved, longer, PARAMS)
    with pytest.raises(ValueError, match=r"made with `dense=None`, .* names"):
        check_checkpoint(jax.eval_shape(make().init, PARAMS), tx, PARAMS)


def test_a_state_of_other_dense_leaves_is_refused():
    whole, some = scale_by_microadam(), scale_by_microadam(dense=not_kernels)
    with pytest.raises(ValueError, match=r"compressed, but `dense` names .*\(None"):
        some.update(PARAMS, whole.init(PARAMS))
    with pytest.raises(ValueError, match="dense, but `dense` lacks"):
        whole.update(PARAMS, some.init(PARAMS))


def test_what_version_0_1_made_is_refused():
    """A partition with `dense`, and without it a state that compresses all leaves."""

    def label(params):
        leaves = jax.tree_util.tree_map_with_path(not_kernels, params)
        return jax.tree.map(lambda x: "dense" if x else "compressed", leaves)

    parts = {"compressed": scale_by_microadam(), "dense": optax.scale_by_adam()}
    old = optax.chain(optax.partition(parts, label), optax.scale(-0.1))
    tx = optax.chain(scale_by_microadam(dense=not_kernels), optax.scale(-0.1))
    words = r"\(`inner_states`\), .* names blocks/0/bias and 3 more"
    with pytest.raises(ValueError, match=words):
        check_checkpoint(jax.eval_shape(old.init, PARAMS), tx, PARAMS)
    with pytest.raises(TypeError, match=r"got a PartitionState: .* an earlier version"):
        tx.update(PARAMS, old.init(PARAMS))


@pytest.mark.promotes
def test_parts_of_a_leaf_below_the_limit():
    """In a shard_map `dense` would see parts: what the state has is right."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((128, 64))}
    tx = package.scale_by_microadam()
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("d") if x.ndim > 1 else P(), state)
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(P("d"), specs),
        out_specs=(P("d"), specs),
    )
    updates, _ = jax.jit(update)(params, state)
    chex.assert_trees_all_equal(updates, tx.update(params, state)[0])


@pytest.mark.promotes
def test_moments_keep_their_dtype():
    params = {"b": jnp.ones(64, jnp.bfloat16)}
    tx = package.scale_by_microadam()

    def step(state, _):
        return tx.update({"b": jnp.ones(64)}, state)[::-1]

    state, updates = jax.lax.scan(step, tx.init(params), length=3)
    assert state.nu["b"].dtype == jnp.bfloat16
    assert updates["b"].dtype == jnp.float32


def test_static_args_of_a_function_around():
    def make(learning_rate, window=2, weight_decay=0.1):
        return microadam(learning_rate, window=window, weight_decay=weight_decay)

    assert static_args(make) == ("window",)
    assert "b1" not in static_args(functools.partial(package.microadam, b1=0.8))


def test_diagnostics_of_dense_leaves_alone():
    tx, params = package.microadam(0.1), {"b": jnp.ones(64)}
    updates, state = tx.update(params, tx.init(params), params)
    found = diagnostics(state, params, updates)
    assert found.leaves == {}
    assert jnp.isnan(found.total.error_over_gradient)


def test_the_state_of_another_optimizer_is_refused():
    params = {"w": jnp.ones(5000)}
    with pytest.raises(TypeError, match="MicroAdamState, got a ScaleByAdamState"):
        microadam(0.1).update(params, optax.adamw(0.1).init(params), params)


@pytest.mark.parametrize(
    ("dense", "error", "words"),
    [
        ({"embed": True}, ValueError, "bools like .* it has nothing for"),
        ({"other": True}, ValueError, r"the parameters have no \['other'\]"),
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


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("(norm", ValueError, r"a regular expression, got '\(norm'"),
        (["norm"], TypeError, r"`pattern` must be a string, got \['norm'\]"),
    ],
)
def test_a_pattern_is_a_regular_expression(pattern, error, words):
    with pytest.raises(error, match=words):
        matching(pattern)


@pytest.mark.parametrize("dense", [smaller_than(8), matching("norm")])
def test_without_static_args_it_says_so(dense):
    """optax takes it for a schedule of one argument."""
    make = optax.inject_hyperparams(microadam)
    with pytest.raises(TypeError, match=r"is for `dense` .*static_args"):
        make(0.1, dense=dense).init(PARAMS)


def test_another_shape_is_told_before_another_dense():
    """A smaller vocabulary is also one that the default would leave dense."""
    tx = package.microadam(0.1)
    state = tx.init({"embed": jnp.ones((100, 64))})
    with pytest.raises(ValueError, match=r"leaf of shape \(100, 64\) .*\(50, 64\)"):
        tx.update({"embed": jnp.ones((50, 64))}, state)
