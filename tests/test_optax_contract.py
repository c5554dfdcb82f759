"""What optax asks of its own optimizers, asked of MicroAdam by optax's own tests.

If it fails, MicroAdam cannot stand where another optimizer of optax stands.

The test files that the installed optax ships are imported as they are, with absl's
parameterized decorators switched off, so that their test functions can be called
with MicroAdam as the optimizer.
"""

import importlib.util
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized
from optax import contrib
from optax._src import alias

import microadam_optax
from quick import quick

LITERAL = {"dense": None, "match_adam": False}
VARIANTS = {
    "default": {},  # optax's leaves are so small that Adam updates them
    "compressed": {"dense": None},
    "paper": microadam_optax.PAPER,
    "window1": {"window": 1, "density": 0.25, **LITERAL},
    "full": {"window": 3, "density": 1.0, **LITERAL},
    "literal": LITERAL,
}
# A rate with which 10,000 steps cover the way to optax's targets.
RATE = dict.fromkeys(VARIANTS, 3e-4)
RATE |= {"window1": 1e-3, "default": 1e-2, "compressed": 3e-3}


def variant(name):
    """The arguments that can be traced; inject_hyperparams gets no others."""

    def factory(
        learning_rate: optax.ScalarOrSchedule,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        return microadam_optax.microadam(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, **VARIANTS[name]
        )

    return factory


def plain(module: str):
    """A test module of optax, with its test functions undecorated."""
    spec = importlib.util.find_spec(module)
    loaded = importlib.util.module_from_spec(spec)

    def same(*_, **__):
        return lambda function: function

    with (
        mock.patch.object(parameterized, "product", same),
        mock.patch.object(parameterized, "parameters", same),
        mock.patch.object(parameterized, "named_parameters", same),
    ):
        spec.loader.exec_module(loaded)
    return loaded


COMMON = plain("optax.contrib._common_test")
ALIAS = plain("optax._src.alias_test")


def names_in(case: type) -> set[str]:
    return {name for name in vars(case) if name.startswith("test_")}


def keywords(name, monkeypatch):
    """Those by which optax's tests name an optimizer."""
    own = f"microadam_{name}"
    for module in (contrib, alias):
        monkeypatch.setattr(module, own, variant(name), raising=False)
    return {"opt_name": own, "opt_kwargs": {"learning_rate": RATE[name]}}


@pytest.fixture
def trained(request, monkeypatch):
    return keywords(request.param, monkeypatch)


@pytest.fixture(params=["default", "compressed"])
def call(request, monkeypatch):
    """What does not depend on window, density and factor."""
    return keywords(request.param, monkeypatch)


def common(name, call, **keywords):
    test = getattr(COMMON.ContribTest(name), name)
    test(**call, wrapper_name=None, wrapper_kwargs=None, **keywords)


def aliases(name, call, **keywords):
    getattr(ALIAS.AliasTest(name), name)(**call, **keywords)


def with_rate_for(target, call):
    """At a constant rate short windows zigzag in Rosenbrock's valley, like signs.

    With `match_adam` as well. Optax excludes its sign_sgd there. With a schedule they
    come to rest.
    """
    if target != "_setup_rosenbrock" or call["opt_name"].endswith(
        ("default", "paper", "full")
    ):
        return call
    peak = 1e-3 if call["opt_name"].endswith("compressed") else 3e-4
    rate = optax.cosine_decay_schedule(peak, 10_000)
    return {**call, "opt_kwargs": {"learning_rate": rate}}


TARGETS = [name for name in vars(COMMON) if name.startswith("_setup_")]


def test_optax_has_no_test_that_is_not_run_here():
    assert len(TARGETS) == 4
    assert names_in(COMMON.ContribTest) == {
        "test_optimizers_accept_extra_args",
        "test_optimizers",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
        "test_preserve_dtype",
        "test_gradient_accumulation",
        "test_state_shape_dtype_shard_stability",
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
    }
    assert names_in(ALIAS.AliasTest) == {
        "test_optimization",
        "test_optimizers_accept_extra_args",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
        "test_explicit_dtype",  # of mu_dtype, which MicroAdam does not have
        "test_preserve_dtype",
        "test_state_shape_dtype_shard_stability",
        "test_gradient_accumulation",
    }


TRAINED = [  # where the compressed trains, the other variants do, each to one target
    *(("compressed", target) for target in TARGETS),
    ("default", "_setup_mixed_tensor_target"),
    ("paper", "_setup_matrix_parabola"),
    ("window1", "_setup_mixed_tensor_target"),
]
OPTIMIZED = [
    ("default", "_setup_parabola"),
    ("default", "_setup_rosenbrock"),
    ("compressed", "_setup_rosenbrock"),
    ("paper", "_setup_rosenbrock"),
    ("full", "_setup_rosenbrock"),
    ("literal", "_setup_parabola"),
]


def quickly(cases):
    chosen = (x for x in cases if x[0] in ("default", "compressed"))
    return quick(cases, *chosen, several=True)


@pytest.mark.parametrize(("trained", "target"), quickly(TRAINED), indirect=["trained"])
def test_optimizers(trained, target):
    """30,000 steps to each target."""
    call = with_rate_for(target, trained)
    common("test_optimizers", call, target=getattr(COMMON, target), dtype="float32")


@pytest.mark.parametrize(("trained", "target"), quickly(OPTIMIZED), indirect=["trained"])
def test_optimization(trained, target):
    """10,000 steps, without compiling again."""
    call = with_rate_for(target, trained)
    aliases("test_optimization", call, target=getattr(ALIAS, target), dtype=jnp.float32)


@pytest.mark.parametrize(("run", "dtype"), [(common, "bfloat16"), (aliases, "float32")])
def test_preserve_dtype(run, call, dtype):
    run("test_preserve_dtype", call, dtype=dtype)


@pytest.mark.promotes
@pytest.mark.parametrize(("run", "dtype"), [(common, "bfloat16"), (aliases, "float32")])
def test_gradient_accumulation(run, call, dtype):
    run("test_gradient_accumulation", call, dtype=dtype)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (common, jnp.float16),
        (common, jnp.float64),
        (aliases, jnp.bfloat16),
        (aliases, jnp.float32),
    ],
)
def test_state_shape_dtype_shard_stability(run, call, dtype):
    run("test_state_shape_dtype_shard_stability", call, dtype=dtype)


@pytest.mark.parametrize("run", [common, aliases])
def test_inject_hyperparams(run, call):
    run("test_optimizers_can_be_wrapped_in_inject_hyperparams", call)


def test_accept_extra_args(call):
    common("test_optimizers_accept_extra_args", call, wrap=False)
    aliases("test_optimizers_accept_extra_args", call)


def test_learning_rate_schedule(call):
    name = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"
    try:
        common(name, call)
    except unittest.SkipTest as reason:
        pytest.fail(f"optax would skip this: {reason}")


def test_mixed_dtypes_in_x64_mode():
    module = plain("optax._src.float64_test")
    test = module.Float64Test("test_mixed_dtype_input_outputs")
    before = jax.config.jax_enable_x64
    try:
        test.test_mixed_dtype_input_outputs(
            microadam_optax.microadam, {"learning_rate": 0.1}
        )
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.filterwarnings("ignore:Specifying a key")  # of optax's own noisy_sgd
@pytest.mark.parametrize("name", ["default", "compressed"])
@pytest.mark.parametrize(
    "test",
    [
        "test_init_with_abstract_input",
        "test_state_sharding_type_init_match_update",
        "test_state_sharding_type_preserved_with_jit",
    ],
)
def test_sharding(test, name, monkeypatch):
    """On an explicit mesh of 8 devices, parameters (2, 8, 4) in float16."""
    # It compares versions as strings and would skip itself: "0.10.2" < "0.7.2".
    monkeypatch.setattr(jax, "__version__", jax.__version__.replace("0.1", "0.91"))
    case = plain("optax._src.sharding_test").ShardingTest(test)
    try:
        getattr(case, test)(variant(name)(0.1))
    except unittest.SkipTest as reason:
        pytest.fail(f"optax would skip this: {reason}")


def test_inject_hyperparams_with_the_structural_arguments_named():
    microadam = microadam_optax.microadam
    static = microadam_optax.static_args(microadam)
    make = optax.inject_hyperparams(microadam, static_args=static)
    tx = make(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10),
        b1=0.8,
        window=2,
        density=0.5,
        weight_decay=0.1,
    )
    params = jnp.ones(16)
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        _, state = jax.jit(tx.update)(params, state, params)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.8)
    assert set(state.hyperparams) == {
        "learning_rate",
        "b1",
        "b2",
        "eps",
        "eps_root",
        "weight_decay",
    }
