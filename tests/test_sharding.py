"""On meshes of 8 devices: no communication, and the bits of one device.

If it fails, sharded training sends data between devices, or gives other numbers.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import scale_by_microadam
from meshes import (
    CASES,
    CASES_ON,
    assert_placed,
    cases_on,
    collectives,
    make_mesh,
    shardings_of,
    zeros,
)
from microadam_optax import PAPER, _chunks, shard_grid, state_shardings
from quick import quick

STEPS = 4  # three fill the longest window but the paper's
SETTINGS = {
    "window 2": {"window": 2, "density": 0.06},
    "window 1": {"window": 1, "density": 0.12},
    "all options": {
        "window": 3,
        "density": 0.02,
        "error_bits": 8,
        "alpha": 0.1,
        "stochastic_rounding": True,
    },
}


@pytest.fixture(params=["whole", "in chunks"])
def strategy(request, monkeypatch):
    """Leaves in one piece, as on GPU, or in many, as large ones are on CPU and TPU."""
    elements = {"whole": 2**40, "in chunks": 2**13}[request.param]
    monkeypatch.setattr(_chunks, "ELEMENTS", elements)
    jax.clear_caches()  # the number of chunks is no argument of what is cached
    yield
    jax.clear_caches()


def leaves_on(name, kind=AxisType.Auto):
    """A small leaf for every case on a mesh, float32 and bfloat16 by turns."""
    mesh = make_mesh(name, kind)
    turns = (jnp.float32, jnp.bfloat16)
    return {
        name: jax.ShapeDtypeStruct(
            case.small, turns[i % 2], sharding=NamedSharding(mesh, case.spec)
        )
        for i, (name, case) in enumerate(cases_on(name).items())
    }


def gradients(step, leaves):
    """Of different sizes from row to row, and so from block to block."""
    rng = np.random.default_rng(step)

    def one(leaf):
        size = rng.choice([1e-4, 1.0], (*leaf.shape[:-1], 1))
        return (rng.standard_normal(leaf.shape) * size).astype(leaf.dtype)

    return jax.tree.map(one, leaves)


def assert_same(found, expected):
    def check(path, x, y):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)

    jax.tree_util.tree_map_with_path(check, found, expected)


def beside_one_device(tx, leaves, context=contextlib.nullcontext, pinned=False):
    """Steps on the mesh and on one device: equal bits, and shardings that stay.

    Returns the collectives of the update on the mesh.
    """
    own, places = shardings_of(leaves), state_shardings(tx, leaves)
    alone = jax.jit(tx.init)(gradients(0, leaves))
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    pins = {"out_shardings": (own, places)} if pinned else {}
    with context():
        state = jax.jit(tx.init, out_shardings=places)(zeros(leaves))
        jitted = jax.jit(tx.update, donate_argnums=(0, 1), **pins)
        compiled = jitted.lower(leaves, state).compile()
    assert_same(state, alone)
    assert_placed(state, places)
    for step in range(STEPS):
        here = gradients(step, leaves)
        with context():
            updates, state = compiled(jax.device_put(here, own), state)
        updates_alone, alone = update(here, alone)
        assert_same((updates, state), (updates_alone, alone))
    assert_placed((updates, state), (own, places))
    return collectives(compiled)


ON = [
    ("fsdp 8", "in chunks"),
    ("tp 8", "whole"),
    ("fsdp 2, tp 4", "in chunks"),
    ("fsdp 4, tp 2", "whole"),
    ("data 2, fsdp 4", "in chunks"),
    ("data 2, fsdp 2, tp 2", "whole"),
]
EXPLICIT_ON = [("data 2, fsdp 2, tp 2", "in chunks"), ("fsdp 4, tp 2", "whole")]


def test_every_case_is_on_a_mesh():
    assert {case for cases in CASES_ON.values() for case in cases} == set(CASES)


@pytest.mark.parametrize(
    ("name", "strategy"),
    quick(ON, ("data 2, fsdp 4", "in chunks"), several=True),
    indirect=["strategy"],
)
@pytest.mark.usefixtures("strategy")
def test_meshes(name):
    assert beside_one_device(scale_by_microadam(**PAPER), leaves_on(name)) == {}


@pytest.mark.parametrize("strategy", ["whole"], indirect=True)
@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("settings", ["window 1", "all options"])
@pytest.mark.slow
def test_settings(settings):
    tx, leaves = scale_by_microadam(**SETTINGS[settings]), leaves_on("fsdp 4, tp 2")
    if settings == "all options":  # which compile for long
        leaves = dict(itertools.islice(leaves.items(), 1))
    assert beside_one_device(tx, leaves) == {}


@pytest.mark.parametrize(
    ("name", "strategy"),
    quick(EXPLICIT_ON, EXPLICIT_ON[0], several=True),
    indirect=["strategy"],
)
@pytest.mark.usefixtures("strategy")
def test_explicit_meshes(name):
    leaves = leaves_on(name, AxisType.Explicit)
    mesh = jax.tree.leaves(leaves)[0].sharding.mesh
    tx = scale_by_microadam(**SETTINGS["window 2"])
    assert beside_one_device(tx, leaves, functools.partial(jax.set_mesh, mesh)) == {}


OTHERS = [name for name in CASES_ON if name not in dict(EXPLICIT_ON)]


@pytest.mark.parametrize("name", quick(OTHERS, "fsdp 2, tp 4"))
def test_explicit_meshes_send_nothing(name):
    """Every other case, compiled only."""
    leaves = leaves_on(name, AxisType.Explicit)
    tx = scale_by_microadam(**SETTINGS["window 1"])
    with jax.set_mesh(jax.tree.leaves(leaves)[0].sharding.mesh):
        state = jax.jit(tx.init)(zeros(leaves))
        assert_placed(state.codes, state_shardings(tx, leaves).codes)
        compiled = (
            jax.jit(tx.update, donate_argnums=(0, 1)).lower(leaves, state).compile()
        )
    assert collectives(compiled) == {}


@pytest.mark.parametrize("strategy", ["in chunks"], indirect=True)
@pytest.mark.usefixtures("strategy")
@pytest.mark.slow
def test_inside_shard_map():
    """Each device updates its own shard, with no help of the partitioner."""
    mesh = make_mesh("tp 8")
    leaf = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=None)
    tx = scale_by_microadam(window=3)
    places = state_shardings(tx, leaf, NamedSharding(mesh, P(None, "tp")))
    specs = P(None, "tp"), jax.tree.map(lambda x: x.spec, places)
    update = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=specs, out_specs=specs))
    gradient = gradients(0, leaf)
    state = alone = tx.init(gradient)
    for step in range(3):
        updates, state = update(gradients(step, leaf), state)
        assert_same((updates, state), jax.jit(tx.update)(gradients(step, leaf), alone))
        alone = state = jax.device_get(state)


# Shard edges that do not fall on the edges of cells.
UNALIGNED = {
    "head_dim": ((64, 4, 128), P(None, None, "tp"), "tp 8"),
    "a small bias": ((64,), P("fsdp"), "fsdp 8"),
    "more shards than `shards`": ((16, 1024), P(None, ("fsdp", "tp")), "fsdp 4, tp 2"),
}


UNALIGNED_ON = [
    ("head_dim", AxisType.Auto),
    ("a small bias", AxisType.Explicit),
    ("more shards than `shards`", AxisType.Auto),
]


@pytest.mark.parametrize(
    ("case", "kind"), quick(UNALIGNED_ON, UNALIGNED_ON[0], several=True)
)
def test_edges_that_do_not_align(case, kind):
    """The result is right, but the update communicates; a grid of shards does not."""
    shape, spec, name = UNALIGNED[case]
    mesh = make_mesh(name, kind)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    context = functools.partial(jax.set_mesh, mesh)
    tx = scale_by_microadam(window=3, shards=4)
    assert beside_one_device(tx, leaf, context, pinned=True) != {}
    tx = scale_by_microadam(window=3, grid=shard_grid(leaf))
    assert beside_one_device(tx, leaf, context) == {}


@pytest.mark.parametrize("shape", [(2 * 1048573,), (2 * 1009, 2048)])
@pytest.mark.slow
def test_pieces_of_a_prime_number_of_blocks_need_no_communication(shape):
    """On each device; in place, so that nothing but pieces is held besides."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("x")))
    tx = scale_by_microadam(implementation="xla")
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, leaf),
            state_shardings(tx, leaf),
        )
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        compiled = step.lower(leaf, state).compile()
    assert collectives(compiled) == {}
    pieces = 3 * 4 * 4 * _chunks.ELEMENTS
    assert compiled.memory_analysis().temp_size_in_bytes <= pieces
