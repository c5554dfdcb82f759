"""The sharding metadata of Linen and NNX gives the state its shardings.

If it fails, models of Flax get optimizer states that lie on the wrong devices.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import microadam_optax
import sharded_linen
import sharded_nnx
from compressed import microadam
from meshes import make_mesh
from microadam_optax import shard_grid, state_shardings

NAMES = ("fsdp", "tp")


def boxed(*names):
    """A Linen parameter with metadata, as a shape."""
    shape = {("fsdp", "tp"): (64, 1024), ("tp",): (1024,), ("tp", "fsdp"): (1024, 16)}
    leaf = jax.ShapeDtypeStruct(shape[names], jnp.float32)
    return nn.Partitioned(leaf, names=names)


def test_linen_boxes():
    """Their specs are right where the grid divides; `state_shardings` is everywhere."""
    mesh, tx = make_mesh("fsdp 4, tp 2"), microadam(0.1)
    params = {"kernel": boxed("fsdp", "tp"), "bias": boxed("tp")}
    state = jax.eval_shape(tx.init, params)
    specs = nn.get_partition_spec(state)[0]
    own = nn.get_sharding(params, mesh)
    places = state_shardings(tx, params, own)[0]
    for name in ("codes", "ranges", "indices", "values"):
        by_boxes, by_us = getattr(specs, name), getattr(places, name)
        assert by_boxes == {"kernel": P("fsdp", "tp"), "bias": P("tp")}
        assert by_us["kernel"].value.spec == by_boxes["kernel"]
        assert by_us["bias"].value.spec == by_boxes["bias"]
    short = {"kernel": boxed("tp", "fsdp")}
    places = state_shardings(tx, short, nn.get_sharding(short, mesh))
    assert places[0].codes["kernel"].value.spec == P("tp", None)
    grid = shard_grid(short, nn.get_sharding(short, mesh))
    places = state_shardings(
        microadam(0.1, grid=grid), short, nn.get_sharding(short, mesh)
    )
    assert places[0].codes["kernel"].value.spec == P("tp", "fsdp")


def test_dense_leaves_keep_their_metadata():
    mesh, tx = make_mesh("fsdp 4, tp 2"), microadam_optax.microadam(0.1)
    params = {"kernel": boxed("fsdp", "tp"), "bias": boxed("tp")}
    state = jax.eval_shape(tx.init, params)
    places = state_shardings(tx, params, nn.get_sharding(params, mesh))[0]
    for tree in (nn.get_partition_spec(state)[0], places):
        for moments in (tree.mu, tree.nu):
            bias = moments["bias"]
            assert getattr(bias, "value", bias) in (P("tp"), NamedSharding(mesh, P("tp")))
    assert jax.tree.leaves(state[0].codes["bias"]) == []
    assert jax.tree.leaves(state[0].mu["kernel"]) == []


@pytest.mark.slow
def test_linen_example(capsys):
    params, state, losses = sharded_linen.train(30)
    assert capsys.readouterr().err.startswith("compiling the training step ... ")
    assert losses[-1] < 0.7 * losses[0]
    tx = microadam_optax.microadam(1e-3)  # the example's: biases are dense
    own = jax.tree.map(lambda x: x.sharding, params)
    places = state_shardings(tx, params, own)
    for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(at, x.ndim)
    assert (
        state[0].mu["Dense_0"]["bias"].value.shape
        == params["Dense_0"]["bias"].value.shape
    )
    kernel = state[0].codes["Dense_0"]["kernel"].value
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


@pytest.mark.slow
def test_nnx_example(capsys):
    _, optimizer, losses = sharded_nnx.train(30)
    assert capsys.readouterr().err.startswith("compiling the training step ... ")
    assert losses[-1] < 0.7 * losses[0]
    own = optimizer.opt_state[0]
    for field in ("codes", "ranges", "indices", "values", "mu", "nu"):
        tree = getattr(own, field)
        leaves = [
            (tree["up"]["kernel"], P("fsdp", "tp")),
            (tree["down"]["kernel"], P("tp", "fsdp")),
        ]
        if field in ("mu", "nu"):
            leaves = [(tree["up"]["bias"], P("tp"))]  # a dense one
        for leaf, spec in leaves:
            array = leaf[...]
            assert leaf.get_metadata()["out_sharding"] == tuple(spec)
            assert array.sharding.spec[: len(spec)] == tuple(spec)
            shards = {("fsdp", "tp"): 8, ("tp", "fsdp"): 8, ("tp",): 2}[tuple(spec)]
            assert array.addressable_shards[0].data.size * shards == array.size


def test_nnx_metadata_is_enough_where_the_default_grid_divides():
    mesh = make_mesh("fsdp 4, tp 2")
    with jax.set_mesh(mesh):
        layer = sharded_nnx.dense(64, 1024, *NAMES, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(layer, microadam(0.1), wrt=nnx.Param)
        assert optimizer.opt_state[0].codes["kernel"][...].shape == (64, 8, 1, 64)
        for field in ("codes", "ranges", "indices", "values"):
            array = getattr(optimizer.opt_state[0], field)["kernel"][...]
            assert array.sharding.spec == P("fsdp", "tp")
        short = sharded_nnx.dense(1024, 16, "tp", "fsdp", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"partitioned 4 times|divide"):
            nnx.Optimizer(short, microadam(0.1), wrt=nnx.Param)
