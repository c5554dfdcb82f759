"""The benchmarks run, and their account of bytes is right; nothing is timed here.

If it fails, the bytes of state that README promises are wrong.
"""

import jax
import numpy as np
import pytest

import common
import gpu_check
import gpu_peers
import gpu_time
import kernel_cases
import memory
import sharding
import step_time


def test_default_state_is_at_most_087_bytes_a_parameter():
    for model in memory.SHOWN.values():
        held = memory.state_bytes(memory.shapes(model))
        assert held["Adam"] == pytest.approx(8, abs=1e-6)
        assert held["(10, 1 %), all compressed"] <= 0.87


def test_formula_is_the_state_where_blocks_are_filled():
    held = memory.state_bytes({"w": jax.ShapeDtypeStruct((4096, 4096), "float32")})
    for name, settings in common.SETTINGS.items():
        exact = memory.by_arithmetic(**settings) * 4096**2
        scalars = 4 + 4 * (settings.get("window", 2) - 1)  # count and ages
        assert held[name] * 4096**2 == pytest.approx(exact + scalars, abs=0.5)


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.promotes
@pytest.mark.slow
def test_step_time_runs(apply):
    row = step_time.compare([(64, 64)], common.SETTINGS["(2, 6 %)"], apply, steps=1)
    assert row["parameters"] == 64 * 64
    assert np.isfinite(row["ratio"])  # on so few elements nothing else is certain


@pytest.mark.slow
def test_the_plan_of_a_70b_model():
    plan = sharding.plan_70b()
    assert plan["parameters"] == 68_976_648_192
    own, held = plan["parameter_bytes"], plan["state_bytes"]
    # Matrices are in 256 shards, the norms on every device; blocks of 224 are the rest.
    assert own == pytest.approx(2 * plan["parameters"] / 256, rel=0.01)
    assert held["AdamW"] == 4 * own + 4  # and its count
    assert held["MicroAdam (10, 1 %), all compressed"] == pytest.approx(
        own / 2 * 0.85, rel=0.02
    )


@pytest.mark.promotes
@pytest.mark.slow
def test_what_each_optimizer_sends():
    mesh = sharding.meshes.make_mesh("tp 8")
    at = sharding.NamedSharding(mesh, sharding.P(None, "tp"))
    found = sharding.measure(
        {"w": jax.ShapeDtypeStruct((32, 4096), "float32", sharding=at)}
    )
    assert found["MicroAdam"]["collectives"] == found["AdamW"]["collectives"] == {}
    assert found["Adafactor"]["collectives"] != {}
    assert found["AdamW"]["state_bytes"] == 8 * 32 * 4096 / 8 + 4


@pytest.mark.slow
def test_the_check_of_a_gpu_finds_no_difference_here():
    found = gpu_check.check(*kernel_cases.CASES["window 1, one entry"], steps=3)
    assert found["passed"]
    for other in ("xla", "cpu"):
        assert found[other]["codes"] == found[other]["other_state"] == 0


@pytest.mark.slow
def test_the_check_of_a_gpu_can_fail(monkeypatch):
    monkeypatch.setattr(gpu_check, "kernel_here", lambda: "xla")
    cases = {"density": 0.05}
    original = gpu_check.scale_by_microadam

    def other(implementation, density, dense):
        more = 0.1 if implementation == "xla" and other.called else density
        other.called = True
        settings = {"window": 1, "density": more, "dense": dense}
        return original(**settings, implementation=implementation)

    other.called = False
    monkeypatch.setattr(gpu_check, "scale_by_microadam", other)
    assert not gpu_check.check((4, 256), jax.numpy.float32, cases, steps=2)["passed"]


@pytest.mark.slow
def test_a_measurement_on_a_gpu_counts_what_must_move():
    tx = gpu_peers.peers()["MicroAdam (2, 6 %), kernel"]
    compiled, row = gpu_time.compile_step(tx, True, [(64, 64)], "float32")
    rows, k = 16, 16  # blocks of 256
    state = 2 * rows * (128 + 4) + rows * k * 3 + 2 * (4 + 4)  # and count and ages
    assert row["least_bytes"] == 3 * 64 * 64 * 4 + state
    gradients = [gpu_time.made([(64, 64)], "float32", seed) for seed in (0, 1)]
    assert gpu_time.measure(tx, compiled, gradients, 2, apply=True)["seconds"] > 0
