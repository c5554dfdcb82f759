"""Micro-batches train as their whole batch does, without an accumulator.

If it fails, gradients are lost or counted twice when a batch is split, or memory that
accumulation was to save is taken after all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import meshes
import oracle
from following import state_blocks
from microadam_optax import (
    MicroAdamState,
    _micro,
    _step,
    accumulate,
    check_checkpoint,
    layerwise,
    microadam,
    scale_by_microadam,
    state_shardings,
)
from microadam_optax.memory import optimizer_bytes
from quick import quick

EVERY = 3
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
IMPLEMENTATIONS = [None, "xla", "interpret_gpu", "interpret_tpu"]


def gradients(number, shape=(4, 250), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(number)]


def params_and(tx, shape=(4, 250), dtype=jnp.float32):
    params = {"w": jnp.ones(shape, dtype), "b": jnp.ones(8, dtype)}
    return params, tx.init(params)


def tree(g):
    return {"w": g, "b": g.ravel()[:8]}


def micro_state(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MicroAdamState))
    return next(x for x in nodes if isinstance(x, MicroAdamState))


def trained(tx, params, stream, jitted=True):
    """Parameters and state after all gradients, and whether each call took a step."""
    update = jax.jit(tx.update) if jitted else tx.update
    state, took = tx.init(params), []
    for g in stream:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        took.append(bool(jax.tree.reduce(jnp.maximum, jax.tree.map(jnp.any, updates))))
    return params, state, took


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("implementation", "bits"),
    quick(
        [*((x, 4) for x in IMPLEMENTATIONS), (None, 2), ("xla", 8)],
        *((x, 4) for x in IMPLEMENTATIONS),
        several=True,
    ),
)
def test_error_takes_up_micro_batches(implementation, bits):
    """To the oracle's bits: its encoding of the error and a share of each gradient.

    The last micro-batch is a step of its share and the error that the others left, in
    every bit.
    """
    window = 2 if bits == 4 and implementation != "interpret_tpu" else 1
    settings = {"window": window, "density": 0.012, "error_bits": bits}
    inner = scale_by_microadam(dense=None, implementation=implementation, **settings)
    tx = accumulate(inner, EVERY)
    state = tx.init(jnp.zeros((4, 250)))
    update, whole_step = jax.jit(tx.update), jax.jit(inner.update)
    mine, stream = None, gradients(2 * EVERY)
    for g in stream[: EVERY - 1]:
        updates, state = update(g, state)
        assert not np.any(updates)
        codes, ranges, *_ = state_blocks(micro_state(state), bits)
        rows = np.asarray(g * np.float32(1 / EVERY)).reshape(len(codes), -1)
        mine = mine or [oracle.new_block(len(x)) for x in codes]
        for row, gradient in enumerate(rows):
            total = [
                float(np.float32(gradient[i]) + np.float32(x))
                if i < len(gradient)
                else 0.0
                for i, x in enumerate(oracle.decode(mine[row]))
            ]
            mine[row] = oracle.Block(*oracle.encode(total, bits, None), [])
            step, zero = ranges[row]
            assert (mine[row].step, mine[row].zero) == (step, int(zero))
            assert mine[row].points == [code - int(zero) for code in codes[row]]
    assert int(micro_state(state).count) == 0
    for i, g in enumerate(stream[EVERY - 1 :]):
        before, (updates, state) = state, update(g, state)
        if i % EVERY == 0:
            whole = whole_step(g / EVERY, micro_state(before))
            assert_equal((updates, micro_state(state)), whole)
    assert int(micro_state(state).count) == 2 == int(state.gradient_step)


@pytest.mark.parametrize(
    ("shape", "dtype", "implementation"),
    quick(
        [
            ((3, 1000), jnp.bfloat16, None),
            ((3, 1000), jnp.float16, "interpret_gpu"),
            ((3, 1000), jnp.float16, "interpret_tpu"),
        ],
        ((3, 1000), jnp.bfloat16, None),
        several=True,
    ),
)
def test_kernels_keep_the_same_bits(shape, dtype, implementation):
    def run(implementation):
        settings = {"window": 2, "density": 0.012, "dense": None}
        tx = scale_by_microadam(implementation=implementation, **settings)
        stream = gradients(2 * EVERY, shape, dtype)
        return trained(accumulate(tx, EVERY), jnp.zeros(shape, dtype), stream)[1]

    assert_equal(run(implementation), run("xla"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_share_is_rounded_once(dtype):
    """In 16 bits a third is off by up to 1/512, and so would all gradients be."""
    (gradient,), third = gradients(1, dtype=dtype), jnp.float32(1 / 3)
    some = jnp.int32(1)
    micro = _micro.MicroBatch(some, some, jnp.bool_(False), third)
    step = _step.Step(some, None, *4 * [third], prng=None, micro=micro)
    found = jax.jit(_step.share)(gradient, step)
    assert found.dtype == dtype
    expected = np.float32(gradient) * np.float32(third)
    np.testing.assert_array_equal(found, jnp.asarray(expected, dtype))


def test_every_one_is_the_transformation_itself():
    inner = microadam(1e-2, window=2)
    params, _ = params_and(inner, (64, 128))
    stream = [tree(g) for g in gradients(4, (64, 128))]
    micro = trained(accumulate(inner, 1), params, stream)
    whole = trained(inner, params, stream)
    states = [micro_state(x) for x in (micro[1], whole[1])]
    for name in ("count", "ages", "codes", "ranges", "indices", "values"):
        assert_equal(*(getattr(x, name) for x in states))
    # XLA fuses the rest, dense leaves too, with other neighbours: some ulp of 1.
    close = functools.partial(np.testing.assert_allclose, atol=2**-22)
    jax.tree.map(close, (micro[0], states[0].mu), (whole[0], states[1].mu))


def test_dense_leaves_train_as_with_multi_steps():
    """Means that are far from 0, where Adam would make much of a rounding."""
    rng = np.random.default_rng(0)
    stream = [jnp.asarray(rng.integers(1, 5, 64), jnp.float32) for _ in range(8)]
    inner = microadam(optax.linear_schedule(1e-2, 0, 9), weight_decay=1e-2)
    micro, ours, took = trained(accumulate(inner, 4), jnp.ones(64), stream)
    several = optax.MultiSteps(inner, 4).gradient_transformation()
    known, theirs, took_known = trained(several, jnp.ones(64), stream)
    np.testing.assert_allclose(micro, known, rtol=1e-6)
    assert took == took_known == [False, False, False, True] * 2
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        ours.inner_opt_state,
        theirs.inner_opt_state,
    )


def test_schedules_and_decay_step_once():
    """Against hand-made shares, with the decay of the parameters at the step."""
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5})
    inner = optax.chain(
        scale_by_microadam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(schedule),
    )
    tx = accumulate(inner, EVERY)
    params = jnp.ones(16)
    state = tx.init(params)
    sizes = []
    for _ in range(3 * EVERY):
        updates, state = jax.jit(tx.update)(jnp.ones(16), state, params)
        sizes.append(float(updates[0]))
    expected = [0, 0, 1.1, 0, 0, 0.55, 0, 0, 0.275]
    np.testing.assert_allclose(sizes, expected, rtol=1e-5)


def test_has_updated():
    tx = accumulate(microadam(1e-2), EVERY)
    params, state = params_and(tx)
    assert not tx.has_updated(state)
    for i, g in enumerate(gradients(2 * EVERY), 1):
        _, state = jax.jit(tx.update)(tree(g), state, params)
        assert bool(tx.has_updated(state)) == (i % EVERY == 0)
        assert int(state.mini_step) == i % EVERY
        assert int(state.gradient_step) == i // EVERY


def test_trains_as_the_whole_batch_does():
    """A quadratic under noise: the same loss within a tenth."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)
    rate = optax.cosine_decay_schedule(0.1, 100)

    def final(tx):
        def one(carry, key):
            params, state = carry
            g = params - target + jax.random.normal(key, params.shape)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.zeros_like(target), tx.init(jnp.zeros_like(target))
        (params, _), _ = jax.lax.scan(
            one, start, jax.random.split(jax.random.key(1), 400)
        )
        return float(jnp.mean((params - target) ** 2))

    whole = final(optax.MultiSteps(microadam(rate), 4).gradient_transformation())
    assert final(accumulate(microadam(rate), 4)) < 1.1 * whole


def test_random_rounding_draws_anew_in_each_micro_batch():
    tx = accumulate(scale_by_microadam(dense=None, stochastic_rounding=True), 4)
    g = gradients(1)[0]
    first = tx.init(jnp.zeros((4, 250)))
    second = first._replace(mini_step=jnp.int32(1))
    update = jax.jit(tx.update)
    one, two = (micro_state(update(g, x)[1]).codes for x in (first, second))
    assert np.any(one != two)
    assert_equal(one, micro_state(update(g, first)[1]).codes)


def test_chain_partition_and_injected_rates():
    """Whatever stands around it: the compressed leaf's codes are those of it alone."""

    def rated(learning_rate):
        return optax.chain(optax.clip_by_global_norm(1e6), microadam(learning_rate))

    alone = accumulate(scale_by_microadam(dense=None), EVERY)
    stream = [tree(g) for g in gradients(EVERY - 1, (64, 128))]
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(8)}
    _, known, _ = trained(alone, params["w"], [x["w"] for x in stream])
    around = {
        "injected": optax.inject_hyperparams(rated)(learning_rate=1e-2),
        "partition": optax.partition(
            {"ours": microadam(1e-2), "theirs": optax.adam(1e-2)},
            {"w": "ours", "b": "theirs"},
        ),
        "masked": optax.masked(microadam(1e-2), {"w": True, "b": False}),
    }
    for name, inner in around.items():
        _, state, took = trained(accumulate(inner, EVERY), params, stream)
        assert took == [False] * (EVERY - 1), name
        assert_equal(micro_state(state).codes["w"], micro_state(known).codes)
        assert isinstance(state.acc_grads["w"], optax.MaskedNode), name
        total = stream[0]["b"] + stream[1]["b"]
        np.testing.assert_array_equal(state.acc_grads["b"], total)


@pytest.mark.parametrize("implementation", quick([None, "xla"], None))
def test_no_leaf_is_copied(implementation):
    """In place, where gradients, state and updates are donated."""
    inner = microadam(1e-2, window=1, density=0.1, implementation=implementation)
    leaf = [jax.ShapeDtypeStruct((2048, 1024), jnp.float32)] * 2

    def temporary(tx):
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        compiled = step.lower(leaf, jax.eval_shape(tx.init, leaf), leaf).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(accumulate(inner, 4)) < temporary(inner) + leaf[0].size


def test_a_training_step_peaks_where_it_does_without():
    """Nothing of the size of a gradient is kept beside it."""
    layers = {
        "up": jax.ShapeDtypeStruct((8, 256, 768), jnp.float32),
        "down": jax.ShapeDtypeStruct((8, 768, 256), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((16, 256), jnp.float32)

    def loss(layers, x):
        def block(x, layer):
            return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(block), x, layers)[0] ** 2)

    def temporary(tx):
        def step(layers, state, x):
            updates, state = tx.update(jax.grad(loss)(layers, x), state, layers)
            return optax.apply_updates(layers, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(layers, jax.eval_shape(tx.init, layers), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    inner = microadam(1e-2)
    assert temporary(accumulate(inner, 4)) < temporary(inner) + layers["up"].size


def test_bytes_of_state_are_those_of_the_transformation():
    params = {"w": jnp.ones((1024, 1024)), "b": jnp.ones(100)}
    inner = microadam(1e-2)
    more = optimizer_bytes(accumulate(inner, 8), params) - optimizer_bytes(inner, params)
    assert more == 2 * 4 + 100 * 4  # counters, and the dense leaf's sums


def test_layer_by_layer():
    """The same bits as with all gradients at once."""
    rng = np.random.default_rng(0)
    layers = {
        "w": jnp.asarray(rng.normal(0, 0.1, (3, 64, 64)), jnp.float32),
        "b": jnp.zeros((3, 64)),
    }
    data = jnp.asarray(rng.normal(size=(2 * EVERY, 8, 64)), jnp.float32)
    tx = accumulate(microadam(1e-2), EVERY)

    def block(layer, x):
        return x + jnp.tanh(x @ layer["w"] + layer["b"])

    def ordinary(layers, state, x):
        def loss(layers):
            remat = jax.checkpoint(block)
            y, _ = jax.lax.scan(lambda x, layer: (remat(layer, x), None), x, layers)
            return jnp.mean(y**2)

        updates, state = tx.update(jax.grad(loss)(layers), state, layers)
        return optax.apply_updates(layers, updates), state

    def by_layers(layers, state, x):
        y, backward = layerwise.vjp(block, layers, x)
        dy = jax.grad(lambda y: jnp.mean(y**2))(y)
        return backward(dy, state, tx)[1:]

    one = other = layers, tx.init(layers)
    for x in data:
        one, other = jax.jit(ordinary)(*one, x), jax.jit(by_layers)(*other, x)
        assert_equal(one, other)
    assert int(one[1].gradient_step) == 2


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_on_a_mesh(implementation):
    """Nothing is sent, and the bits are those of one device."""
    mesh = meshes.make_mesh("fsdp 8")
    stream = gradients(2 * EVERY, (64, 512))
    tx = accumulate(scale_by_microadam(dense=None, implementation=implementation), EVERY)
    known = trained(tx, jnp.zeros((64, 512)), stream)[1]
    at = NamedSharding(mesh, P("fsdp"))
    params = jax.device_put(jnp.zeros((64, 512)), at)
    places = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=places)(params)
    update = jax.jit(tx.update, out_shardings=(at, places)).lower(params, state).compile()
    for g in stream:
        _, state = update(jax.device_put(g, at), state)
    assert_equal(state, known)
    assert not meshes.collectives(update)


def test_scalars_lie_where_the_parameters_do():
    """Or the second step would be compiled anew."""
    mesh = meshes.make_mesh("fsdp 8")
    at = NamedSharding(mesh, P("fsdp"))
    state = accumulate(microadam(1e-2), 2).init(jax.device_put(jnp.zeros((64, 512)), at))
    assert {x.sharding.device_set == at.device_set for x in jax.tree.leaves(state)} == {
        True
    }


def test_checkpoint_fits():
    tx = accumulate(microadam(1e-2), 2)
    params, state = params_and(tx, (64, 256))
    check_checkpoint(state, tx, params)
    with pytest.raises(ValueError, match="`error_bits` 4"):
        check_checkpoint(state, accumulate(microadam(1e-2, error_bits=8), 2), params)


def test_states_of_a_conditional_and_a_scan():
    tx = accumulate(microadam(1e-2), 2)
    params, state = params_and(tx)
    g = tree(gradients(1)[0])

    def one(state, take):
        new = jax.lax.cond(take, lambda s: tx.update(g, s, params)[1], lambda s: s, state)
        return new, None

    state, _ = jax.lax.scan(one, state, jnp.array([True, False, True, True]))
    assert int(state.gradient_step) == 1
    assert int(state.mini_step) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "inner", [scale_by_microadam(density=1.0, dense=None), optax.identity()]
)
def test_no_dtype_is_promoted(inner, dtype):
    """In leaves that the error takes up, and in those that are summed."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tx = accumulate(inner, 2)
        state = tx.init(jnp.ones((64, 128), dtype))
        for i in (0.5, 1.5):
            g = jnp.full((64, 128), i, dtype)
            updates, state = jax.jit(tx.update)(g, state)
        assert updates.dtype == dtype
        np.testing.assert_allclose(float(jnp.max(updates)), 1, rtol=2**-22)


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_at_least_one(every):
    with pytest.raises(ValueError, match=f"`every` must be at least 1, got {every}"):
        accumulate(microadam(1e-2), every)


@pytest.mark.parametrize("every", [2.0, lambda _: 2, True, None])
def test_every_does_not_change(every):
    with pytest.raises(TypeError, match="`every` must be an integer"):
        accumulate(microadam(1e-2), every)


def test_another_tree_is_refused():
    tx = accumulate(microadam(1e-2), 2)
    params, state = params_and(tx)
    with pytest.raises(ValueError, match=r"no gradient for \['b'\]"):
        tx.update({"w": params["w"]}, state, params)
