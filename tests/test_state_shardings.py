"""Where the state of any optax chain lies, and that it stays there.

If it fails, the state of a sharded model is replicated, or moves at every step.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import microadam, scale_by_microadam
from meshes import assert_placed, collectives, make_mesh, shardings_of, zeros
from microadam_optax import (
    MicroAdamState,
    shard_grid,
    smaller_than,
    state_shardings,
    static_args,
)
from quick import quick

SPECS = {"w": P("fsdp", "tp"), "b": P("tp"), "tiny": P("fsdp"), "scalar": P()}
SHAPES = {"w": (16, 512), "b": (1024,), "tiny": (8,), "scalar": ()}
SHARDS = {"w": 8, "b": 2}  # of all arrays of their state


def only_w(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "w", tree)


CHAINS = {
    "alone": microadam(0.1),
    "window 1": microadam(0.1, window=1, weight_decay=0.1),
    "clipped, with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        microadam(optax.linear_schedule(1.0, 0.0, 10), stochastic_rounding=True),
    ),
    "accumulated": optax.MultiSteps(microadam(0.1), 2).gradient_transformation(),
    "masked": optax.masked(microadam(0.1), only_w),
    "masked by a function": optax.masked(
        microadam(0.1), lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)
    ),
    "partitioned": optax.partition(
        {True: microadam(0.1), False: optax.adam(0.1)}, only_w
    ),
    "dense where small": microadam(0.1, dense=smaller_than(2000)),
    "with hyperparameters": optax.inject_hyperparams(
        microadam, static_args=static_args(microadam)
    )(learning_rate=0.1),
    "finite only": optax.apply_if_finite(microadam(0.1), 3),
    "beside momentum": optax.chain(microadam(0.1), optax.trace(0.9)),
}


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# What XLA may shard in its own way on both kinds of meshes, the others on one.
ON_BOTH = ("alone", "accumulated")
ON = [
    *(("auto", chain) for chain in ON_BOTH),
    *(("explicit", chain) for chain in CHAINS),
]
QUICK = ("alone", "window 1", "accumulated", "masked", "dense where small")


@pytest.fixture(params=KINDS)
def mesh(request):
    return make_mesh("fsdp 4, tp 2", KINDS[request.param])


@pytest.fixture
def params(mesh):
    """Concrete parameters, one of them sharded as its state cannot be."""
    return zeros(
        {
            name: jax.ShapeDtypeStruct(
                SHAPES[name], jnp.float32, sharding=NamedSharding(mesh, spec)
            )
            for name, spec in SPECS.items()
        }
    )


def nodes(state):
    """MicroAdam's part of a state, wherever it is."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MicroAdamState))
    return [node for node in found if isinstance(node, MicroAdamState)]


@pytest.mark.promotes
@pytest.mark.parametrize(
    ("mesh", "chain"),
    quick(ON, *(case for case in ON if case[1] in QUICK), several=True),
    indirect=["mesh"],
)
def test_any_chain(chain, params, mesh):
    """They are valid for any chain, cut what can be cut, and an update keeps them."""
    if mesh.axis_types[0] == AxisType.Auto:
        del params["tiny"]  # XLA shards its state in its own way unless it is told
    tx = CHAINS[chain]
    places = state_shardings(tx, params)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=places)(params)
        assert_placed(state, places)
        (node,) = nodes(state)
        for field in (node.codes, node.ranges, node.indices, node.values):
            for leaf, array in (field or {}).items():
                if leaf in SHARDS and isinstance(array, jax.Array):
                    held = array.addressable_shards[0].data.size
                    assert held * SHARDS[leaf] == array.size
        assert node.count.sharding.spec == P()
        _, new = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert_placed(new, places)


def test_state_of_other_transformations(params):
    """Moments like the parameter; row and column statistics replicated."""
    places = state_shardings(optax.adafactor(0.1, min_dim_size_to_factor=8), params)
    factored = places[0]
    assert factored.v_row["w"].spec == P()
    assert factored.v["b"].spec == P("tp")
    adam = state_shardings(optax.adamw(0.1), params)[0]
    assert adam.mu["w"].spec == P("fsdp", "tp")
    assert adam.nu["tiny"].spec == P("fsdp")


@pytest.mark.parametrize(
    ("mesh", "jitted", "in_context"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("explicit", False, True),
        ("explicit", True, False),
    ],
    indirect=["mesh"],
)
def test_eager_init_follows_the_parameters(params, mesh, jitted, in_context):
    del params["tiny"]  # on an auto mesh XLA would shard its state in its own way
    tx = scale_by_microadam(window=2, density=0.1)
    places = state_shardings(tx, params)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        state = tx.init(params)
        for _ in range(2):
            for field in ("codes", "ranges", "indices", "values"):
                assert_placed(getattr(state, field), getattr(places, field))
            update = jax.jit(tx.update) if jitted else tx.update
            updates, state = update(params, state)
            assert_placed(updates, shardings_of(params))


def test_single_devices():
    """Committed parameters keep their state with them, others leave it free to move."""
    state = scale_by_microadam().init({"w": jnp.ones((4, 64))})
    assert not state.codes["w"].committed
    device = jax.devices()[3]
    there = jax.device_put(jnp.ones((4, 64)), device)
    state = scale_by_microadam().init(there)
    for array in (state.codes, state.ranges, state.indices, state.values):
        assert array.devices() == {device}
    updates, state = scale_by_microadam().update(there, state)
    assert updates.devices() == state.codes.devices() == {device}


def test_given_shardings_and_prefixes(mesh):
    shapes = {"a": [jax.ShapeDtypeStruct((16, 512), "float32")] * 2, "b": jnp.ones(64)}
    rows = NamedSharding(mesh, P("fsdp"))
    tx = scale_by_microadam()
    places = state_shardings(tx, shapes, {"a": rows, "b": NamedSharding(mesh, P())})
    assert [x.spec for x in places.codes["a"]] == [P("fsdp")] * 2
    assert places.codes["b"].spec == P()
    with jax.set_mesh(mesh):
        assert places == state_shardings(tx, shapes, {"a": P("fsdp"), "b": P()})
    assert shard_grid(shapes, rows) == {"a": [(4, 1)] * 2, "b": (4,)}


def test_mesh_axes_that_do_not_divide_the_state_are_dropped(mesh):
    both = NamedSharding(mesh, P(("tp", "fsdp")))
    shapes = {
        "all": jax.ShapeDtypeStruct((512,), "float32"),
        "the first": jax.ShapeDtypeStruct((192,), "float32"),
        "none": jax.ShapeDtypeStruct((64,), "float32"),
    }
    codes = state_shardings(scale_by_microadam(shards=2), shapes, both).codes
    assert codes["all"].spec == codes["the first"].spec == P("tp")
    assert codes["none"].spec == P(None)
    codes = state_shardings(scale_by_microadam(), shapes, both).codes
    assert codes["all"].spec == P(("tp", "fsdp"))


def test_memory_kinds_are_kept(mesh):
    kind = "unpinned_host"
    params = {"w": jax.ShapeDtypeStruct((16, 512), "float32")}
    place = NamedSharding(mesh, P("fsdp"), memory_kind=kind)
    places = state_shardings(scale_by_microadam(), params, place)
    assert {x.memory_kind for x in jax.tree.leaves(places)} == {kind}


def test_bad_shardings(mesh):
    tx, params = scale_by_microadam(), {"w": np.ones((16, 512))}
    with pytest.raises(ValueError, match=r"`shardings` has none for \['w'\]"):
        state_shardings(tx, params)
    with pytest.raises(ValueError, match="`shardings` must be a tree like `params`"):
        state_shardings(tx, params, {"v": NamedSharding(mesh, P())})
    with pytest.raises(TypeError, match=r"of \['w'\] must be a .*Sharding.* got 3"):
        state_shardings(tx, params, {"w": 3})
    with pytest.raises(TypeError, match=r"PartitionSpec under jax\.set_mesh"):
        state_shardings(tx, params, {"w": P("fsdp")})
    with pytest.raises(ValueError, match="`params` has no arrays"):
        state_shardings(tx, {})


def test_zero_style(mesh):
    """Parameters replicated, state sharded: what is sent is the update, no more."""
    leaf = jax.ShapeDtypeStruct((16, 512), "float32", sharding=NamedSharding(mesh, P()))
    params = {"w": leaf, "v": leaf}
    tx = microadam(1e-3, window=2, density=0.06)
    rows = NamedSharding(mesh, P(("fsdp", "tp")))
    places = state_shardings(tx, params, rows)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=places)(zeros(params))
        jitted = jax.jit(
            step, donate_argnums=(0, 1), out_shardings=(shardings_of(params), places)
        )
        compiled = jitted.lower(params, state, params).compile()
        assert collectives(compiled) == {"all-gather": 2}
        rng = np.random.default_rng(0)
        values = {name: rng.standard_normal((16, 512), np.float32) for name in params}
        alone = values, tx.init(values)
        here = jax.device_put(values, shardings_of(params)), state
        for _ in range(5):
            here = compiled(*here, jax.device_put(values, shardings_of(params)))
            alone = jax.jit(step)(*alone, values)
    jax.tree.map(np.testing.assert_array_equal, here, alone)


def largest_that_divides(x, mesh):
    """As some trainers shard whatever they are given."""
    axes = [axis for axis, n in enumerate(x.shape) if n % 8 == 0]
    spec = [None] * x.ndim
    if axes:
        spec[max(axes, key=lambda axis: x.shape[axis])] = "d"
    return NamedSharding(mesh, P(*spec))


@pytest.mark.parametrize(
    ("own", "implementation"),
    quick(
        [(P("d"), None), (P(None, "d"), None), (P("d"), "xla")],
        (P("d"), None),
        (P(None, "d"), None),
        several=True,
    ),
)
def test_each_array_by_its_own_rule(own, implementation):
    """Axes of rows, of blocks and within blocks: right, at the price of being sent."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    tx = microadam(1e-3, density=0.01, implementation=implementation)
    shapes = {"rows": (64, 512), "within": (16, 4096)}
    places = {name: NamedSharding(mesh, own) for name in shapes}
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(x, np.float32) for name, x in shapes.items()}
    state = tx.init(values)
    rules = jax.tree.map(functools.partial(largest_that_divides, mesh=mesh), state)
    assert rules[0].codes["rows"].spec[0] == rules[0].codes["within"].spec[-1] == "d"

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(places, rules))
    here = jax.device_put((values, state), (places, rules))
    alone, gradients = (values, tx.init(values)), jax.device_put(values, places)
    for _ in range(3):
        here, alone = jitted(*here, gradients), jax.jit(step)(*alone, values)
    jax.tree.map(np.testing.assert_array_equal, here, alone)
    assert jax.tree.map(lambda x: x.sharding, here) == (places, rules)


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_what_leaves_share_lies_where_they_do(kind):
    """From init on: the second step, or a restart, finds the program of the first."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    own = NamedSharding(mesh, P("d"), memory_kind=kind)
    params = jax.device_put({"w": jnp.ones((512, 256)), "b": jnp.ones(64)}, own)
    tx = scale_by_microadam(stochastic_rounding=True, dense=smaller_than(100))
    state = tx.init(params)
    for x in jax.tree.leaves(state):
        assert x.sharding.device_set == own.device_set
        assert x.sharding.memory_kind == kind
    if kind == "device":
        update = jax.jit(tx.update)
        for _ in range(3):
            _, state = update(params, state)
        assert update._cache_size() == 1


def test_an_offloaded_state_compiles_once():
    """It lies in the host's memory between steps, its scalars as well."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    own = NamedSharding(mesh, P("d"))
    params = jax.device_put({"w": jnp.ones((512, 256))}, own)
    tx = microadam(0.1)
    here = state_shardings(tx, params, own)
    host = jax.tree.map(lambda x: x.with_memory_kind("pinned_host"), here)

    def step(params, state):
        updates, state = tx.update(params, jax.device_put(state, here), params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=({"w": own}, host))
    alone, state = (params, tx.init(params)), jax.device_put(tx.init(params), host)
    for _ in range(3):
        params, state = step(params, state)
        alone = jax.jit(step.__wrapped__, out_shardings=({"w": own}, here))(*alone)
    assert step._cache_size() == 1
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
