"""The CPU kernel gives XLA's bits, in state and update, however it is called.

If it fails, training on a CPU gives other numbers than anywhere else.
"""

import concurrent.futures
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernel_cases import BF16, CASES, F16, F32, gradients
from meshes import make_mesh
from microadam_optax import _blocks, _moments, _state, _step
from microadam_optax._kernels import _ffi, cpu
from microadam_optax._kernels._rows import Launch, Rows, Scalars
from quick import quick

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None,
    reason=f"the CPU kernel cannot run: {cpu.unavailable()}",
)
F64 = jnp.float64
MORE = {
    "blocks of 64, many slots": (
        (16, 64),
        BF16,
        {"block_size": 64, "window": 10, "density": 0.04},
    ),
    "matched": ((9, 250), BF16, {"window": 4, "density": 0.05, "match_adam": True}),
    "two bits, padded": ((3, 1000), F32, {"error_bits": 2}),
    "eight bits, padded": ((3, 1000), BF16, {"error_bits": 8, "window": 3}),
    "the largest block": ((2, 65536), F32, {"block_size": 65536, "density": 0.001}),
    "blocks past the end of a cell": ((3, 5), F32, {"block_size": 2, "density": 0.3}),
    "error returned": ((6, 256), F32, {"alpha": 0.3}),
    "error returned, two bits": (
        (6, 250),
        BF16,
        {"alpha": 1.0, "window": 1, "error_bits": 2},
    ),
    "double": ((6, 256), F64, {"window": 3}),
    "double, padded": ((2, 700), F64, {"window": 1, "density": 0.2}),
    "several chunks": ((700, 256), F32, {}),
}


SHARED = [  # of the other kernels' cases, those with a form of their own
    "one by one",
    "window 1",
    "float16",
    "the most slots",
    "two bits of 200",
    "padded cells",
    "a cell of 5",
    "more selected than there is",
]
QUICK = (  # window 1 and longer, padding, alpha, chunks; most dtypes
    "window 1",
    "padded cells",
    "matched",
    "error returned",
    "double",
    "several chunks",
)


class Case(NamedTuple):
    """A leaf in cells, and both ways to update it."""

    at: _blocks.Layout
    dtype: Any
    settings: _state.Settings

    @property
    def shape(self):
        return self.at.shape

    @functools.partial(jax.jit, static_argnums=0)
    def first_state(self):
        state = _state.zeros(self.at, self.settings)
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), state)

    @functools.partial(jax.jit, static_argnums=0)
    def cells(self, gradient):
        return _blocks.split(gradient, self.at).reshape(-1, self.at.cell)

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, count, eps=1e-8, eps_root=0.0):
        slots = self.settings.window - 1
        ages = None
        if slots:
            ages = _moments.first_ages(slots)
            older = lambda _, ages: _moments.older_ages(ages)  # noqa: E731
            ages = jax.lax.fori_loop(1, count, older, ages)
        numbers = {"b1": 0.9, "b2": 0.999, "eps": eps, "eps_root": eps_root}
        fields = {name: jnp.float32(x) for name, x in numbers.items()}
        fields |= {"count": jnp.int32(count), "ages": ages, "prng": None}
        return _step.of_leaf(_step.Step(**fields), self.at, self.settings)

    @functools.partial(jax.jit, static_argnums=0)
    def kernel(self, cells, state, step):
        k = self.settings.k(self.at.block)
        launch = Launch(
            self.at.cell, self.at.blocks, self.at.block, self.settings.bits, k
        )
        launch = launch._replace(alpha=self.settings.alpha)
        rows = cells
        if not self.at.padded:
            rows = cells.reshape(-1, self.at.block)
            launch = launch._replace(cell=self.at.block, blocks=1)
        new = cpu.update(Rows(rows, *state), scalars(step, k), launch)
        return new.update.reshape(cells.shape), _state.LeafState(*new[1:])

    @functools.partial(jax.jit, static_argnums=0)
    def xla(self, cells, state, step):
        rows = _blocks.pad(cells, self.at.blocks, self.at.block)
        rows = rows.reshape(-1, self.at.block)
        update, new = _step.update_blocks(rows, state, step, self.settings)
        update = update.reshape(-1, self.at.blocks, self.at.block)
        state_ = new
        if state.indices is not None:
            begin = _moments.oldest_start(step.ages, new.indices.shape[1])
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            state_ = state_._replace(
                indices=put(state.indices, new.indices, begin),
                values=put(state.values, new.values, begin),
            )
        return _blocks.unpad(update, self.at.cell), state_


def make(shape, dtype, arguments, whole_rows=True):
    """A case whose cells are rows of the leaf, or those of the default grid."""
    given = {"window": 2, "density": 0.06, "block_size": 256, "error_bits": 4}
    given |= {"alpha": 0.0} | dict(arguments)
    names = ("window", "density", "block_size", "error_bits", "alpha")
    matched = given.get("match_adam", False)
    some = _state.Settings(*(given[name] for name in names), match_adam=matched)
    grid = (shape[0], 1) if whole_rows else None
    return Case(_blocks.layout_of(shape, some.block_size, grid=grid), dtype, some)


def scalars(step, k):
    factors = jnp.stack([step.debias_mu, step.debias_nu, step.eps, jnp.float32(0)])
    if step.ages is None:
        return Scalars(factors, None, None)
    ages = step.ages.astype(jnp.float32)
    weights = jnp.stack([jnp.power(decay, ages) for decay in (step.b1, step.b2)])
    return Scalars(factors, _moments.oldest_start(step.ages, k)[None], weights)


def assert_same_bits(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.dtype.kind == "u":
            np.testing.assert_array_equal(ours, theirs)
            continue
        nan = np.isnan(theirs.astype(np.float64))
        np.testing.assert_array_equal(np.isnan(ours.astype(np.float64)), nan)
        bits = f"u{ours.itemsize}"
        np.testing.assert_array_equal(ours[~nan].view(bits), theirs[~nan].view(bits))


def follow(case, some):
    ours = theirs = case.first_state()
    for count, gradient in enumerate(some, 1):
        cells, step = case.cells(gradient), case.step(count)
        update, ours = case.kernel(cells, ours, step)
        expected, theirs = case.xla(cells, theirs, step)
        assert_same_bits((update, ours), (expected, theirs))


@pytest.mark.makes_nan
@pytest.mark.parametrize("name", quick([*SHARED, *MORE], *QUICK))
def test_trajectories_are_those_of_xla(name):
    shape, dtype, arguments = (CASES | MORE)[name]
    with jax.enable_x64(dtype == F64):
        steps = 4 if np.prod(shape) > 10_000 else 25
        case = make(shape, dtype, arguments, whole_rows=name in MORE)
        follow(case, gradients(shape, dtype, steps))


HOSTILE = {
    "denormal": [1e-45, -1e-40, 1e-39, -1.1754942e-38, 1.2e-38, 3e-38],
    "negative zero": [-0.0, 0.0],
    "tiny": [2.0**-100, -(2.0**-101), 1e-30, -1e-36],
    "huge": [3e38, -3e38, 1e30, 2.0**60, -(2.0**61), 1.0],
    "infinite": [np.inf, -np.inf, 1.0, -2.0],
    "not a number": [np.nan, 1.0, -np.inf, 0.0],
    "ties": [1.0, -1.0, 0.5, 1.0],
    "one number": [-3.0],
    "neighbours": [1.0, np.nextafter(np.float32(1), np.float32(2)), 0.99999994],
}


@pytest.mark.makes_nan
@pytest.mark.parametrize(
    ("dtype", "window"),
    quick([(F32, 2), (BF16, 1), (F16, 2), (F64, 1)], (F32, 2), several=True),
)
def test_hostile_numbers(dtype, window):
    """On the thread that calls and, with rows for several chunks, on XLA's own."""
    with jax.enable_x64(dtype == F64), np.errstate(over="ignore"):
        case = make((1800, 64), dtype, {"block_size": 64, "window": window})
        for numbers in HOSTILE.values():
            rng = np.random.default_rng(0)
            some = [rng.choice(numbers, size=case.shape) for _ in range(3)]
            some[1][::2] += rng.normal(size=some[1][::2].shape) / 2
            follow(case, (jnp.asarray(x, dtype) for x in some))


def test_numbers_that_float32_does_not_hold():
    with jax.enable_x64(True):
        case = make(*MORE["double"])
        gradient = np.random.default_rng(0).normal(size=case.shape)
        gradient[0, :4] = 1e300, -1e300, 1e-300, 2.0**60 + 2.0**9
        follow(case, [jnp.asarray(gradient)] * 3)


@pytest.mark.slow
@settings(max_examples=4)
@given(st.integers(0, 2**32 - 1))
def test_random_leaves(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 700)))
    arguments = {
        "window": int(rng.choice([1, 2, 3, 10])),
        "density": float(rng.uniform(0.001, 1) ** 2),
        "block_size": int(rng.choice([2, 8, 64, 100, 256, 512])),
        "error_bits": int(rng.choice([2, 4, 8])),
        "alpha": float(rng.choice([0.0, 0.2])),
    }
    dtype = [F32, BF16, F16][rng.integers(3)]
    scale = np.exp(rng.normal(size=(shape[0], 1)) * 3)
    some = (np.round(rng.normal(size=shape) * 8, rng.integers(3)) for _ in range(3))
    follow(make(shape, dtype, arguments), (jnp.asarray(g * scale, dtype) for g in some))


def test_epsilons():
    case = make((700, 256), F32, {})
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=case.shape), F32)
    for eps in (1e-3, 0.5):
        step = case.step(1, eps)
        got = case.kernel(case.cells(gradient), case.first_state(), step)
        assert_same_bits(got, case.xla(case.cells(gradient), case.first_state(), step))


def test_eps_root():
    case = make((4, 256), F32, {"window": 1, "density": 1.0})
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)), F32)
    one = jnp.ones(4).at[2].set(0)  # neither is debiased, and eps is 0
    launch = Launch(256, 1, 256, 4, 256)
    new = cpu.update(
        Rows(gradient, *case.first_state()), Scalars(one, None, None), launch
    )
    value = gradient.astype(BF16).astype(F32)
    np.testing.assert_allclose(new.update, value / np.sqrt(value**2 + 1), rtol=1e-6)


@pytest.mark.parametrize(("name", "window"), [("several chunks", 2), ("padded cells", 1)])
def test_donated_in_place_and_else_on_copies(name, window):
    shape, dtype, arguments = (CASES | MORE)[name]
    case = make(shape, dtype, arguments | {"window": window}, name in MORE)
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    args = case.cells(gradient), case.first_state(), case.step(1)
    kept = jax.tree.map(np.array, args)
    want = case.kernel(*args)
    assert_same_bits(args, kept)  # what is not donated is not written
    assert_same_bits(want, case.xla(*args))

    def step(cells, state, step):
        return case.kernel(cells, state, step)

    donated = jax.jit(step, donate_argnums=(0, 1))
    compiled = donated.lower(*args).compile()
    held = compiled.memory_analysis()
    arrays = sum(x.nbytes for x in jax.tree.leaves(args[:2]))
    assert held.alias_size_in_bytes == arrays
    assert held.temp_size_in_bytes < 1000
    args = jax.tree.map(jnp.array, args)
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(args[:2])]
    got = compiled(*args)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == before
    assert_same_bits(got, want)


def test_many_calls_at_once():
    case = make((700, 256), F32, {})
    rng = np.random.default_rng(0)
    some = [case.cells(jnp.asarray(rng.normal(size=case.shape), F32)) for _ in range(4)]
    state, step = case.first_state(), case.step(1)
    want = [case.kernel(cells, state, step) for cells in some]

    def repeat(i):
        return [case.kernel(some[i], state, step) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(repeat, range(4))):
            for got in results:
                assert_same_bits(got, want[i])


def test_on_several_devices_at_once():
    case = make((700, 256), F32, {})
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=case.shape), F32)
    args = case.cells(gradient), case.first_state(), case.step(1)
    want = case.kernel(*args)
    placed = [jax.device_put(args, device) for device in jax.devices()]
    for _ in range(5):
        for got in [case.kernel(*args) for args in placed]:
            assert_same_bits(got, want)


def test_in_a_shard_map():
    mesh = make_mesh("fsdp 8")
    case = make((16, 256), F32, {})
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=case.shape), F32)
    args = case.cells(gradient), case.first_state(), case.step(1)
    own = jax.P("fsdp")
    step = jax.jit(
        jax.shard_map(
            lambda cells, state, step: make((2, 256), F32, {}).kernel(cells, state, step),
            mesh=mesh,
            in_specs=(own, own, jax.P()),
            out_specs=(own, own),
        )
    )
    assert_same_bits(step(*args), case.kernel(*args))


def test_decays_are_traced():
    case = make((5, 256), F32, {})
    gradient = case.cells(jnp.ones((5, 256)))
    before = case.kernel._cache_size()
    for eps in (1e-8, 1e-4):
        case.kernel(gradient, case.first_state(), case.step(1, eps))
    assert case.kernel._cache_size() - before == 1


def test_what_it_does_not_take():
    at = _blocks.layout_of((4, 256), 256)
    some = _state.Settings(2, 0.06, 256, 4, 0.1)
    for dtype in (F32, BF16, F16, F64):
        assert cpu.reason_against(at, dtype, some) is None
    assert cpu.reason_against(at, jnp.float8_e5m2, some) == "gradients of float8_e5m2"


def test_the_interface_of_this_jax_is_known():
    text = _ffi.header()
    assert _ffi.changes(text) == []
    assert _ffi.reason_against(text) is None


CHANGES = {
    "CallFrame": ("  XLA_FFI_ExecutionStage stage;", ""),
    "Args": ("  void** args;  ", "  void** more;\n  void** args;  "),
    "Buffer": ("  int64_t rank;", "  int32_t rank;"),
    "ThreadPool_NumThreads_Args": ("  int64_t* num_threads;", "  int64_t num_threads;"),
    "ThreadPool_Schedule": ("  _XLA_FFI_API_STRUCT_FIELD(XLA_FFI_State_Set);", ""),
    "Extension_Metadata": ("XLA_FFI_Extension_Metadata = 1,", "Metadata = 2,"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_newer_interface_is_used_only_if_it_is_the_same(name):
    major, minor = _ffi.version(_ffi.header())
    define = "#define XLA_FFI_API_MINOR"
    newer = _ffi.header().replace(f"{define} {minor}", f"{define} {minor + 9}")
    assert _ffi.reason_against(newer) is None
    assert newer.count(CHANGES[name][0]) >= 1
    changed = newer.replace(*CHANGES[name])
    assert f"{major}.{minor + 9}" in _ffi.reason_against(changed)
    assert name in _ffi.changes(changed)


def test_an_older_interface_is_not_used():
    text = _ffi.header()
    minor = _ffi.version(text)[1]
    older = text.replace(f"API_MINOR {minor}", "API_MINOR 1")
    assert "older" in _ffi.reason_against(older)


@pytest.mark.parametrize("name", ["numba", "sys.platform"])
def test_where_it_cannot_run(name, monkeypatch):
    if name == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(sys, "platform", "win32")
    cpu.unavailable.cache_clear()
    assert ("numba" if name == "numba" else "win32") in cpu.unavailable()
    monkeypatch.undo()
    cpu.unavailable.cache_clear()
    assert cpu.unavailable() is None


PROGRAM = """
import jax.numpy as jnp
from microadam_optax._kernels import cpu, cpu_handlers
from microadam_optax._kernels._rows import Launch, Rows, Scalars
rows = Rows(
    jnp.ones((2, 8)),
    jnp.zeros((2, 4), "uint8"),
    jnp.zeros((2, 2), "bfloat16"),
    None,
    None,
)
new = cpu.update(rows, Scalars(jnp.ones(4), None, None), Launch(8, 1, 8, 4, 2))
functions = [f for pair in cpu_handlers.kept.values() for f in pair]
print(new.update[0].tolist(), [f.cache_hits for f in functions])
"""


def run_python(program, **variables):
    command = [sys.executable, "-W", "error", "-c", program]
    environment = os.environ | variables
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


@pytest.mark.slow
def test_it_is_compiled_once_for_all_processes(tmp_path):
    program = (
        """
import sys
from microadam_optax._kernels import cpu
assert "numba" not in sys.modules  # which is imported when it is needed
"""
        + PROGRAM
    )
    run = functools.partial(run_python, program, NUMBA_CACHE_DIR=str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run) for _ in range(2)]
        outputs = [future.result().stdout for future in both]
    update = 1 / (np.sqrt(2) + 1)
    for output in outputs:
        np.testing.assert_allclose(eval(output.split("]")[0] + "]")[:2], update, 1e-6)
    files = sorted(tmp_path.rglob("*.nb?"))
    assert len(files) == 4  # an index and the code, of the task and the handler
    assert run().stdout == f"{outputs[0].split(']')[0]}] [1, 1]\n"
    assert sorted(tmp_path.rglob("*.nb?")) == files


@pytest.mark.slow
def test_it_runs_where_nothing_can_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()  # where numba's folders are looked for, and none can be made
    program = (
        """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]
"""
        + PROGRAM
    )
    done = run_python(program, NUMBA_CACHE_DIR=str(blocked / "cache"))
    assert done.stdout.endswith("[0, 0]\n")
    assert list(pathlib.Path(tmp_path).iterdir()) == [blocked]


@pytest.mark.slow
def test_threads_may_come_first_together():
    program = """
import concurrent.futures, threading
import jax, jax.numpy as jnp
from microadam_optax import scale_by_microadam
tx = scale_by_microadam(dense=None)
state, barrier = tx.init(jnp.ones(64)), threading.Barrier(4)
def run(i):
    barrier.wait()
    return jax.jit(lambda g, s: tx.update(g * i, s))(jnp.ones(64), state)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(len(list(pool.map(run, range(4)))))
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr
