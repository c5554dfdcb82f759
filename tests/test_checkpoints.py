"""Checkpoints with Orbax: from any mesh to any other, and not for other arguments.

If it fails, a run cannot go on from its checkpoint, or goes on wrongly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import microadam
from microadam_optax import check_checkpoint, state_shardings

SHAPES = {"up": (32, 1376), "heads": (64, 8, 64), "bias": (512,)}
SPECS = {"up": P("fsdp", "tp"), "heads": P("fsdp", "tp"), "bias": P("tp")}
WAY = [(4, 2), (1, 2), (1, 1), (1, 8)]  # meshes of 8, 2, 1 and 8 devices
STEPS = 3  # on each mesh


def place(devices):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[: np.prod(devices)]).reshape(devices),
        ("fsdp", "tp"),
        axis_types=(AxisType.Auto,) * 2,
    )
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def shapes():
    return {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32) for name in SHAPES}


def gradients(step):
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(s, np.float32) for name, s in SHAPES.items()}


def make(**settings):
    return optax.chain(
        optax.trace(0.5), microadam(1e-2, window=4, density=0.02, **settings)
    )


def make_step(tx, places=None):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    pinned = {"out_shardings": places} if places else {}
    return jax.jit(step, donate_argnums=(0, 1), **pinned)


def test_from_mesh_to_mesh(tmp_path):
    """Saved and restored on 8, 2, 1 and 8 devices: the bits of an unbroken run."""
    tx = make()
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    unbroken, step_alone = (params, tx.init(params)), make_step(tx)
    target = shapes(), jax.eval_shape(tx.init, shapes())
    with ocp.StandardCheckpointer() as checkpoints:
        for number, devices in enumerate(WAY):
            own = place(devices)
            places = own, state_shardings(tx, shapes(), own)
            if number == 0:
                params = jax.device_put(params, own)
                here = params, jax.jit(tx.init, out_shardings=places[1])(params)
            else:
                like = jax.tree.map(
                    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                    target,
                    places,
                )
                saved = tmp_path / str(number - 1)
                metadata = checkpoints.metadata(saved).item_metadata
                check_checkpoint(metadata[1], tx, shapes())
                here = checkpoints.restore(saved, like)
            devices_used = {x.sharding.mesh.size for x in jax.tree.leaves(here)}
            assert devices_used == {np.prod(devices)}
            step = make_step(tx, places)
            for i in range(number * STEPS, (number + 1) * STEPS):
                here = step(*here, jax.device_put(gradients(i), own))
                unbroken = step_alone(*unbroken, gradients(i))
            jax.tree.map(np.testing.assert_array_equal, here, unbroken)
            checkpoints.save(tmp_path / str(number), here)
            checkpoints.wait_until_finished()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"window": 5}, "`window` 4, .* `window` 5"),
        ({"window": 1}, "`window` 4, .* `window` 1"),
        ({"block_size": 128}, "blocks of 256 elements .* blocks of 128 elements"),
        ({"error_bits": 8}, "`error_bits` 4, .* `error_bits` 8"),
        ({"density": 0.1}, "6 entries selected in a block .* 26 entries selected"),
    ],
)
def test_other_hyperparameters_are_refused(other, message, tmp_path):
    """From the metadata alone, before Orbax speaks of shapes."""
    tree = {"w": jnp.ones((16, 2048))}
    settings = {"window": 4, "density": 0.02}
    saved_by, tx = (microadam(0.1, **s) for s in (settings, settings | other))
    with ocp.StandardCheckpointer() as checkpoints:
        checkpoints.save(tmp_path / "state", saved_by.init(tree))
        checkpoints.wait_until_finished()
        metadata = checkpoints.metadata(tmp_path / "state").item_metadata
        with pytest.raises(ValueError, match=rf"of \['w'\] was made with {message}"):
            check_checkpoint(metadata, tx, tree)
        with pytest.raises(ValueError, match=rf"of \['w'\] was made with {message}"):
            tx.update(tree, checkpoints.restore(tmp_path / "state", saved_by.init(tree)))


def saved_as(dtype, field):
    """Metadata of a state in which an array of the leaf "w" has another dtype."""
    tree = {"w": jnp.ones((16, 2048)), "b": jnp.ones(512)}
    state = microadam(0.1).init(tree)[0]
    other = getattr(state, field)["w"].astype(dtype)
    return tree, (state._replace(**{field: {**getattr(state, field), "w": other}}),)


@pytest.mark.parametrize(
    ("field", "dtype", "expected"),
    [
        ("ranges", jnp.float32, "bfloat16"),
        ("codes", jnp.int32, "uint8"),
        ("values", jnp.float16, "bfloat16"),
    ],
)
def test_other_dtypes_are_refused(field, dtype, expected, tmp_path):
    tree, (state,) = saved_as(dtype, field)
    message = rf"has {jnp.dtype(dtype)} at 0/{field}/w, where .* has {expected}\."
    saved = (state, optax.EmptyState(), optax.EmptyState())
    with ocp.StandardCheckpointer() as checkpoints:
        checkpoints.save(tmp_path / "state", saved)
        checkpoints.wait_until_finished()
        metadata = checkpoints.metadata(tmp_path / "state").item_metadata
    for given in (saved, metadata):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(given, microadam(0.1), tree)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_and_python_numbers(impl, tmp_path):
    """Orbax keeps the raw data of typed keys, and tells no exact dtype of numbers."""
    key = jax.random.key(3, impl=impl)
    keys = {"key": key, "keys": jax.random.split(key, 3)}

    def make(number):
        init = {**keys, "number": number, "rate": 0.5}
        rest = optax.GradientTransformation(lambda _: init, lambda *x: x[:2])
        return optax.chain(microadam(0.1), rest)

    tree = {"w": jnp.ones((16, 2048)), "b": 1.0}
    tx = make(1)
    state = tx.init(tree)
    with ocp.StandardCheckpointer() as checkpoints:
        checkpoints.save(tmp_path / "state", state)
        checkpoints.wait_until_finished()
        metadata = checkpoints.metadata(tmp_path / "state").item_metadata
    check_checkpoint(state, tx, tree)
    check_checkpoint(metadata, tx, tree)
    with pytest.raises(ValueError, match=r"has int32 at 1/number, where .* has float32"):
        check_checkpoint(metadata, make(1.0), tree)


def test_paths_that_read_alike():
    """Neither of two leaves "a/b" stands for the other."""
    tx, params = microadam(0.1), {"a/b": jnp.ones((8, 64)), "a": {"b": jnp.ones(512)}}
    state = tx.init(params)
    check_checkpoint(state, tx, params)
    with pytest.raises(ValueError, match="nothing at 0/codes/a/b"):
        check_checkpoint(tx.init({"a": params["a"]}), tx, params)


def test_the_state_of_an_nnx_optimizer():
    """Its arrays are in variables; a checkpoint may have these or what they hold."""
    tx = make()
    model = nnx.Linear(32, 1376, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, whole = nnx.state(model, nnx.Param), nnx.state(optimizer)
    other = nnx.Optimizer(model, microadam(1e-2, window=7), wrt=nnx.Param)
    for own in (params, nnx.to_pure_dict(params)):
        made = jax.eval_shape(tx.init, own)  # its scalars are no variables
        for state in (optimizer.opt_state, whole["opt_state"], _as_dict(whole), made):
            check_checkpoint(state, tx, own)
            check_checkpoint(_named(state), tx, own)
        with pytest.raises(ValueError, match="was made with `window` 7, but"):
            check_checkpoint(other.opt_state, microadam(1e-2), own)


def _named(state):
    """Dicts alone, as a checkpoint keeps it."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        *way, last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        inner = found
        for name in way:
            inner = inner.setdefault(name, {})
        inner[last] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return found


def _as_dict(state):
    return nnx.to_pure_dict(state)["opt_state"]


def test_the_state_of_an_adam_run():
    params = {"b": jnp.zeros(8), "w": jnp.zeros((64, 64))}
    saved = jax.eval_shape(optax.adamw(1e-3).init, params)
    said = r"has Adam's moments of every leaf, .* transformation compresses \['b'\]\.$"
    with pytest.raises(ValueError, match=said):
        check_checkpoint(saved, microadam(1e-3), params)
