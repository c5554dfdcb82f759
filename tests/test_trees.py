"""Any tree of parameters, any optax wrapper around, and checkpoints of the state.

If it fails, some model's parameters, wrapper or checkpoint do not work.
"""

import inspect

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.core import FrozenDict

import microadam_optax as package
from compressed import microadam, scale_by_microadam
from microadam_optax import PAPER, _chunks, smaller_than
from quick import quick

SETTINGS = {
    "paper": PAPER,
    "window1": {"window": 1, "density": 0.12},
    "random": {"window": 2, "density": 0.06, "stochastic_rounding": True},
}


def noise(tree, seed=0):
    """Normal numbers in the place of every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(rng.normal(size=x.shape)).astype(x.dtype)), tree
    )


def params():
    return {
        "kernel": jnp.ones((12, 40)),
        "bias": jnp.ones(40, jnp.bfloat16),
        "scale": jnp.ones(()),
        "two": jnp.ones((2,), jnp.float16),
        "empty": jnp.ones((0, 3)),
        "deep": jnp.ones((2, 3, 2, 3, 4)),
    }


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


TREES = {
    "FrozenDict": lambda: FrozenDict({"a": params(), "b": {"c": jnp.ones(())}}),
    "list": lambda: [jnp.ones(300), (jnp.ones((3, 3)), [jnp.ones(())])],
    "None": lambda: {"a": None, "b": jnp.ones(9), "c": [None, jnp.ones(2)]},
    "one array": lambda: jnp.ones((5, 5)),
    "nothing": lambda: {},
    "NNX state": lambda: nnx.state(Model(), nnx.Param),
}


@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
    """The same tree comes back, and each leaf is treated as if it were alone."""
    tx, tree = scale_by_microadam(**SETTINGS["window1"]), TREES[tree]()
    state, alone = tx.init(tree), [tx.init(leaf) for leaf in jax.tree.leaves(tree)]
    for step in range(2):
        gradients = noise(tree, step)
        updates, state = tx.update(gradients, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
        for i, leaf in enumerate(jax.tree.leaves(gradients)):
            expected, alone[i] = tx.update(leaf, alone[i])
            np.testing.assert_array_equal(jax.tree.leaves(updates)[i], expected)


def test_masked_nodes():
    tx = optax.masked(microadam(0.1), {"a": True, "b": False})
    tree = {"a": jnp.ones(8), "b": jnp.ones(8, jnp.int32)}
    state = tx.init(tree)
    updates, _ = tx.update(tree, state, tree)
    np.testing.assert_array_equal(updates["b"], tree["b"])
    assert float(abs(updates["a"]).max()) > 0


def test_nnx_optimizer_trains():
    model = Model()
    optimizer = nnx.Optimizer(
        model, microadam(1e-2, window=2, density=0.25), wrt=nnx.Param
    )
    x = jax.random.normal(jax.random.key(0), (32, 8))
    y = jnp.abs(x)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_map_params(settings):
    """Specs of the parameters can be laid over the state, as sharding does."""
    tx, tree = microadam(0.1, **SETTINGS[settings]), params()
    specs = {name: f"spec of {name}" for name in tree}
    laid = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(tree),
        specs,
        transform_non_params=lambda _: None,
    )
    fields = laid[0]._asdict()
    assert fields.pop("count") is None
    assert fields.pop("key") is None
    assert fields.pop("ages") is None
    absent = {"mu", "nu"} | ({"indices", "values"} if settings == "window1" else set())
    for name, field in fields.items():
        assert field == (None if name in absent else specs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_init_of_shapes_alone(settings):
    tx, tree = microadam(0.1, **SETTINGS[settings]), params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    abstract = jax.eval_shape(tx.init, shapes)
    for made in (tx.init(tree), jax.jit(tx.init)(tree), tx.init(shapes)):
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, made)


@pytest.mark.parametrize("settings", quick(SETTINGS, "paper"))
def test_checkpoints_continue_to_the_bit(settings, tmp_path):
    tx = microadam(0.1, **SETTINGS[settings])
    tree = {name: params()[name] for name in ("kernel", "bias")}
    update, state = jax.jit(tx.update), tx.init(tree)
    for step in range(4):
        _, state = update(noise(tree, step), state, tree)
    data = flax.serialization.to_bytes(state)
    restored = [flax.serialization.from_bytes(tx.init(tree), data)]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(tx.init, tree)
        restored.append(checkpointer.restore(tmp_path / "state", like))
    for again in restored:
        chex.assert_trees_all_equal(state, again)
    for step in range(4, 8):
        found = [update(noise(tree, step), x, tree) for x in (state, *restored)]
        chex.assert_trees_all_equal(*found)
        state, *restored = (x for _, x in found)


def test_state_is_small():
    """Llama-like shapes: at most 0.87 bytes a parameter at the defaults."""
    shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (32000, 4096)]
    tree = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    state = jax.eval_shape(scale_by_microadam().init, tree)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held <= 0.87 * sum(x.size for x in tree)


def test_a_donated_step_works_in_place():
    """Temporary memory does not grow with the number of leaves."""
    tx = scale_by_microadam(window=2, density=0.06)

    def temporary(number):
        tree = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * number
        state = jax.eval_shape(tx.init, tree)
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        return step.lower(tree, state).compile().memory_analysis().temp_size_in_bytes

    one_leaf = 4 * 2**20
    assert temporary(8) - temporary(1) < one_leaf


@pytest.mark.parametrize(
    ("shape", "window"),
    quick([((1024, 1024), 1), ((2039, 1031), 2)], ((1024, 1024), 1), several=True),
)
def test_leaves_share_their_temporaries(shape, window):
    """Copies of 16-bit arrays and the last, smaller piece of padded leaves, too."""
    tx = scale_by_microadam(implementation="xla", window=window, density=0.04)
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def temporary(number):
        tree = [leaf] * number
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        compiled = step.lower(tree, jax.eval_shape(tx.init, tree)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(7) - temporary(2) < leaf.size / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2097143,), jnp.bfloat16),
        ((2039, 1031), jnp.float32),
    ],
)
def test_temporaries_are_those_of_pieces(shape, dtype):
    """However its axes divide; 16-bit gradients are copied besides."""
    tx = scale_by_microadam(implementation="xla")
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(leaf, jax.eval_shape(tx.init, leaf)).compile()
    pieces = 10 * 4 * _chunks.ELEMENTS
    if dtype == jnp.bfloat16:
        pieces += 2.2 * leaf.size
    assert compiled.memory_analysis().temp_size_in_bytes <= pieces


@pytest.mark.slow
def test_a_window_in_pieces_is_copied_once():
    """16-bit arrays are, to change a part of them; no more is held than pieces."""
    tx = scale_by_microadam(window=10, density=0.06, implementation="xla")
    leaf = jax.ShapeDtypeStruct((33554393,), jnp.float32)
    state = jax.eval_shape(tx.init, leaf)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    held = step.lower(leaf, state).compile().memory_analysis().temp_size_in_bytes
    copied = 2 * (state.values.size + state.ranges.size)
    assert held <= copied + 10 * 4 * _chunks.ELEMENTS


@pytest.mark.parametrize("make", [package.microadam, package.scale_by_microadam])
def test_defaults(make):
    """Another one would train otherwise, and refuse checkpoints that it has made."""
    found = {x.name: x.default for x in inspect.signature(make).parameters.values()}
    if make is package.microadam:
        assert found.pop("learning_rate") is inspect.Parameter.empty
        assert (found.pop("weight_decay"), found.pop("mask")) == (0.0, None)
    assert found == {
        **{"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0},
        **{"window": 2, "density": 0.06, "block_size": 256, "error_bits": 4},
        **{"shards": 8, "grid": None, "dense": smaller_than(4096)},
        **{"match_adam": True, "alpha": 0.0, "stochastic_rounding": False, "seed": 0},
        "implementation": None,
    }


def test_weight_decay_and_mask():
    tree = {"w": jnp.full(8, 2.0), "b": jnp.full(8, 2.0)}
    zero = jax.tree.map(jnp.zeros_like, tree)
    mask = {"w": True, "b": False}
    tx = microadam(0.1, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(zero, tx.init(tree), tree)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 2.0)
    np.testing.assert_array_equal(updates["b"], 0)
    with pytest.raises(ValueError, match="params"):
        tx.update(zero, tx.init(tree))
    tx = microadam(0.1)
    tx.update(zero, tx.init(tree))  # without decay it needs no parameters


def test_alpha_puts_a_share_of_the_error_into_the_update():
    gradient = jax.random.normal(jax.random.key(0), (256,))
    plain = scale_by_microadam(window=1, density=0.1, shards=1)
    some = scale_by_microadam(window=1, density=0.1, shards=1, alpha=0.25)
    without, state = plain.update(gradient, plain.init(gradient))
    updates, _ = some.update(gradient, some.init(gradient))
    step, _ = np.asarray(state.ranges, np.float32).ravel()
    unselected = np.asarray(without) == 0
    expected = np.where(unselected, 0.25 * np.asarray(gradient), 0)
    close = np.abs(np.asarray(updates - without) - expected)[unselected]
    assert close.max() <= 0.25 * step / 2 * (1 + 2.0**-15)


def test_grid_argument():
    tree = {"a": jnp.ones((6, 40)), "b": jnp.ones(30)}
    tx = scale_by_microadam(grid={"a": (3, 2), "b": None})
    state = tx.init(tree)
    assert state.codes["a"].shape == (3, 2, 1, 20)
    assert (
        state.codes["b"].shape
        == tx.init({"a": tree["a"], "b": tree["b"]}).codes["b"].shape
    )
    updates, _ = tx.update(noise(tree), state)
    chex.assert_trees_all_equal_shapes(updates, tree)
    # Nothing else knows of the grid: the layout travels with the state.
    again, _ = scale_by_microadam().update(noise(tree), state)
    chex.assert_trees_all_equal(updates, again)


def test_the_count_ends_as_optax_s_does():
    tx = scale_by_microadam(window=3, density=0.5, match_adam=False)
    gradient = noise(jnp.ones(64))
    last = jnp.int32(2**31 - 1)
    state = tx.init(gradient)._replace(count=last)
    updates, state = jax.jit(tx.update)(gradient, state)
    assert state.count == last
    # So late in training the bias correction is 1: the newest entry alone counts.
    moved = np.asarray(updates)[np.asarray(updates) != 0]
    np.testing.assert_allclose(np.abs(moved), 0.1 / 0.001**0.5, rtol=1e-4)
