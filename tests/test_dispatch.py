"""Who computes a leaf, and that every transformation of JAX leaves it as it is.

If it fails, an update fails or changes under vmap, scan, a mesh or an export.
"""

import concurrent.futures
import functools
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import scale_by_microadam
from meshes import collectives, make_mesh
from microadam_optax import _dispatch, _kernels, microadam, state_shardings
from quick import quick

KERNEL = "microadam_float32"  # what XLA calls
NAMES = (None, "numba")


def make(implementation=None, **arguments):
    arguments = {"window": 2, "density": 0.05, "dense": None, **arguments}
    return scale_by_microadam(**arguments, implementation=implementation)


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def some_steps(tx, gradient, number=2):
    """The state after some steps."""
    state = tx.init(gradient)
    for factor in range(1, number + 1):
        _, state = jax.jit(tx.update)(factor * gradient, state)
    return state


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(
            np.asarray(a, np.float64), np.asarray(b, np.float64)
        )


def text(f, *args, platforms=("cpu",)):
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize(
    ("implementation", "arguments", "chosen"),
    [
        (None, {}, True),
        ("numba", {}, True),
        ("xla", {}, False),
        (None, {"alpha": 0.1, "window": 3, "block_size": 4096}, True),
        (None, {"stochastic_rounding": True}, False),
    ],
)
def test_who_computes_a_leaf_on_the_cpu(implementation, arguments, chosen):
    tx, leaf = make(implementation, **arguments), normal(4, 256)
    assert (KERNEL in text(tx.update, leaf, tx.init(leaf))) == chosen


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_none_compiles_for_absent_platforms(platform):
    tx, leaf = make(), normal(4, 256)
    for platforms in ((platform,), ("cpu", platform), (platform, "cpu")):
        lowered = text(tx.update, leaf, tx.init(leaf), platforms=platforms)
        assert (KERNEL in lowered) == ("cpu" in platforms)
        assert ("xla.gpu.triton" in lowered) == (platforms == ("cuda",))
        assert "tpu_custom_call" not in lowered


def test_one_word_has_none_choose_another_kernel(monkeypatch):
    monkeypatch.setattr(_dispatch, "CHOSEN", ("tpu",))
    leaf = normal(4, 256)
    large = normal(8192)
    jax.clear_caches()  # what is chosen is no argument of what is cached
    for tx, gradient, fits in (
        (make(), leaf, True),
        (make(block_size=1024), large, False),
    ):
        state = tx.init(gradient)
        lowered = text(tx.update, gradient, state, platforms=("tpu",))
        assert ("tpu_custom_call" in lowered) == fits
        assert KERNEL not in text(tx.update, gradient, state)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("implementation", "platform", "why"),
    [
        ("pallas", "cpu", "cuda and tpu, not for cpu"),
        ("numba", "tpu", "cpu, not for tpu"),
    ],
)
def test_a_named_one_says_where_it_runs(implementation, platform, why):
    tx, leaf = make(implementation), normal(4, 256)
    with pytest.raises(NotImplementedError, match=why):
        text(tx.update, leaf, tx.init(leaf), platforms=(platform,))


def without(module, program):
    """What a program prints where a module cannot be imported."""
    hidden = f"import sys; sys.modules[{module!r}] = None\n"
    command = [sys.executable, "-W", "error", "-c", hidden + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_without_numba_xla_computes_silently():
    printed = without(
        "numba",
        """
import jax.numpy as jnp
from microadam_optax import scale_by_microadam
tx = scale_by_microadam(dense=None)
print(tx.update(jnp.ones(8), tx.init(jnp.ones(8)))[0].shape)
try:
    scale_by_microadam(dense=None, implementation="numba").init(jnp.ones(8))
except NotImplementedError as error:
    print(error)
""",
    )
    assert printed.startswith("(8,)\n")
    assert "microadam-optax[cpu]" in printed


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_wanted():
    program = """
import sys
import jax, jax.numpy as jnp
import microadam_optax
def loaded(*words):
    return sorted(x for x in sys.modules if any(word in x for word in words))
tx = microadam_optax.scale_by_microadam(dense=None)
state = tx.init(jnp.ones(8))
jax.jit(tx.update).trace(jnp.ones(8), state)
other = microadam_optax.scale_by_microadam(dense=None, implementation="xla")
other.update(jnp.ones(8), state)
print(loaded("_kernels", "numba", "experimental.pallas"))
tx.update(jnp.ones(8), state)
print(loaded("experimental.pallas"), "numba" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[] True\n"


def test_nothing_is_traced_that_is_not_used(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError(args, kwargs)

    monkeypatch.setattr("microadam_optax._xla.update_blocks", never)
    tx, leaf = make(density=0.07), normal(4, 256)
    tx.update(leaf, tx.init(leaf))


@pytest.mark.parametrize("implementation", quick([*NAMES, "interpret_gpu"], *NAMES))
def test_vmap_equals_the_loop(implementation):
    tx, gradients = make(implementation), normal(2, 2, 256)
    states = [some_steps(tx, g, number) for number, g in enumerate(gradients, 1)]
    pairs = list(zip(gradients, states, strict=True))
    got = jax.jit(jax.vmap(tx.update))(gradients, stack(states))
    assert_equal(got, stack([jax.jit(tx.update)(*pair) for pair in pairs]))
    # A step that all share, for which the leaves are as one.
    shared = states[1]
    got = jax.jit(jax.vmap(tx.update, (0, None)))(gradients, shared)
    assert_equal(got, stack([jax.jit(tx.update)(g, shared) for g in gradients]))


def by_xla(f, *args):
    """What None leaves to XLA, because it is exported."""
    tree = jax.tree.structure(jax.eval_shape(f, *args))
    exported = jax.export.export(jax.jit(lambda *x: jax.tree.leaves(f(*x))))(*args)
    assert KERNEL not in str(exported.mlir_module())
    return lambda *args: jax.tree.unflatten(tree, exported.call(*args))


def test_vmap_of_vmap_equals_the_loops():
    tx = make()
    state = some_steps(tx, normal(2, 256))

    def one(count, gradient):
        return tx.update(gradient, state._replace(count=count))

    counts, gradients = jnp.arange(1, 3, dtype=jnp.int32), normal(3, 2, 256)
    f = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
    g = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    want = [[jax.jit(one)(c, x) for c in counts] for x in gradients]
    over_gradients = stack([stack(row) for row in want])
    over_counts = stack([stack(row) for row in zip(*want, strict=True)])
    assert KERNEL in text(g, counts, gradients)
    assert_equal(jax.jit(f)(counts, gradients), over_gradients)
    for batched in (g, by_xla(g, counts, gradients)):
        assert_equal(jax.jit(batched)(counts, gradients), over_counts)


def test_vmap_over_a_mesh_sends_nothing():
    tx, gradients = make(), normal(4, 2, 256)
    states = stack([some_steps(tx, g, i) for i, g in enumerate(gradients)])
    want = jax.jit(jax.vmap(tx.update))(gradients, states)
    mesh = make_mesh("fsdp 4, tp 2")
    with jax.set_mesh(mesh):
        over = NamedSharding(mesh, P("fsdp"))
        args = jax.device_put((gradients, states), over)
        step = jax.vmap(tx.update, spmd_axis_name="fsdp")
        compiled = jax.jit(step, out_shardings=over).lower(*args).compile()
        assert collectives(compiled) == {}
        assert_equal(compiled(*args), want)


def test_control_flow_and_eager():
    tx, gradient = make(), normal(4, 256)
    want = some_steps(tx, gradient, 3)

    def body(state, factor):
        return tx.update(factor * gradient, state)[1], None

    assert_equal(jax.lax.scan(body, tx.init(gradient), jnp.arange(1.0, 4.0))[0], want)
    before = some_steps(tx, gradient, 2)
    assert_equal(tx.update(3 * gradient, before)[1], want)
    with jax.disable_jit():
        assert_equal(tx.update(3 * gradient, before)[1], want)
    remat = jax.checkpoint(tx.update)
    assert_equal(jax.jit(remat)(3 * gradient, before)[1], want)

    @jax.jit
    def sometimes(do, gradient, state):
        return jax.lax.cond(do, tx.update, lambda g, s: (g, s), gradient, state)

    assert_equal(sometimes(True, 3 * gradient, before)[1], want)
    assert_equal(sometimes(False, 3 * gradient, before)[1], before)


@pytest.mark.parametrize(
    ("check", "manual", "varying"),
    [
        (True, {"fsdp", "tp"}, True),
        (True, {"fsdp"}, False),
        (False, {"fsdp"}, True),
        (False, {"fsdp", "tp"}, False),
    ],
)
def test_in_a_shard_map(check, manual, varying):
    tx, gradients = make(), normal(4, 2, 256)
    state = some_steps(tx, gradients[0])

    def body(gradients, state):
        updates, new = tx.update(gradients[0], state)
        new = new._replace(count=None, ages=None)
        return jax.tree.map(lambda x: x[None] if varying else x, (updates, new))

    spec = P("fsdp") if varying else P()
    f = jax.shard_map(
        body,
        mesh=make_mesh("fsdp 4, tp 2"),
        in_specs=(spec, P()),
        out_specs=spec,
        axis_names=manual,
        check_vma=check,
    )
    want = []
    for gradient in gradients if varying else gradients[:1]:
        updates, new = jax.jit(tx.update)(gradient, state)
        want.append((updates, new._replace(count=None, ages=None)))
    assert KERNEL in text(f, gradients, state) or manual != {"fsdp", "tp"}
    assert_equal(jax.jit(f)(gradients, state), stack(want) if varying else want[0])


def test_pmap():
    tx, gradients = make(), normal(2, 2, 256)
    states = [some_steps(tx, g) for g in gradients]
    want = stack(
        [jax.jit(tx.update)(g, s) for g, s in zip(gradients, states, strict=True)]
    )
    assert_equal(jax.pmap(tx.update)(gradients, stack(states)), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_nothing_is_sent(kind):
    tx, gradient = make(), normal(16, 1024)
    before, want = some_steps(tx, gradient, 2), some_steps(tx, gradient, 3)
    mesh = make_mesh("fsdp 4, tp 2", kind)
    with jax.set_mesh(mesh):
        own = NamedSharding(mesh, P("fsdp", "tp"))
        gradient = jax.device_put(gradient, own)
        held = state_shardings(tx, gradient)
        state = jax.device_put(before, held)
        step = jax.jit(tx.update, out_shardings=(own, held))
        compiled = step.lower(3 * gradient, state).compile()
        assert KERNEL in compiled.as_text()
        assert collectives(compiled) == {}
        assert_equal(compiled(3 * gradient, state)[1], want)


@pytest.mark.parametrize(
    ("shape", "spec", "state_spec"),
    [
        ((8, 30), P("fsdp"), P()),  # a grid of (2, 1): cells are cut
        ((16, 64), P("fsdp", "tp"), P(None, None, None, "tp")),  # and blocks
    ],
)
def test_shardings_that_do_not_fit_the_blocks(shape, spec, state_spec):
    tx, gradient = make(), normal(*shape)
    state = some_steps(tx, gradient)
    want = jax.jit(tx.update)(gradient, state)
    mesh = make_mesh("fsdp 4, tp 2")

    def put(x):
        fits = x.ndim > 1 and x.shape[-1] % 2 == 0
        return jax.device_put(x, NamedSharding(mesh, state_spec if fits else P()))

    placed = jax.device_put(gradient, NamedSharding(mesh, spec))
    assert_equal(jax.jit(tx.update)(placed, jax.tree.map(put, state)), want)


@pytest.mark.slow
def test_derivatives_are_those_of_xla():
    gradient = normal(2, 256)
    state = some_steps(make(), gradient)

    def loss(implementation, gradient, b1):
        tx = make(implementation, b1=b1)
        updates, _ = tx.update(gradient, state)
        return jnp.sum(updates**3)

    def both_ways(implementation, gradient, b1):
        f = functools.partial(loss, implementation)
        tangents = jnp.ones_like(gradient), 1.0
        return jax.grad(f, (0, 1))(gradient, b1), jax.jvp(f, (gradient, b1), tangents)[1]

    got, want = (
        jax.jit(functools.partial(both_ways, x))(gradient, 0.9) for x in (None, "xla")
    )
    assert_equal(got, want)


def test_what_is_exported_is_xlas():
    tx, gradient = make(), normal(8, 256)
    state = some_steps(tx, gradient)
    want = jax.jit(tx.update)(gradient, state)
    over = NamedSharding(make_mesh("fsdp 8"), P("fsdp"))
    gradient = jax.device_put(gradient, over)
    state = jax.device_put(state, state_shardings(tx, gradient))
    # JAX refuses calls here that it does not guarantee to know later.
    exported = jax.export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))
    exported = exported(gradient, state)
    assert KERNEL not in str(exported.mlir_module())
    assert_equal(jax.tree.leaves(exported.call(gradient, state)), jax.tree.leaves(want))


def test_on_a_mesh_of_no_devices():
    tx = make()
    mesh = AbstractMesh((16,), ("fsdp",), (AxisType.Auto,))
    over = NamedSharding(mesh, P("fsdp"))
    leaf = jax.ShapeDtypeStruct((16, 256), jnp.float32, sharding=over)
    for platform in ("cpu", "cuda", "tpu"):
        text(tx.update, leaf, jax.eval_shape(tx.init, leaf), platforms=(platform,))


@pytest.mark.makes_nan
def test_the_search_for_a_nan():
    tx, gradient = make(), normal(4, 256)
    with jax.debug_nans(True):
        jax.jit(tx.update)(gradient, tx.init(gradient))
        with pytest.raises(FloatingPointError):
            tx.update(gradient.at[0].set(jnp.nan), tx.init(gradient))


@pytest.mark.parametrize(("shape", "window"), [((64, 2048), 1), ((64, 11008), 2)])
def test_donated_it_is_done_in_place(shape, window):
    tx, gradient = make(window=window), normal(*shape)
    state = tx.init(gradient)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(gradient, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
    addresses = [x.unsafe_buffer_pointer() for x in (gradient, *state[2:4])]
    updates, state = compiled(gradient, state)
    assert addresses == [x.unsafe_buffer_pointer() for x in (updates, *state[2:4])]


def test_on_a_mesh_the_state_is_not_copied():
    tx, mesh = make(), make_mesh("fsdp 4, tp 2")
    own = NamedSharding(mesh, P("fsdp", "tp"))
    leaf = jax.ShapeDtypeStruct((64, 2048), jnp.float32, sharding=own)
    held = state_shardings(tx, leaf)
    state = jax.eval_shape(jax.jit(tx.init, out_shardings=held), leaf)
    step = jax.jit(tx.update, donate_argnums=1, out_shardings=(own, held))
    temporary = step.lower(leaf, state).compile().memory_analysis().temp_size_in_bytes
    assert temporary <= 64 * 2048 * 4 // 8 + 4096  # the gradient of a device


def test_threads_and_devices_at_once():
    tx, gradient = make(), normal(64, 2048)
    want = some_steps(tx, gradient, 3)

    def run(number):
        device = jax.devices()[number % 4]
        return some_steps(tx, jax.device_put(gradient, device), 3)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(run, range(8)):
            assert_equal(got, want)


def test_x64_mode_changes_nothing():
    tx, gradient = make(), normal(4, 256)
    want = some_steps(tx, gradient)
    with jax.enable_x64(True):
        assert_equal(some_steps(tx, gradient), want)


def test_platforms_have_kernels():
    named = {x for platforms in _dispatch.NAMED.values() for x in platforms}
    assert set(_dispatch.CHOSEN) <= named == set(_kernels.PLATFORMS)


def test_an_axis_of_nothing():
    tx = scale_by_microadam()
    state = tx.init(jnp.ones(64))
    batched = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), state)
    updates, _ = jax.jit(jax.vmap(tx.update))(jnp.zeros((0, 64)), batched)
    assert updates.shape == (0, 64)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_vmap_over_learning_rates(implementation):
    gradient = normal(8, 256)

    def trained(rate):
        tx = microadam(rate, dense=None, weight_decay=0.01, implementation=implementation)

        def step(carry, factor):
            params, state = carry
            updates, state = tx.update(factor * gradient, state, params)
            return (params + updates, state), None

        first = gradient, tx.init(gradient)
        (params, state), _ = jax.lax.scan(step, first, jnp.array([1.0, 2.0]))
        return params, state[0].codes

    rates = jnp.array([1e-3, 0.1])
    want = stack([jax.jit(trained)(rate) for rate in rates])
    assert_equal(jax.jit(jax.vmap(trained))(rates), want)


def test_linearize_is_jvp():
    tx, gradient = make(window=1), normal(4, 256)
    state = some_steps(tx, gradient)

    def update(gradient):
        return tx.update(gradient, state)[0]

    @jax.jit
    def both_ways(gradient):
        value, linear = jax.linearize(update, gradient)
        return (value, linear(gradient)), jax.jvp(update, (gradient,), (gradient,))

    got, want = both_ways(gradient)
    # Equal but for what XLA fuses: a few roundings of float32, more where terms cancel.
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-7)
