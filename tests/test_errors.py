"""Bad input: one sentence, before anything is computed, and no state is changed.

If it fails, a mistake in arguments or trees trains wrongly instead of being named.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressed import microadam, scale_by_microadam
from microadam_optax import check_checkpoint

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
    ("b1", 1.0),
    ("b1", -0.5),
    ("b2", 1.0),
    ("b2", 0.99999999),
    ("eps", 0.0),  # what is not selected would be 0 / 0
    ("eps", 1e-60),  # 0 in float32
    ("eps_root", -1e-8),
    ("eps_root", float("inf")),
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
    ("b1", None),
    ("eps", "1e-8"),
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
    with pytest.raises(TypeError, match=r"static_args=microadam_optax\.static_args"):
        tx.init(jnp.ones(3))


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
        (
            {"a": 4, "b": 40},
            r"\['b'\] is that of a leaf of shape \(8,\) .* shape \(40,\)",
        ),
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


# What differs from window 5, density 0.1, 4 bits and blocks of 256, and what is said.
OTHERS = [
    ({"window": 3}, "`window` 3, .* `window` 5"),
    ({"window": 1}, "`window` 1, .* `window` 5"),
    ({"density": 0.5}, "128 entries selected .* 26 entries selected"),
    ({"error_bits": 8}, "`error_bits` 8, .* `error_bits` 4"),
    ({"error_bits": 2}, "`error_bits` 2, .* `error_bits` 4"),
    ({"block_size": 128}, "blocks of 128 elements .* blocks of 256 elements"),
    # as many bytes in each array: 2 * 52 entries, and 4 * 26
    ({"window": 3, "density": 0.2}, "`window` 3 and 52 entries .* `window` 5 and 26"),
    (
        {"window": 3, "block_size": 128, "error_bits": 8},
        "`window` 3 and `error_bits` 8 and blocks of 128 .* `window` 5 and",
    ),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_state_of_other_arguments(other, message):
    """Both values are named, at the update and before a checkpoint is restored."""
    usual = {"window": 5, "density": 0.1}
    tree = {"w": jnp.ones((4, 2048)), "z": jnp.ones(5)}
    tx, before = (scale_by_microadam(**usual), scale_by_microadam(**(usual | other)))
    with pytest.raises(ValueError, match=rf"of \['w'\] was made with {message}"):
        tx.update(tree, before.init(tree))
    chains = (optax.chain(optax.trace(0.9), each) for each in (before, tx))
    saved, chain = jax.eval_shape(next(chains).init, tree), next(chains)
    with pytest.raises(ValueError, match=rf"of \['w'\] was made with {message}"):
        check_checkpoint(saved, chain, tree)
    check_checkpoint(jax.eval_shape(chain.init, tree), chain, tree)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_rate_is_a_finite_number(name):
    given = {"learning_rate": 0.1}
    for value in (None, "0.1", jnp.ones(2)):
        with pytest.raises(TypeError, match=rf"^`{name}` must be a finite number.*\.$"):
            microadam(**(given | {name: value}))
    for value in (float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=rf"^`{name}` must be a finite .* {value}\.$"
        ):
            microadam(**(given | {name: value}))
    for value in (1, np.float32(0.1), jnp.float32(0.1), lambda _: 0.1):
        microadam(**(given | {name: value}))


@pytest.mark.parametrize("called", [False, True])
def test_masks_of_weight_decay(called):
    tree = {"b": jnp.ones(8), "w": jnp.ones((8, 64))}

    def started(mask):
        given = (lambda _: mask) if called else mask
        return microadam(0.1, weight_decay=0.1, mask=given).init(tree)

    with pytest.raises(ValueError, match=r"^`mask` must be .* nothing for \['w'\]\.$"):
        started({"b": True})
    with pytest.raises(
        ValueError, match=r"^`mask` must be .* parameters have no \['c'\]"
    ):
        started({"b": True, "w": True, "c": True})
    with pytest.raises(
        TypeError, match=r"^`mask` must give a bool .* 'no' for \['w'\]\.$"
    ):
        started({"b": True, "w": "no"})
    started({"b": False, "w": np.True_})
    started(True)


def test_a_gradient_of_another_shape_of_as_many_elements():
    tx, params = microadam(0.1), {"w": jnp.ones((64, 64))}
    with pytest.raises(ValueError, match=r"\['w'\] .* \(32, 128\), .* \(64, 64\)\.$"):
        tx.update({"w": jnp.ones((32, 128))}, tx.init(params), params)


@pytest.mark.parametrize("other", [optax.sgd(0.1), optax.lion(0.1)])
def test_a_checkpoint_that_is_no_microadams(other):
    saved = jax.eval_shape(other.init, {"w": jnp.ones((64, 64))})
    with pytest.raises(ValueError, match="state is no MicroAdam's: it has neither"):
        check_checkpoint(saved, microadam(0.1), {"w": jnp.ones((64, 64))})


def test_checkpoints_of_other_grids_chains_and_trees():
    tree = {"w": jnp.ones((4, 512)), "z": jnp.ones(5)}
    tx, other = scale_by_microadam(), scale_by_microadam(shards=4)
    with pytest.raises(ValueError, match=r"grid \(4, 4\) .* grid \(4, 8\)"):
        check_checkpoint(jax.eval_shape(other.init, tree), tx, tree)
    saved = jax.eval_shape(tx.init, tree)
    with pytest.raises(ValueError, match=r"nothing at 0/.*shape"):
        check_checkpoint(saved, optax.chain(tx), tree)
    with pytest.raises(ValueError, match="nothing at codes/c"):
        check_checkpoint(saved, tx, {**tree, "c": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"array at codes/z, .* has none"):
        check_checkpoint(saved, tx, {"w": tree["w"]})
    with pytest.raises(ValueError, match=r"\['z'\] is that of .* \(8,\) .* \(1024,\)"):
        check_checkpoint(saved, tx, {"w": tree["w"], "z": jnp.ones(1024)})


@pytest.mark.parametrize(
    ("before", "said", "after", "window"),
    [  # another width, vocabulary, number of layers; padded or not
        ((512, 256), (512, 256), (512, 512), 2),
        ((512, 256), (512, 256), (768, 256), 2),
        ((512, 256), (512, 256), (768, 1024), 2),
        ((4, 64, 192), (4, 64, 192), (6, 64, 192), 1),
        ((8192,), (8192,), (4096,), 1),
        ((50257, 128), (50258, 128), (50304, 128), 2),
        ((4, 1000), (4, 1024), (4, 2000), 2),
    ],
)
def test_a_gradient_of_another_shape(before, said, after, window):
    """Both shapes are named, not the settings that the state would need to fit."""
    tx = scale_by_microadam(window=window)
    params, gradients = ({"w": jnp.ones(shape)} for shape in (before, after))
    made, given = re.escape(str(said)), re.escape(str(after))
    words = rf"\['w'\] is that of a leaf of shape {made} .*, but .* {given}\.$"
    with pytest.raises(ValueError, match=words):
        tx.update(gradients, tx.init(params))
    with pytest.raises(ValueError, match=words):
        check_checkpoint(jax.eval_shape(tx.init, params), tx, gradients)


def test_where_shape_and_settings_cannot_be_told_apart():
    tx = scale_by_microadam(window=1)
    params = {"w": jnp.ones((512, 256))}
    with pytest.raises(ValueError, match=r"`error_bits` 2, .* or .* \(512, 256\)"):
        tx.update({"w": jnp.ones((512, 512))}, tx.init(params))


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


@pytest.mark.parametrize(
    ("grid", "difference"),
    [
        ({"a": (4, 1)}, r"it has nothing for \['b'\]\['c'\]"),
        ({"a": (4, 1), "b": {}}, r"it has nothing for \['b'\]\['c'\]"),
        ({"a": (4, 1), "b": {"c": None}, "d": (1,)}, r"the parameters have no \['d'\]"),
        ((4, 1), r"it has nothing for \['a'\]"),
        ({"a": (4, 1), "b": [None]}, r"it has nothing for \['b'\]\['c'\]"),
    ],
)
def test_grids_of_another_tree(grid, difference):
    params = {"a": jnp.zeros((4, 9)), "b": {"c": jnp.zeros(8)}}
    message = f"^`grid` must be a tree like the parameters, but {difference}\\.$"
    with pytest.raises(ValueError, match=message):
        scale_by_microadam(grid=grid).init(params)
    masked = {"a": params["a"], "b": {"c": optax.MaskedNode()}}
    with pytest.raises(ValueError, match=r"it has nothing for \['a'\]"):
        scale_by_microadam(grid={"b": {"c": None}}).init(masked)


def test_a_state_of_the_other_rounding():
    random, nearest = (scale_by_microadam(stochastic_rounding=x) for x in (True, False))
    gradient = jnp.ones(8)
    for tx, other, made in [(random, nearest, False), (nearest, random, True)]:
        words = f"made with `stochastic_rounding` {made}, but"
        with pytest.raises(ValueError, match=words):
            tx.update(gradient, other.init(gradient))
        with pytest.raises(ValueError, match=words):
            check_checkpoint(other.init(gradient), tx, gradient)


def test_a_gradient_that_is_not_its_parameters():
    """Transposed, it would fit the state."""
    tx, params = scale_by_microadam(), {"w": jnp.ones((64, 128))}
    gradient = {"w": jnp.ones((128, 64))}
    words = r"gradient of \['w'\] has the shape \(128, 64\), .* parameter \(64, 128\)"
    with pytest.raises(ValueError, match=words):
        tx.update(gradient, tx.init(params), params)
