"""Bad input: one sentence, before anything is computed, and no state is changed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_optax import microadam, scale_by_microadam

OUT_OF_RANGE = [
    ("window", 0),
    ("window", -3),
    ("density", 0.0),
    ("density", 1.5),
    ("density", float("nan")),
    ("block_size", 0),
    ("block_size", 100),
    ("block_size", 65544),
    ("error_bits", 3),
    ("error_bits", 16),
    ("shards", 0),
    ("alpha", 1.0),
    ("alpha", -0.1),
    ("implementation", "cuda"),
]
WRONG_TYPE = [
    ("window", 2.0),
    ("window", True),
    ("window", "10"),
    ("density", None),
    ("density", "0.01"),
    ("block_size", 256.0),
    ("error_bits", 4.0),
    ("shards", None),
    ("alpha", "0"),
    ("stochastic_rounding", 1),
    ("seed", 0.5),
]


@pytest.mark.parametrize("make", [scale_by_microadam, lambda **kw: microadam(0.1, **kw)])
@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range(make, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got .*{value!r}.*\\.$"):
        make(**{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"^`{name}` must be .*, got {value!r}\\.$"):
        scale_by_microadam(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["window", "density", "block_size", "error_bits", "shards", "alpha", "seed"],
)
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_an_array_names_static_args(name, kind):
    with pytest.raises(TypeError, match=f"`{name}`.*static_args"):
        scale_by_microadam(**{name: kind(1)})


def test_inject_hyperparams_without_static_args_says_what_to_do():
    tx = optax.inject_hyperparams(microadam)(learning_rate=0.1)
    with pytest.raises(TypeError, match=r"static_args=microadam_optax\.STATIC_ARGS"):
        tx.init(jnp.ones(3))


def test_pallas_is_refused():
    with pytest.raises(NotImplementedError, match="pallas"):
        scale_by_microadam(implementation="pallas")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool, jnp.complex64])
def test_leaves_that_are_not_real_floats(dtype):
    tx = scale_by_microadam()
    tree = {"a": jnp.ones(3), "b": [jnp.ones(3, dtype)]}
    with pytest.raises(TypeError, match=r"\['b'\]\[0\] is " + jnp.dtype(dtype).name):
        tx.init(tree)
    state = tx.init({"a": jnp.ones(3), "b": [jnp.ones(3)]})
    with pytest.raises(TypeError, match=r"Gradients .*\['b'\]\[0\] is"):
        tx.update(tree, state)


def test_a_leaf_that_is_no_array():
    with pytest.raises(TypeError, match=r"\['name'\] is str"):
        scale_by_microadam().init({"name": "dense", "w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": 3}, r"there is no gradient for \['b'\]"),
        ({"a": 3, "b": 3, "c": 3}, r"the state knows no \['c'\]"),
        ([3, 3], r"there is no gradient for \['a'\]"),
        ({"a": 4, "b": 40}, r"state of \['b'\] does not fit a gradient of shape \(40,\)"),
    ],
)
def test_gradients_that_do_not_match(gradients, message):
    tx = scale_by_microadam()
    state = tx.init({"a": jnp.ones(3), "b": jnp.ones(3)})
    before = jax.tree.map(jnp.copy, state)
    gradients = jax.tree.map(jnp.ones, gradients)
    with pytest.raises(ValueError, match=message):
        tx.update(gradients, state)
    chex.assert_trees_all_equal(state, before)


@pytest.mark.parametrize(
    "other",
    [{"window": 3}, {"window": 1}, {"density": 0.5}, {"error_bits": 8}],
)
def test_state_of_other_arguments(other):
    state = scale_by_microadam(window=5, density=0.1).init(jnp.ones((4, 100)))
    tx = scale_by_microadam(**{"window": 5, "density": 0.1, **other})
    with pytest.raises(ValueError, match=r"`window`=.*`density`=.*`error_bits`="):
        tx.update(jnp.ones((4, 100)), state)


def test_a_gradient_of_another_rank():
    tx = scale_by_microadam()
    state = tx.init(jnp.ones((4, 100)))
    with pytest.raises(ValueError, match=r"the only leaf.*\(400,\)"):
        tx.update(jnp.ones(400), state)


@pytest.mark.parametrize("grid", [(2, 2), (2,), 4, (0, 1), "ab", (1.0, 1)])
def test_bad_grids(grid):
    tx = scale_by_microadam(grid={"a": grid})
    with pytest.raises(ValueError, match=r"`grid` of \['a'\].*\(4, 9\)"):
        tx.init({"a": jnp.ones((4, 9))})
