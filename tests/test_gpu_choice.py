"""None on NVIDIA GPUs: else a user's GPU holds several copies of each leaf, or fails.

Programs are lowered for CUDA, which needs no GPU. What the kernel computes under the same
transformations is tested where Pallas interprets it, in test_kernels and test_dispatch.
"""

import sys
import types
import warnings

import jax
import jax.experimental.pallas
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import scale_by_microadam
from meshes import make_mesh
from microadam_optax import _dispatch, _kernels, state_shardings
from microadam_optax._kernels import _ffi, cpu

TRITON, PARTITIONED = "xla.gpu.triton", "CustomSPMDPartitioning"
LEAF = jax.ShapeDtypeStruct((8, 256), jnp.float32)


def make(**arguments):
    return scale_by_microadam(window=2, density=0.05, dense=None, **arguments)


def lowered(f, *args, platforms=("cuda",)):
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def of_leaf(tx, leaf=LEAF, **how):
    return lowered(tx.update, leaf, jax.eval_shape(tx.init, leaf), **how)


def stacked(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), tree)


TX = make()
STATE = jax.eval_shape(TX.init, LEAF)
WAYS = {
    "jit": (TX.update, LEAF, STATE),
    "scan": (
        lambda g, s: jax.lax.scan(lambda s, g: TX.update(g, s)[::-1], s, g),
        stacked(LEAF),
        STATE,
    ),
    "vmap": (jax.vmap(TX.update), stacked(LEAF), stacked(STATE)),
    "vmap of gradients": (jax.vmap(TX.update, (0, None)), stacked(LEAF), STATE),
    "remat": (jax.checkpoint(TX.update), LEAF, STATE),
    "cond": (
        lambda g, s: jax.lax.cond(g[0, 0] > 0, lambda: TX.update(g, s), lambda: (g, s)),
        LEAF,
        STATE,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_none_takes_the_kernel(way):
    assert TRITON in lowered(*WAYS[way])


@pytest.mark.parametrize(
    ("window", "dtype"), [(1, jnp.bfloat16), (2, jnp.float16), (10, jnp.bfloat16)]
)
def test_of_short_floats(window, dtype):
    tx = scale_by_microadam(window=window, density=0.02, dense=None)
    assert TRITON in of_leaf(tx, jax.ShapeDtypeStruct((8, 250), dtype))


@pytest.mark.parametrize(
    "arguments",
    [
        {"implementation": "xla"},
        {"alpha": 0.1},
        {"stochastic_rounding": True},
        {"block_size": 512},
    ],
)
def test_what_the_kernel_does_not_take_is_xlas(arguments):
    tx = make(**arguments)
    assert TRITON not in of_leaf(tx, jax.ShapeDtypeStruct((8, 4096), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float8_e5m2, jnp.float8_e4m3fn])
def test_gradients_of_8_bits_are_xlas(dtype):
    assert TRITON not in of_leaf(make(), jax.ShapeDtypeStruct((8, 256), dtype))


def test_float64_is_xlas():
    with jax.enable_x64(True):
        assert TRITON not in of_leaf(make(), jax.ShapeDtypeStruct((8, 256), jnp.float64))


@pytest.mark.parametrize("platforms", [("cuda", "rocm"), ("tpu", "cuda"), ("rocm",)])
def test_programs_for_others_are_xlas(platforms):
    text = of_leaf(make(), platforms=platforms)
    assert TRITON not in text
    assert "tpu_custom_call" not in text


@pytest.mark.slow
def test_what_is_exported_for_gpus_runs_on_cpus():
    tx, leaf = make(), jnp.ones(LEAF.shape)
    state, tree = jax.tree.flatten(tx.init(leaf))
    f = jax.jit(lambda g, *s: jax.tree.leaves(tx.update(g, jax.tree.unflatten(tree, s))))
    exported = jax.export.export(f, platforms=("cuda", "cpu"))(leaf, *state)
    exported = jax.export.deserialize(exported.serialize())
    assert TRITON not in exported.mlir_module()
    for got, want in zip(exported.call(leaf, *state), f(leaf, *state), strict=True):
        assert jnp.array_equal(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes_each_device_has_a_kernel(kind):
    mesh = make_mesh("fsdp 8", kind)
    over = NamedSharding(mesh, P("fsdp"))
    leaf = jax.ShapeDtypeStruct(LEAF.shape, LEAF.dtype, sharding=over)
    state, held = jax.eval_shape(TX.init, leaf), state_shardings(TX, leaf)
    state = jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), state, held
    )
    with jax.set_mesh(mesh):
        assert PARTITIONED in lowered(TX.update, leaf, state)


@pytest.mark.parametrize("spec", [P("fsdp"), P()])
def test_in_a_shard_map_over_cpus_it_compiles(spec):
    mesh = make_mesh("fsdp 8")
    f = jax.shard_map(
        lambda g: TX.update(g, TX.init(g))[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    assert TRITON not in lowered(f, LEAF)


def test_xlas_own_code_takes_large_leaves_in_pieces():
    tx, loops = make(implementation="xla"), []
    for rows in (2**14, 2**19):  # 4 and 128 million elements
        leaf = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
        loops.append(of_leaf(tx, leaf).count("stablehlo.while"))
    assert loops[1] == loops[0] + 1


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA L40S"])
def test_in_a_shard_map_over_absent_gpus_it_compiles(kind):
    """Of which Pallas of newer versions does not know all."""
    gpu = jax.sharding.AbstractDevice(kind, 132, "gpu")
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",), abstract_device=gpu)
    f = jax.shard_map(
        lambda g: TX.update(g, TX.init(g))[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
    )
    over = NamedSharding(mesh, P("fsdp"))
    leaf = jax.ShapeDtypeStruct(LEAF.shape, LEAF.dtype, sharding=over)
    assert (TRITON in lowered(f, leaf)) or kind != "NVIDIA H200"


@pytest.fixture
def fresh():
    """What is chosen is no argument of what JAX has cached."""
    jax.clear_caches()
    _dispatch._tell.cache_clear()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("capability", "chosen"), [("7.5", False), ("8.0", True)])
def test_old_gpus_are_xlas(capability, chosen, monkeypatch):
    gpu, own = types.SimpleNamespace(compute_capability=capability), jax.local_devices()

    def devices(backend=None):
        return [gpu] if backend else own

    monkeypatch.setattr(jax, "local_devices", devices)
    assert (TRITON in of_leaf(make())) == chosen
    if not chosen:
        with pytest.raises(NotImplementedError, match=r"capability 7\.5"):
            of_leaf(make(implementation="pallas"))


def warned(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = f()
    return result, [str(x.message) for x in found if "microadam" in str(x.message)]


@pytest.mark.usefixtures("fresh")
def test_without_triton_xla_computes_and_says_so_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "microadam_optax._kernels.gpu", raising=False)
    monkeypatch.delattr(_kernels, "gpu", raising=False)
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    text, messages = warned(lambda: of_leaf(make()))
    assert TRITON not in text
    assert len(messages) == 1
    assert "no kernel for cuda with jax" in messages[0]
    jax.clear_caches()
    assert warned(lambda: of_leaf(make()))[1] == []
    with pytest.raises(NotImplementedError, match="without what the kernel is written"):
        of_leaf(make(implementation="pallas"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs numba")
def test_with_another_ffi_xla_computes_and_says_so_once(monkeypatch):
    changed = _ffi.header().replace("void** args;", "void** arguments;")
    changed = changed.replace(f"API_MINOR {_ffi.version(changed)[1]}", "API_MINOR 99")
    monkeypatch.setattr(_ffi, "header", lambda: changed)
    cpu.missing.cache_clear()
    text, messages = warned(lambda: of_leaf(make(), platforms=("cpu",)))
    assert "microadam_float32" not in text
    assert len(messages) == 1
    assert "no kernel for cpu with XLA's FFI 0.99" in messages[0]
    jax.clear_caches()
    assert warned(lambda: of_leaf(make(), platforms=("cpu",)))[1] == []
    monkeypatch.undo()
    cpu.missing.cache_clear()
    jax.clear_caches()
    assert "microadam_float32" in of_leaf(make(), platforms=("cpu",))
