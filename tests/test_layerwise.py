"""Training layer by layer gives what ordinary training gives, in less memory.

If it fails, a model trained layer by layer learns something else, cannot go on as an
ordinary one, or does not fit where it was said to fit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_optax import layerwise, microadam, state_shardings
from quick import quick
from stacked_layers import (
    LAYERS,
    TRANSFORMATIONS,
    assert_same_bits,
    block,
    by_layers,
    data,
    loss_of,
    ordinary,
    parameters,
    run,
)

NAMES = [name for name in TRANSFORMATIONS if name != "random rounding"]  # in bfloat16


@pytest.mark.parametrize("name", quick(NAMES, "default", "literal", "adamw"))
def test_it_is_the_ordinary_step(name):
    """Parameters, state, loss and the gradient of the input, in every bit.

    Also of a run that changes from one way to the other and back.
    """
    tx = TRANSFORMATIONS[name]
    found = [
        run(step, tx, 20, parameters(), tx.init(parameters()))
        for step in (ordinary, by_layers)
    ]
    assert_same_bits(*found)
    both = parameters(), tx.init(parameters())
    for step, steps in ((by_layers, 8), (ordinary, 8), (by_layers, 4)):
        params, state, *others = run(step, tx, steps, *both)
        both = params, state
    assert_same_bits((params, state, *others), found[0])


def test_apply_is_told_the_number_of_the_layer():
    tx, params = optax.sgd(0.0), parameters()

    def apply(layer, updates, number):
        return jax.tree.map(lambda p, u: p + u + number, layer, updates)

    step = jax.jit(functools.partial(by_layers, tx, apply=apply))
    new, *_ = step(params, tx.init(params), *data())
    added = new["norm"] - params["norm"]
    np.testing.assert_allclose(added, np.arange(LAYERS)[:, None] + 0 * added, atol=1e-6)


def test_shared_arguments_reach_every_layer():
    def masked(layer, x, mask):
        return x + mask * jnp.tanh(x @ layer["w"])

    layers = {"w": jnp.zeros((3, 8, 8))}
    x, mask = jnp.ones((2, 8)), jnp.zeros(8).at[0].set(1.0)
    y, backward = layerwise.vjp(masked, layers, x, mask)
    tx = optax.sgd(1.0)
    _, new, _ = backward(jnp.ones_like(y), tx.init(layers), tx)
    moved = np.abs(np.asarray(new["w"] - layers["w"])).max((0, 1))
    assert moved[0] > 0
    assert not moved[1:].any()


def test_clipping_by_the_global_norm():
    """The norm is that of all gradients, and a scaled `dy` gives scaled ones."""
    params, (x, target) = parameters(), data()
    others = {"head": jnp.full(7, 2.0)}

    def loss(params):
        y, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params)
        return loss_of(target, y)

    @jax.jit
    def by_layers(params):
        tx = optax.sgd(1.0)
        y, backward = layerwise.vjp(block, params, x)
        dy = jax.grad(functools.partial(loss_of, target))(y)
        norm = layerwise.global_norm(backward, dy, others)
        _, new, _ = backward(dy * 0.5, tx.init(params), tx)
        return norm, new

    gradients = jax.jit(jax.grad(loss))(params)
    norm, new = by_layers(params)
    np.testing.assert_allclose(norm, optax.tree.norm((gradients, others)), rtol=1e-5)
    half = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)
    for got, expected in zip(jax.tree.leaves(new), jax.tree.leaves(half), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", quick(["microadam", "XLA"], "microadam"))
def test_nothing_of_the_size_of_the_stack_is_allocated(name):
    """The peak in bytes a parameter: parameters, state and at most 1.9 more."""
    tx = {
        "microadam": microadam(1e-3),
        "XLA": microadam(1e-3, window=1, density=0.1, implementation="xla"),
    }[name]
    params = jax.eval_shape(lambda: parameters(width=512, inner=1536, layers=16))
    state = jax.eval_shape(tx.init, params)
    batch = jax.ShapeDtypeStruct((128, 512), jnp.float32)
    step = jax.jit(functools.partial(by_layers, tx), donate_argnums=(0, 1))
    compiled = step.lower(params, state, batch, batch).compile()
    held = compiled.memory_analysis()
    number = sum(x.size for x in jax.tree.leaves(params))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert held.alias_size_in_bytes >= kept
    assert held.temp_size_in_bytes <= 1.9 * number


def test_on_a_mesh():
    """Sharded over 8 devices: as on one, and a layer costs no more communication."""
    tx, params = microadam(1e-2, density=0.25), parameters()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"norm": P(None, "d"), "up": P(None, "d"), "down": P(None, None, "d")}
    own = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    want = run(by_layers, tx, 3, params, tx.init(params))
    params = jax.device_put(parameters(), own)
    places = own, state_shardings(tx, params, own)
    state = jax.jit(tx.init, out_shardings=places[1])(params)
    counts = []
    for step in (ordinary, by_layers):
        pinned = jax.jit(functools.partial(step, tx), out_shardings=(*places, None, None))
        pinned = pinned.lower(params, state, *data()).compile()
        text = pinned.as_text()
        counts.append(sum(text.count(f" {x}(") for x in COLLECTIVES))
    assert counts[1] <= counts[0]
    for _ in range(3):
        params, state, value, _ = pinned(params, state, *data())
    np.testing.assert_allclose(value, want[2], rtol=1e-4)
    np.testing.assert_array_equal(state[0].count, 3)
    for name in params:
        close = np.isclose(params[name], want[0][name], rtol=1e-3, atol=1e-5)
        assert close.mean() > 0.99


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({}, "`layers` has no arrays."),
        (
            {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))},
            r"\['b'\] has the shape \(2, 4",
        ),
        ({"a": jnp.ones((3, 4)), "b": jnp.float32(1)}, r"\['b'\] has the shape \(\)"),
    ],
)
def test_layers_that_are_not_stacked(layers, words):
    with pytest.raises(ValueError, match=words):
        layerwise.vjp(block, layers, jnp.ones(4))


def test_a_layer_smaller_than_a_block_must_be_dense_or_have_a_grid():
    def shifted(layer, x):
        return x * (1 + layer["bias"])

    def step(tx):
        def once(layers):
            y, backward = layerwise.vjp(shifted, layers, jnp.ones((2, 32)))
            return backward(y, tx.init(layers), tx)

        return jax.jit(once)({"bias": jnp.ones((4, 32))})

    with pytest.raises(ValueError, match=r"\[0\]\.codes\['bias'\] has the shape \(2, "):
        step(microadam(1e-2, dense=None))
    step(microadam(1e-2))
    _, layers, _ = step(microadam(1e-2, dense=None, grid={"bias": (4, 1)}))
    moved = layers["bias"] != 1
    np.testing.assert_array_equal(moved.sum(1), 2)  # of 32, 6 % of each layer
