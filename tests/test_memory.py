"""The memory planner: published parameter counts, bytes by arithmetic, clear errors."""

import importlib.metadata
import json
import math
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_optax import _planner, memory, microadam, smaller_than
from microadam_optax._models import MODELS, shapes_of

# As published with the models' weights; GPT-2's and Gemma's embedding counts once.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
}


def number_of(config):
    return sum(math.prod(shape) for shape in shapes_of(config).values())


@pytest.mark.parametrize("model", MODELS)
def test_parameter_counts_are_the_published_ones(model):
    assert number_of(MODELS[model]) == PUBLISHED[model]


def test_options_of_a_config():
    """Of Llama: biases, tied embeddings, a width of heads of its own."""
    plain = {**MODELS["llama3-8b"], "num_hidden_layers": 1}
    number = number_of(plain)
    assert number_of({**plain, "attention_bias": True}) == number + 2 * (4096 + 1024)
    assert number_of({**plain, "mlp_bias": True}) == number + 2 * 14336 + 4096
    tied = {**plain, "tie_word_embeddings": True}
    assert number_of(tied) == number - 4096 * 128256
    assert number_of({**plain, "head_dim": 256}) == number + 4096 * 128 * (2 * 32 + 2 * 8)
    many = {**plain, "num_key_value_heads": None}
    assert number_of(many) == number + 2 * 4096 * (4096 - 1024)


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
    expected = 64 * 2048 // 256 * (128 + 4) + count + 8 * 256 + count
    assert memory.optimizer_bytes(dense, params) == expected
    accumulated = optax.MultiSteps(dense, 2).gradient_transformation()
    more = memory.optimizer_bytes(accumulated, params) - expected
    assert 4 * (64 * 2048 + 256) <= more <= 4 * (64 * 2048 + 256) + 16


def run(capsys, *arguments):
    assert _planner.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["optimizer"]: row for row in found["bytes_a_device"]}
    return found, rows


def test_a_plan(capsys):
    found, rows = run(capsys, "llama2-7b", "--gradients-dtype", "float32")
    number = PUBLISHED["llama2-7b"]
    assert found["parameters"] == number
    adam, ours = rows["Adam"], rows["MicroAdam (2, 6 %), 4 bits"]
    assert adam["parameters"] == 2 * number
    assert adam["gradients"] == 4 * number
    assert adam["state"] == 8 * number + 4
    assert rows["Adam, mu in bfloat16"]["state"] == 6 * number + 4
    assert rows["Lion"]["state"] == 4 * number + 4
    assert 0.70 < ours["state"] / number < 0.71
    assert ours["sum"] == sum(ours[x] for x in ("parameters", "gradients", "state"))
    assert adam["fits_gb"] == [141]
    assert ours["fits_gb"] == [80, 141]


def test_a_plan_for_many_devices(capsys):
    _, whole = run(capsys, "bert-base", "--params-dtype", "float32")
    _, parts = run(capsys, "bert-base", "--params-dtype", "float32", "--devices", "8")
    for name, row in whole.items():
        if "Adafactor" not in name and "GaLore" not in name:  # theirs are replicated
            assert parts[name]["state"] == pytest.approx(row["state"] / 8, rel=0.01)
        assert parts[name]["parameters"] == pytest.approx(row["parameters"] / 8, rel=0.01)


def test_the_arguments_of_microadam_count(capsys):
    arguments = ["--window", "2", "--density", "0.12", "--error-bits", "8"]
    _, rows = run(capsys, "gpt2", *arguments, "--block-size", "64")
    _, dense = run(capsys, "gpt2", *arguments, "--dense-below", "4096")
    name = "MicroAdam (2, 12 %), 8 bits"
    assert rows[name]["state"] > 1.3 * PUBLISHED["gpt2"]
    assert dense[name]["state"] > 1.3 * PUBLISHED["gpt2"]


def test_a_config_file_or_its_folder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["gpt2"]))
    for path in (tmp_path, tmp_path / "config.json"):
        assert run(capsys, str(path))[0]["parameters"] == PUBLISHED["gpt2"]


def test_the_table(capsys):
    assert _planner.main(["llama2-7b", "--devices", "4"]) == 0
    text = capsys.readouterr().out
    assert "6,738,415,616 parameters, bfloat16, 4 devices" in text
    (line,) = (x for x in text.splitlines() if "MicroAdam" in x)
    assert line.split()[-7:] == ["3.37", "3.37", "1.19", "7.93", "0.705", "16", "GB"]


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, [], "is neither a file nor one of llama2-7b"),
        ("{", [], "is not JSON"),
        ("[1]", [], "must hold a JSON object"),
        ('{"model_type": "t5"}', [], "model_type must be one of bert, gemma,"),
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
        _planner.main([str(file), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert words in error


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(
        group="console_scripts", name="microadam-memory"
    )
    assert command.load() is _planner.main


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit):
        _planner.main(["gpt2"])
    assert "pip install rich" in capsys.readouterr().err
