"""Updates inside `jax.shard_map`: each device its own, as optax.adam does.

If it fails, training inside `jax.shard_map` fails, or devices disagree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from compressed import scale_by_microadam
from quick import quick

DEVICES, STEPS = 2, 2
WHOLE, CHUNKED = (40, 64), (512, 1024)
KINDS = {
    "window 1": {"window": 1, "density": 0.12},
    "window 2": {"window": 2, "density": 0.06},
    "random": {"alpha": 0.1, "stochastic_rounding": True},
}


INSIDE = [("window 1", WHOLE), ("random", CHUNKED)]


def tree(own, shared):
    """Two leaves that differ between devices, and between them one that does not."""
    return {"a": own, "b": shared, "c": own}


def gradients(shape):
    g = np.random.default_rng(0).normal(size=(STEPS, DEVICES, *shape))
    return jnp.asarray(g, jnp.float32), jnp.asarray(g[:, 0], jnp.float32)


def train(tx, state, own, shared):
    def body(state, both):
        updates, state = tx.update(tree(*both), state)
        return state, updates

    state, updates = jax.lax.scan(body, state, (own, shared))
    return updates, state


def on_devices(f, specs):
    """One for each; what differs between them gets an axis of devices in front."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    differs = {"a": P("d"), "b": P(), "c": P("d")}

    def local(*args):
        updates, codes = f(*args)
        for x in (updates, codes):
            x.update(a=x["a"][None], c=x["c"][None])
        return updates, codes

    out = differs, differs
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out))


def check(tx, f, specs, arguments, own, shared):
    got = on_devices(f, specs)(*arguments)
    alone = jax.jit(functools.partial(train, tx))
    for device in range(DEVICES):
        state = tx.init(tree(own[0, device], shared[0]))
        updates, state = alone(state, own[:, device], shared)
        for mine, want in zip(got, (updates, state.codes), strict=True):
            for name in "abc":
                x = mine[name] if name == "b" else mine[name][device]
                np.testing.assert_array_equal(x, want[name])


@pytest.mark.parametrize(("kind", "shape"), quick(INSIDE, INSIDE[0], several=True))
def test_init_inside(kind, shape):
    """The state's arrays vary as the parameters do, so that it can be carried."""
    tx = scale_by_microadam(**KINDS[kind], implementation="xla")
    own, shared = gradients(shape)

    def f(own, shared):
        own = own[:, 0]
        state = tx.init(tree(own[0], shared[0]))
        updates, state = train(tx, state, own, shared)
        return updates, state.codes

    check(tx, f, (P(None, "d"), P()), (own, shared), own, shared)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    quick([("window 1", "xla"), ("window 2", None)], ("window 2", None), several=True),
)
def test_a_replicated_state(kind, implementation):
    tx = scale_by_microadam(**KINDS[kind], implementation=implementation)
    own, shared = (x[:1] for x in gradients(CHUNKED))

    def f(state, own, shared):
        updates, state = tx.update(tree(own[0, 0], shared[0]), state)
        return jax.tree.map(lambda x: x[None], updates), state.codes

    state = tx.init(tree(own[0, 0], shared[0]))
    check(tx, f, (P(), P(None, "d"), P()), (state, own, shared), own, shared)


def test_hyperparameters_of_each_device():
    """Another eps on each: the update varies, though gradient and state do not."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    _, shared = gradients(CHUNKED)
    values = jnp.arange(1.0, 1 + DEVICES)

    def f(eps, gradient):
        tx = scale_by_microadam(eps=eps[0])
        return tx.update(gradient, tx.init(gradient))[0][None]

    specs = P("d"), P()
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("d")))(
        values, shared[0]
    )
    for device, eps in enumerate(values):
        tx = scale_by_microadam(eps=eps)
        want, _ = jax.jit(tx.update)(shared[0], tx.init(shared[0]))
        # Here eps is a constant, which XLA may compute with in another order.
        np.testing.assert_allclose(got[device], want, rtol=2.0**-21)


@pytest.mark.promotes
@pytest.mark.slow
def test_types_are_those_of_adam():
    """What varies, of updates and of arrays that belong to parameters."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    own, shared = gradients(WHOLE)
    found = {}

    def f(own, shared):
        both = tree(own[0, 0], shared[0])
        each = {"codes": scale_by_microadam(), "mu": optax.scale_by_adam()}
        for field, tx in each.items():
            state = tx.init(both)
            updates, after = tx.update(both, state)
            trees = updates, getattr(state, field), getattr(after, field)
            axes = jax.tree.map(lambda x: jax.typeof(x).manual_axis_type.varying, trees)
            found[field] = axes, jax.typeof(after.count).manual_axis_type.varying
        return shared

    specs = P(None, "d"), P()
    inside = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P())
    jax.eval_shape(inside, own, shared)
    assert found["mu"] == found["codes"]


@pytest.mark.parametrize("sizes", [(1, DEVICES), (2, DEVICES // 2)])
def test_beside_automatic_axes(sizes):
    """Also of size 1, over which nothing is partitioned."""
    mesh = jax.make_mesh(sizes, ("e", "d"), axis_types=(AxisType.Auto,) * 2)
    tx, gradient = scale_by_microadam(), gradients(WHOLE)[1][0]
    gradient = jnp.concatenate([gradient] * DEVICES)

    def f(gradient):
        return tx.update(gradient, tx.init(gradient))[0]

    on_mesh = jax.shard_map(
        f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    parts = jnp.split(gradient, sizes[1])
    want = jnp.concatenate([jax.jit(f)(part) for part in parts])
    np.testing.assert_array_equal(jax.jit(on_mesh)(gradient), want)
