"""The memory planner: bytes by arithmetic, clear errors.

If it fails, the planner promises memory that a model does not fit.
"""

import importlib.metadata
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_optax import memory, microadam, smaller_than
from microadam_optax.planner import plans
from microadam_optax.planner.command import main, make_parser
from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.sizes import MODELS
from published import PUBLISHED


def test_a_plan_is_that_of_the_whole_tree():
    """Equal leaves are counted, not computed one by one."""
    arguments = ["gpt2", "--devices", "4", "--params-dtype", "float32", "--window", "3"]
    args = make_parser().parse_args(arguments)
    shapes, mesh = shapes_of(MODELS["gpt2"]), AbstractMesh((4,), ("fsdp",))
    params = {x: jax.ShapeDtypeStruct(s, jnp.float32) for x, s in shapes.items()}
    places = {
        # 50257 words and the 3 x 768 of queries, keys and values aside, 4 divide all.
        x: NamedSharding(mesh, P(None, "fsdp") if s[0] % 4 else P("fsdp"))
        for x, s in shapes.items()
    }
    rows = plans.plan(MODELS["gpt2"], args)
    planned = {row.optimizer: row for row in rows if row.way == "ordinary step"}
    for name, tx, _ in plans.candidates(args):
        assert planned[name].state == memory.optimizer_bytes(tx, params, places), name
        assert planned[name].parameters == memory.array_bytes(params, places)


@pytest.mark.parametrize("shards", [1, 8])
def test_bytes_of_an_optimizer(shards):
    params = {"w": jax.ShapeDtypeStruct((256, 2048), jnp.float32)}
    place = NamedSharding(AbstractMesh((shards,), ("fsdp",)), P("fsdp"))
    size, shardings = 256 * 2048 // shards, place if shards > 1 else None
    adam = memory.optimizer_bytes(optax.adam(1e-3), params, shardings)
    assert adam == 8 * size + 4
    tx = microadam(1e-3, window=2, density=0.06)
    ours = memory.optimizer_bytes(tx, params, shardings)
    blocks = size // 256
    assert ours == blocks * (128 + 4 + 16 * 3) + 4 + 4  # and count and ages


def test_bytes_of_any_chain():
    params = {"w": jnp.zeros((64, 2048)), "b": jnp.zeros(256)}
    dense = microadam(1e-3, window=1, dense=smaller_than(4096))
    count = 4
    expected = 64 * 2048 // 256 * (128 + 4) + count + 8 * 256
    assert memory.optimizer_bytes(dense, params) == expected
    accumulated = optax.MultiSteps(dense, 2).gradient_transformation()
    more = memory.optimizer_bytes(accumulated, params) - expected
    assert 4 * (64 * 2048 + 256) <= more <= 4 * (64 * 2048 + 256) + 16


def run(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["bytes_a_device"]
    return found, {x["optimizer"]: x for x in rows if x["way"] == "ordinary step"}


def test_a_plan(capsys):
    found, rows = run(capsys, "llama2-7b", "--gradients-dtype", "float32")
    number = PUBLISHED["llama2-7b"]
    assert found["parameters"] == number
    adam, ours = rows["Adam, float32 moments"], rows["MicroAdam (2, 6 %), 4 bits"]
    assert adam["parameters"] == 2 * number
    assert adam["gradients"] == 4 * number
    assert adam["state"] == 8 * number + 4
    assert rows["Adam, bfloat16 moments"]["state"] == 4 * number + 4
    assert rows["Lion"]["state"] == 2 * number + 4
    assert 0.70 < ours["state"] / number < 0.71
    assert ours["sum"] == sum(ours[x] for x in ("parameters", "gradients", "state"))
    assert adam["fits_gb"] == [141]
    assert ours["fits_gb"] == [80, 141]


def test_moments_in_float32(capsys):
    _, rows = run(capsys, "gpt2", "--params-dtype", "float32")
    number = PUBLISHED["gpt2"]
    assert rows["Adam, float32 moments"]["state"] == 8 * number + 4
    assert rows["Adam, mu in bfloat16"]["state"] == 6 * number + 4
    assert rows["Lion"]["state"] == 4 * number + 4
    assert "Adam, bfloat16 moments" not in rows


def test_a_plan_for_many_devices(capsys):
    _, whole = run(capsys, "bert-base", "--params-dtype", "float32")
    _, parts = run(capsys, "bert-base", "--params-dtype", "float32", "--devices", "8")
    for name, row in whole.items():
        if "Adafactor" not in name and "GaLore" not in name:  # theirs are replicated
            assert parts[name]["state"] == pytest.approx(row["state"] / 8, rel=0.01)
        assert parts[name]["parameters"] == pytest.approx(row["parameters"] / 8, rel=0.01)


def test_the_arguments_of_microadam_count(capsys):
    arguments = ["--window", "2", "--density", "0.12", "--error-bits", "8"]
    arguments += ["--block-size", "64"]
    _, rows = run(capsys, "gpt2", *arguments)
    _, none = run(capsys, "gpt2", *arguments, "--dense-below", "0")
    _, all_dense = run(capsys, "gpt2", *arguments, "--dense-below", str(10**9))
    _, same = run(capsys, "gpt2", *arguments, "--dense-below", "4096")
    name = "MicroAdam (2, 12 %), 8 bits"
    assert rows[name]["state"] > 1.3 * PUBLISHED["gpt2"]
    assert rows == same
    number = sum(math.prod(s) for s in shapes_of(MODELS["gpt2"]).values() if len(s) == 1)
    # bfloat16 moments, 4 bytes, instead of 1 + 4 / 64 and 8 entries of 3 bytes in 64.
    dearer = rows[name]["state"] - none[name]["state"]
    assert dearer == pytest.approx(number * (4 - 1 - 28 / 64), rel=0.02)
    assert all_dense[name]["state"] == pytest.approx(4 * PUBLISHED["gpt2"], rel=1e-6)


def test_a_config_file_or_its_folder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["gpt2"]))
    for path in (tmp_path, tmp_path / "config.json"):
        assert run(capsys, str(path))[0]["parameters"] == PUBLISHED["gpt2"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_is_whole(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["llama2-7b", "--devices", "8"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    assert "6,738,415,616 parameters, bfloat16, 8 devices" in text
    said = "parameters 1.68 GB, gradients 1.68 GB a device, 0.12 GB layer by layer"
    assert said in " ".join(text.split())
    first, by_layer, multi_steps, accumulate, both = parts(text)
    assert [x[0] for x in (first, by_layer, multi_steps)] == [
        "ordinary step",
        "layer by layer",
        "optax.MultiSteps",
    ]
    assert (accumulate[0], both[0]) == ("accumulate", "accumulate, layer by layer")
    adam, line = first[1], first[-1]
    assert re.fullmatch(r"MicroAdam \(2, 6 %\), 4 bits +0.59 +0.705 +3.96 +16 GB", line)
    assert re.fullmatch(r"Adam, bfloat16 moments +3.37 +4.000 +6.74 +16 GB", adam)
    name = r"MicroAdam \(2, 6 %\), 4 bits"
    assert re.fullmatch(name + " +0.59 +0.705 +2.39 +16 GB", by_layer[-1])
    assert re.fullmatch(name + " +3.96 +4.705 +7.33 +16 GB", multi_steps[-1])
    assert re.fullmatch(name + " +0.59 +0.705 +3.96 +16 GB", accumulate[-1])
    assert re.fullmatch(name + " +0.59 +0.705 +2.39 +16 GB", both[-1])


def parts(text):
    """The lines of the table, a list for each way to take a step."""
    lines = [line.rstrip() for line in text.splitlines()]
    below = next(i for i, line in enumerate(lines) if line.startswith("──"))
    paragraphs = "\n".join(lines[below + 1 :]).split("\n\n")
    return [x.split("\n") for x in paragraphs][:-1]  # the last explains


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, [], "is neither a file nor one of llama2-7b"),
        ("{", [], "is not JSON"),
        ("[1]", [], "must hold a JSON object"),
        ('{"model_type": "t5"}', [], "model_type must be one of bert, gemma,"),
        ('{"model_type": ["llama"]}', [], "model_type must be one of bert, gemma,"),
        ('{"model_type": "gemma3"}', [], "text_config must be an object, got None"),
        (
            json.dumps({**MODELS["llama2-7b"], "num_hidden_layers": 100_000}),
            [],
            "num_hidden_layers must be at most 10,000, got 100,000",
        ),
        (json.dumps(MODELS["gpt2"]), ["--dense-below", "-5"], "invalid non-negative int"),
        ('{"model_type": "gpt2"}', [], "n_embd must be a positive integer, got None"),
        (
            '{"model_type": "gpt2", "n_embd": "768"}',
            [],
            "n_embd must be a positive integer, got '768'",
        ),
        (json.dumps(MODELS["gpt2"]), ["--window", "0"], "`window` must be an integer of"),
        (json.dumps(MODELS["gpt2"]), ["--devices", "0"], "invalid positive integer"),
    ],
)
def test_errors_are_one_line_and_status_2(content, arguments, words, tmp_path, capsys):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(file), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert words in error


def test_a_folder_without_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(f"the folder {str(tmp_path)!r} has no config.json\n")


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(
        group="console_scripts", name="microadam-memory"
    )
    assert command.load() is main


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit):
        main(["gpt2"])
    assert "pip install rich" in capsys.readouterr().err
