"""The benchmarks run, and their account of bytes is right; nothing is timed here."""

import math

import pytest

import common
import memory
import step_time

KNOWN = {"Llama-2-7B": 6_738_415_616, "GPT-2 small": 124_439_808}


@pytest.mark.parametrize("model", KNOWN)
def test_shapes_are_those_of_the_models(model):
    shapes = memory.MODELS[model]()
    assert sum(math.prod(shape) for shape in shapes.values()) == KNOWN[model]


def test_default_state_is_at_most_087_bytes_a_parameter():
    for shapes in memory.MODELS.values():
        held = memory.state_bytes(shapes())
        assert held["Adam"] == pytest.approx(8, abs=1e-6)
        assert held["(10, 1 %)"] <= 0.87


def test_formula_is_the_state_where_blocks_are_filled():
    shapes = {"w": (4096, 4096)}
    held = memory.state_bytes(shapes)
    for name, settings in common.SETTINGS.items():
        exact = memory.by_arithmetic(**settings) * 4096**2
        scalars = 4 + 4 * (settings["window"] - 1)  # count and ages
        assert held[name] * 4096**2 == pytest.approx(exact + scalars, abs=0.5)


@pytest.mark.parametrize("apply", [False, True])
def test_step_time_runs(apply):
    row = step_time.compare([(64, 64)], common.SETTINGS["(2, 6 %)"], apply, steps=1)
    assert row["parameters"] == 64 * 64
    assert row["ratio"] > 0
