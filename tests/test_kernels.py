"""The kernels give XLA's bits, interpreted, and lower for their platforms, on a CPU.

If it fails, training on a GPU or TPU gives other numbers than anywhere else.
"""

import contextlib
import functools
import pathlib
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import microadam_optax
from compressed import scale_by_microadam
from kernel_cases import BF16, CASES, F16, F32, FORMS, gradients
from meshes import cases_on, collectives, make_mesh
from microadam_optax import _dispatch, state_shardings
from microadam_optax._blocks import layout_of
from microadam_optax._kernels import gpu
from microadam_optax._state import Settings
from quick import quick

INTERPRETED = tuple(_dispatch.INTERPRETED)
LOWERED = ("one by one", "window 1", "window 2", "padded cells", "two bits of 200")
# The interpreter takes long: each path on GPUs, and what the TPU's kernel has of its own.
ON_GPUS = (
    "one by one",
    "the fewest by bisection",
    "window 1, one entry",
    "window 1, a quarter",
    "window 2",
    "the most slots",
    "eight bits",
    "two bits of 200",
    "more selected than there is",
)
TRAJECTORIES = [
    *((case, "interpret_gpu") for case in ON_GPUS),
    *((case, "interpret_tpu") for case in (*LOWERED, "eight bits", "a cell of 5")),
]
CALLS = {"cuda": "xla.gpu.triton", "tpu": "tpu_custom_call"}


def run(shape, dtype, arguments, implementation):
    tx = scale_by_microadam(**arguments, implementation=implementation)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(shape, dtype))
    for gradient in gradients(shape, dtype):
        updates, state = update(gradient, state)
        yield updates, state


def assert_agree(ours, theirs, case):
    """Steps of two implementations: the same bits of state, and updates that are near."""
    _, dtype, arguments = CASES[case]
    # Moments are sums of up to `window` products that each may be rounded otherwise,
    # and an update is at most about 10.
    roundings = 4 * arguments.get("window", 2) + 12
    atol = 10 * roundings * 2.0**-24
    for (own_updates, own_state), (updates, state) in zip(ours, theirs, strict=True):
        assert own_updates.dtype == dtype
        assert_same(own_state, state)
        np.testing.assert_allclose(
            own_updates.astype(F32),
            updates.astype(F32),
            rtol=float(jnp.finfo(dtype).eps),
            atol=atol,
        )


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.astype(F32), b.astype(F32))


@pytest.mark.parametrize("case", CASES)
def test_cases_are_what_they_say(case):
    shape, dtype, arguments = CASES[case]
    block, k = FORMS[case]
    tx = scale_by_microadam(**arguments)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, dtype))
    assert state.codes.shape[-1] * 8 // arguments.get("error_bits", 4) == block
    if state.indices is None:
        k_of = Settings(1, arguments["density"], 256, 4, 0.0).k
        assert k_of(block) == k
    else:
        assert state.indices.shape[-1] // (arguments.get("window", 2) - 1) == k


@pytest.mark.parametrize(
    ("case", "implementation"),
    quick(TRAJECTORIES, *(("window 2", x) for x in INTERPRETED), several=True),
)
def test_trajectories_are_those_of_xla(case, implementation):
    assert_agree(run(*CASES[case], implementation), run(*CASES[case], "xla"), case)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
def test_huge_numbers_are_bounded(implementation):
    x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    x[0, :9], x[1, :3], x[2] = 2.0**62, (1e38, -1e38, 2.0**60), 1e30 * x[2]
    settings = {"window": 1, "density": 0.06, "dense": None}
    kernel, xla = (
        scale_by_microadam(**settings, implementation=x) for x in (implementation, "xla")
    )
    state = kernel.init(jnp.asarray(x))
    for gradient in (x, 0.5 * x):
        want = jax.jit(xla.update)(gradient, state)[1]
        state = jax.jit(kernel.update)(gradient, state)[1]
        chex.assert_trees_all_equal(state, want)


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_rows_of_a_program_are_searched_apart(implementation):
    rng = np.random.default_rng(0)
    x = np.zeros((4, 256), np.float32)
    x[0] = rng.uniform(100, 300, 256)
    x[0, :16] = 0  # as many as are selected
    x[1, :5], x[2, :3], x[3, :9] = 5, 300, 7  # fewer
    kernel, xla = (
        scale_by_microadam(
            window=1, density=0.0625, dense=None, shards=1, implementation=i
        )
        for i in (implementation, "xla")
    )
    state = kernel.init(jnp.asarray(x))
    want = jax.jit(xla.update)(x, state)[1]
    chex.assert_trees_all_equal(jax.jit(kernel.update)(x, state)[1], want)


@pytest.mark.slow
def test_a_tree_of_all_kinds_of_leaves():
    tree = {
        "scalar": jnp.ones(()),
        "empty": jnp.ones((0, 3)),
        "bias": jnp.linspace(-1, 1, 37, dtype=BF16),
        "cube": jnp.linspace(-1, 2, 6 * 5 * 64).reshape(6, 5, 64),
    }
    results = {}
    for implementation in ("xla", *INTERPRETED):
        tx = scale_by_microadam(window=1, implementation=implementation)
        results[implementation] = jax.jit(tx.update)(tree, tx.init(tree))
    for implementation in INTERPRETED:
        ours, theirs = results[implementation], results["xla"]
        jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
        assert jax.tree.map(jnp.shape, ours[0]) == jax.tree.map(jnp.shape, theirs[0])


@pytest.mark.makes_nan
@pytest.mark.parametrize(
    ("case", "programs"),
    [("padded cells", (4, 4)), ("rows cut into four", (1, 1))],
)
@pytest.mark.slow
def test_rows_of_a_program_do_not_matter(case, programs, monkeypatch):
    rows, warps = programs
    several = functools.partial(gpu.update, rows=rows, warps=warps)
    monkeypatch.setattr(gpu, "update", several)
    jax.clear_caches()  # the numbers of a program are no argument of what is cached
    got = list(run(*CASES[case], "interpret_gpu"))
    jax.clear_caches()
    assert_agree(got, run(*CASES[case], "xla"), case)


def lower(tx, params, platform):
    """The text of the donated update for a platform that is not here."""
    here = contextlib.nullcontext()
    if platform == "cuda":
        gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
        here = use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu))
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    with here:
        traced = step.trace(params, jax.eval_shape(tx.init, params))
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("case", quick(CASES, *LOWERED))
def test_it_lowers_on_a_cpu_without_a_warning(case, platform):
    shape, dtype, arguments = CASES[case]
    tx = scale_by_microadam(**arguments, implementation="pallas")
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lower(tx, leaf, platform)
    assert text.count(CALLS[platform]) == 1
    if not (platform == "tpu" and dtype == F16):  # which it computes in float32
        call = text[text.index(CALLS[platform]) :]
        arrays = len(jax.tree.leaves(jax.eval_shape(tx.init, leaf))) - 1
        arrays -= arguments.get("window", 2) > 1  # count and ages are not the kernel's
        assert call.count("output_operand_alias<") >= arrays + 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"alpha": 0.1}, r"`alpha` other than 0, as in \['a'\]"),
        ({"stochastic_rounding": True}, "`stochastic_rounding`"),
        ({"block_size": 264}, r"blocks of more than 256 elements, as in \['b'\]\[0\]"),
        ({"window": 1, "density": 0.26}, r"more than 64 selected .* in \['b'\]\[0\]"),
        ({"window": 9, "density": 0.056}, r"more than 128 entries .* in \['b'\]\[0\]"),
    ],
)
def test_what_has_no_kernel(arguments, what):
    size = 8 * arguments.get("block_size", 256)
    params = {"a": jnp.ones(3), "b": [jnp.ones(size)]}

    def init():
        scale_by_microadam(**arguments, implementation="pallas").init(params)

    with pytest.raises(NotImplementedError, match=what):
        init()


@pytest.mark.parametrize("name", INTERPRETED)
def test_addresses_in_the_window_fit_an_int32(name):
    settings = Settings(128, 0.001, 256, 4, 0.0, name)
    at = layout_of((2_125_000, 512), 256)
    assert (at.block, settings.k(at.block)) == (64, 1)
    reason = _dispatch.reason_against(at, F32, settings)
    assert reason is not None
    assert "entries in the window" in reason
    fewer = settings._replace(window=65)
    assert _dispatch.reason_against(at, F32, fewer) is None


def test_float64_has_no_kernel():
    with jax.enable_x64(True):
        tx = scale_by_microadam(implementation="pallas")
        state = tx.init(jnp.ones(8, F32))
        with pytest.raises(NotImplementedError, match="gradients of float64"):
            tx.update(jnp.ones(8, jnp.float64), state)


@pytest.mark.makes_nan
@pytest.mark.parametrize(
    ("case", "implementation"),
    [("one by one", "interpret_tpu"), ("padded cells", "interpret_gpu")],
)
@pytest.mark.slow
def test_x64_mode_changes_nothing(case, implementation):
    plain = list(run(*CASES[case], implementation))
    assert_agree(plain, run(*CASES[case], "xla"), case)
    with jax.enable_x64(True):
        *_, wide = run(*CASES[case], implementation)
    assert_same(wide, plain[-1])


ON_MESHES = [
    ("MLP up, both", "fsdp 2, tp 4", AxisType.Auto, 2, "interpret_gpu"),
    ("attention, embed and heads", "fsdp 4, tp 2", AxisType.Explicit, 1, "interpret_tpu"),
]


@pytest.mark.parametrize(("case", "name", "kind", "window", "implementation"), ON_MESHES)
@pytest.mark.slow
def test_on_meshes_nothing_is_sent_and_bits_are_equal(
    case, name, kind, window, implementation
):
    settings = {"window": window, "density": 0.12 / window}
    tx = scale_by_microadam(**settings, implementation=implementation)
    mesh, some = make_mesh(name, kind), {case: cases_on(name)[case]}
    rng = np.random.default_rng(0)
    gradient = {n: jnp.asarray(rng.normal(size=c.small), BF16) for n, c in some.items()}
    want = jax.jit(tx.update)(gradient, tx.init(gradient))
    with jax.set_mesh(mesh):
        own = {n: jax.NamedSharding(mesh, c.spec) for n, c in some.items()}
        placed = jax.device_put(gradient, own)
        held = state_shardings(tx, placed)
        state = jax.jit(tx.init, out_shardings=held)(placed)
        step = jax.jit(tx.update, donate_argnums=(0, 1), out_shardings=(own, held))
        compiled = step.lower(placed, state).compile()
        assert collectives(compiled) == {}
        got = compiled(placed, state)
    assert_same(got, want)


@pytest.mark.parametrize("platform", CALLS)
def test_in_a_shard_map(platform):
    mesh = make_mesh("fsdp 8")
    tx = scale_by_microadam(window=2, implementation="pallas")
    state = tx.init(jnp.ones((8, 64)))
    specs = jax.tree.map(lambda x: jax.P("fsdp") if x.ndim > 1 else jax.P(), state)
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    axes = AbstractMesh((8,), ("fsdp",), (AxisType.Auto,), abstract_device=gpu)
    with use_abstract_mesh(axes) if platform == "cuda" else contextlib.nullcontext():
        update = jax.shard_map(
            tx.update,
            mesh=axes if platform == "cuda" else mesh,
            in_specs=(jax.P("fsdp"), specs),
            out_specs=(jax.P("fsdp"), specs),
        )
        traced = jax.jit(update).trace(jnp.ones((8, 64)), state)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(CALLS[platform]) == 1


@pytest.mark.slow
def test_the_package_works_without_its_kernels(tmp_path):
    source = pathlib.Path(microadam_optax.__file__).parent
    ignored = shutil.ignore_patterns("_kernels", "__pycache__")
    shutil.copytree(source, tmp_path / "microadam_optax", ignore=ignored)
    program = """
import jax.numpy as jnp
from microadam_optax import microadam
tx = microadam(0.1, dense=None)
print(tx.update(jnp.ones(8), tx.init(jnp.ones(8)))[0].shape)
try:
    microadam(0.1, dense=None, implementation="pallas").init(jnp.ones(8))
except NotImplementedError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(8,)" in done.stdout
    assert "an installation without" in done.stdout
