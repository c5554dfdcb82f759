"""The program that fine-tunes a Llama, on a small one with random weights.

If it fails, hours of training end in a traceback, or go on as another run.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import docstrings
import few_optimizations
import finetune_llama
import instructions
import llama_training
import small_llama

PAIRS = [
    {"prompt": f"{a} and {b} make", "completion": f" {a + b}"}
    for a in range(6)
    for b in range(6)
]
FIXED = ["--model=model", "--data=pairs.jsonl", "--steps=4", "--batch=4", "--length=24"]
FIXED += ["--learning-rate=0.01"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_llama.write(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def quickly():
    """For runs of which none is compared with another that is compiled otherwise."""
    with few_optimizations.few_optimizations():
        yield


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """Where a user is, with his data."""
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(lines)
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(300))))
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, quiet=True):
    return finetune_llama.main([*FIXED, *["--quiet"] * quiet, *arguments])


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def assert_same_bits(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def losses_in(text):
    found = re.search(r"held-out loss (\d\.\d+) before, (\d\.\d+) after", text)
    return float(found[1]), float(found[2])


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_it_learns_says_so_saves_and_draws(folder, model, capsys):
    run("--save=out", "--plot=out/loss.png", "--steps=8", quiet=False)
    out, err = capsys.readouterr()
    before, after = losses_in(out)
    assert before == pytest.approx(np.log(258), abs=0.5)
    assert after < before - 1
    number = sum(x.size for x in weights(model).values())
    assert f"{number:,} float32 parameters of {folder / 'model'}" in out
    assert "34 rows of pairs to train on, 2 held out; 8 steps of 4 rows" in out
    assert len(re.findall(r"  \.\.\. \d and \d make\n    model: ", out)) == 4
    assert re.search(r"    data: \d+\n", out)
    assert re.search(r"compiling the training step \.\.\. \d+\.\d s\n", err)
    assert re.search(r"8/8 .*loss \d\.\d+, [\d,]+ tokens/s, \d+\.\d GB", err)
    assert (folder / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert out.index("model: out") < out.index("loss curve: out/loss.png")
    moved = {k: np.abs(x - weights(model)[k]).max() for k, x in weights("out").items()}
    assert min(moved.values()) > 0  # all parameters


@pytest.mark.parametrize(
    "more",
    [
        ["--dtype=bfloat16"],
        ["--optimizer=adamw", "--accumulate=2"],
    ],
    ids=" ".join,
)
@pytest.mark.slow
@pytest.mark.usefixtures("folder", "quickly")
def test_layer_by_layer_is_the_ordinary_run_to_the_bit(more):
    run("--save=ordinary", *more)
    run("--save=layers", "--layerwise", *more)
    assert_same_bits("ordinary", "layers")


@pytest.fixture
def cut_short(monkeypatch):
    """A run that is interrupted after two of its steps."""

    def interrupted(*arguments):
        def step_once(args, step, run, rows, put, once=llama_training.step_once):
            if run.step == 2:
                raise KeyboardInterrupt
            return once(args, step, run, rows, put)

        with monkeypatch.context() as patched:
            patched.setattr(llama_training, "step_once", step_once)
            with pytest.raises(SystemExit) as stopped:
                run(*arguments)
            assert stopped.value.code == 130

    return interrupted


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer=adamw"],
        pytest.param(
            ["--accumulate=3", "--layerwise", "--dtype=bfloat16"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("folder", "quickly")
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(more, cut_short, capsys):
    kept = ["--checkpoints=kept", "--checkpoint-every=2"]
    run("--save=whole", *more)
    whole = capsys.readouterr().out
    cut_short(*kept, *more)
    said = "interrupted; the same command goes on after 2 steps\n"
    assert capsys.readouterr().err.endswith(said)
    run("--save=resumed", *kept, *more)
    assert capsys.readouterr().out == whole  # the losses before and after
    assert_same_bits("whole", "resumed")
    run("--save=again", *kept, *more)  # of the run that has ended
    assert capsys.readouterr().out == whole
    assert_same_bits("whole", "again")
    with pytest.raises(SystemExit) as stopped:
        run(*kept, *more, "--seed=1")
    assert stopped.value.code == 2
    words = "the run in kept began with --seed 0, this one with --seed 1: "
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_other_data_and_a_damaged_checkpoint_are_named(folder, capsys):
    run("--checkpoints=kept", "--checkpoint-every=2")
    before = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text(before + json.dumps(PAIRS[0]) + "\n")
    with pytest.raises(SystemExit):
        run("--checkpoints=kept", "--checkpoint-every=2")
    words = "the run in kept began with --data of the fingerprint"
    assert words in capsys.readouterr().err
    (folder / "pairs.jsonl").write_text(before)
    for file in (folder / "kept" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        run("--checkpoints=kept", "--checkpoint-every=2")
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "kept/4 cannot be read: move it away to go on from step 2" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("optimizer", ["microadam", "adamw", "adafactor", "lion"])
@pytest.mark.promotes
@pytest.mark.slow
@pytest.mark.usefixtures("folder", "quickly")
def test_each_optimizer_learns_at_its_own_rate(optimizer, capsys):
    """In the same steps, micro-batches of 2 come to what batches of 4 come to."""
    rate = str(10 * finetune_llama.llama_optimizers.LEARNING_RATE[optimizer])
    text = ["--data=numbers.txt", "--optimizer", optimizer, "--learning-rate", rate]
    run(*text, "--steps=12")
    if optimizer == "microadam":
        run(*text, "--steps=12", "--batch=2", "--accumulate=2")
    one, *other = (losses_in(x) for x in capsys.readouterr().out.splitlines())
    assert one[1] < one[0] - 0.2
    assert other == [pytest.approx(one, abs=0.02)] * (optimizer == "microadam")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_a_saved_model_goes_on_from_what_it_has_learned(folder, tied, capsys):
    small_llama.write(folder / "start", tie_word_embeddings=tied)
    run("--model=start", "--save=first")
    run("--model=first", "--save=second", "--dtype=bfloat16", "--optimizer=adamw")
    first, second = (losses_in(x) for x in capsys.readouterr().out.splitlines())
    assert second[0] == pytest.approx(first[1], abs=0.02)  # bfloat16 has 8 bits
    assert second[1] < second[0]
    assert {str(x.dtype) for x in weights("second").values()} == {"bfloat16"}


@pytest.mark.makes_nan
@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_a_run_that_diverges_ends_with_one_line(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--learning-rate=1e30", "--save=out", "--optimizer=adamw")
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is (nan|inf) at step 2; a smaller --lea", error)
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.makes_nan
@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_what_diverges_in_its_last_step_is_not_kept(folder, capsys):
    """The loss of a step is of the parameters before it; those after it are finite."""
    adamw = ["--optimizer=adamw"]
    with pytest.raises(SystemExit):
        run("--learning-rate=1e30", "--checkpoints=kept", "--steps=1", *adamw)
    error = capsys.readouterr().err
    assert "after 1 step; a smaller --learning-rate than 1e+30 may help" in error
    assert not (folder / "kept" / "1").exists()
    # At another rate, for nothing is there.
    run("--checkpoints=kept", "--steps=1", *adamw)


@pytest.mark.slow
@pytest.mark.usefixtures("folder", "quickly")
def test_eight_devices_make_the_losses_of_one(capsys):
    run()
    found = [losses_in(capsys.readouterr().out)]
    command = [sys.executable, finetune_llama.__file__, *FIXED, "--quiet"]
    for more in (["--mesh=fsdp=8"], ["--mesh=fsdp=8", "--layerwise", "--batch=8"]):
        done = subprocess.run(
            [*command, *more],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=few_optimizations.environment(),
        )
        found.append(losses_in(done.stdout))
    assert found[1] == pytest.approx(found[0], abs=2e-4)
    assert found[2][0] == pytest.approx(found[0][0], abs=2e-4)
    assert found[2][1] < found[2][0] - 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps=0"], "--steps: invalid positive int value: '0'"),
        (["--mesh=8"], "argument --mesh: expected fsdp=N, got '8'"),
        (["--layerwise", "--optimizer=adafactor"], "--layerwise: adafactor scales"),
        (["--length=65"], "--length 65 is more than the model's 64 positions"),
        (["--model=nowhere"], "--model: nowhere is neither a folder nor a file"),
        (["--data=nowhere"], "--data: cannot read nowhere: No such file or directory"),
        (["--data=full"], "--data: cannot read full: Is a directory"),
        (["--data=empty.txt"], "empty.txt is empty"),
        (["--data=short.txt"], "give more text or a smaller --length"),
        (["--data=one.jsonl"], "one.jsonl makes 1 row of 24 tokens, and 2 are the"),
        (["--data=noise.txt"], "noise.txt is no UTF-8 text: byte 1"),
        (["--data=bad.jsonl"], "bad.jsonl, line 2: no JSON: Expecting"),
        (["--data=pretty.json"], "line 1: no JSON: Expecting value (one object a line"),
        (["--data=half.jsonl"], "half.jsonl, line 1: expected an object with the texts"),
        (
            ["--batch=35"],
            "pairs.jsonl: there are 34 rows to train on, fewer than --batch",
        ),
        (["--learning-rate=inf"], "invalid positive float value: 'inf'"),
        (["--save=full"], "--save: full is not empty"),
        (["--save=empty.txt"], "--save: empty.txt is no folder"),
        (["--checkpoints=empty.txt"], "--checkpoints: empty.txt is no folder"),
        (["--checkpoints=mine"], "mine/run.json is of another program: choose"),
        (["--save=new/../two", "--data=nowhere"], "--data: cannot read nowhere"),
        (["--save=a/b/" + 300 * "c"], "File name too long"),
        (["--model=" + 300 * "m"], "is neither a folder nor a file"),
        (["--save=new", "--data=nowhere"], "--data: cannot read nowhere"),
        (["--save=a/b", "--checkpoints=a"], "--save a/b and --checkpoints a must lie"),
        (["--checkpoints=full"], "full is not empty and has no run.json"),
        (["--plot=loss"], "--plot: loss must end in a dot and one of "),
        (["--plot=loss.pgf"], "--plot: loss.pgf must end in a dot and one of "),
    ],
)
def test_errors_are_one_line_before_anything_is_trained(
    folder, arguments, words, capsys, monkeypatch
):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("some words")
    (folder / "noise.txt").write_bytes(b"a\xff")
    (folder / "bad.jsonl").write_text('{"prompt": "", "completion": "x"}\n{')
    (folder / "half.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "one.jsonl").write_text(json.dumps(PAIRS[0]))
    (folder / "pretty.json").write_text(json.dumps(PAIRS, indent=1))
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine" / "run.json").write_text("[1]")
    monkeypatch.setattr(finetune_llama, "fine_tune", lambda *_: pytest.fail("it began"))
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert [x.name for x in (folder / "full").iterdir()] == ["file"]
    assert sorted(folder.iterdir()) == before


@pytest.mark.usefixtures("folder")
def test_an_interruption_before_it_trains_is_one_line(capsys, monkeypatch):
    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_llama.llama_files, "load", load)
    with pytest.raises(SystemExit) as stopped:
        run("--checkpoints=kept")
    assert stopped.value.code == 130
    assert re.fullmatch(r".*: interrupted\n", capsys.readouterr().err)


def encoder(length, begin=(256,)):
    return instructions.Encoder(small_llama.tokenizer(), list(begin), [257], length)


def test_what_counts_of_a_pair_is_its_completion():
    pairs = [instructions.Pair("ab", "cd"), instructions.Pair("abcdefgh", "xyz")]
    rows, cut = instructions.encode_pairs(pairs, encoder(7))
    ids = small_llama.tokenizer().token_to_id
    want = [[256, *map(ids, "abcd"), 257, 0, 0], [256, *map(ids, "fghxyz"), 257]]
    want[1] = [256, *map(ids, "fghxyz"), 257][:8]
    np.testing.assert_array_equal(rows.tokens, want)
    np.testing.assert_array_equal(
        rows.weights, [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    )
    assert cut.tolist() == [False, True]
    assert instructions.used(rows) == 5 + 7


@pytest.mark.parametrize("begin", [(), (256,)])
def test_every_token_of_a_text_is_predicted_once(begin):
    text = "a text of some words that is longer than a row"
    rows = instructions.encode_text(text, encoder(10, begin))
    counted = rows.tokens[:, 1:][rows.weights > 0]
    said = small_llama.tokenizer().decode(counted.tolist())
    assert said == (text if begin else text[1:])


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("a.JSONL", '{"prompt": "a"}', 'there is no "completion", but "prompt"'),
        ("a.jsonl", '["a", "b"]', "line 1: expected an object .*, got a list"),
        ("a.jsonl", '{"prompt": "a", "completion": ""}', '"completion" is empty'),
        (
            "a.jsonl",
            '{"prompt": "\\ud83d", "completion": "b"}',
            "line 1: half a char",
        ),
        ("a.jsonl", "[" * 50_000, "line 1: no JSON"),
        (
            "a.jsonl",
            '\ufeff{"prompt": 1, "completion": "b"}',
            'line 1: expected an object .*; "prompt" is no text',
        ),
    ],
)
def test_lines_that_are_no_pairs_are_named(tmp_path, name, line, words):
    (tmp_path / name).write_text(line, "utf-8")
    with pytest.raises(ValueError, match=words):
        instructions.load(tmp_path / name, encoder(7), 0, False)


def test_rows_are_drawn_by_the_seed_and_each_once_before_one_twice():
    rows = instructions.Batch(np.arange(14).reshape(7, 2), np.ones((7, 1)))
    found = [instructions.batch_at(rows, i, 3, seed=4).tokens[:, 0] for i in range(7)]
    drawn = np.concatenate(found).reshape(3, 7)
    np.testing.assert_array_equal(np.sort(drawn), [np.arange(0, 14, 2)] * 3)
    assert (drawn[0] != drawn[1]).any()
    other = instructions.batch_at(rows, 0, 3, seed=5).tokens[:, 0]
    assert (found[0] != other).any()


def test_held_out_rows_come_from_all_of_the_data(folder):
    text = folder / "numbers.txt"
    text.write_text(" ".join(map(str, range(3000))))
    chosen = [instructions.load(text, encoder(20), seed, False) for seed in (0, 0, 1)]
    firsts = [x.held_out.tokens[:, 1:] for x in chosen]
    np.testing.assert_array_equal(firsts[0], firsts[1])
    assert firsts[0].shape == firsts[2].shape == (32, 20)
    assert (firsts[0] != firsts[2]).any()
    every = {tuple(x) for part in chosen[0][:2] for x in part.tokens}
    assert len(every) == len(chosen[0].train.tokens) + 32  # none is on both sides


def test_docstrings_become_their_first_lines_divided_by_module(tmp_path, monkeypatch):
    more = "It does so with care, for as long as it takes, and returns what it has found "
    for number in range(40):
        text = f"Counts all things of kind {number}.\n\n{more * (2 + 2 * (number % 2))}"
        (tmp_path / f"m{number}.py").write_text(f'"""{text}\n"""\ndef f():\n  "No."\n')
    monkeypatch.setattr(docstrings, "PACKAGES", ())
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    monkeypatch.setattr(instructions, "HELD_OUT", 40)
    train, held_out = instructions.summaries()
    firsts = [x.completion for x in train + held_out]
    assert sorted(firsts) == sorted(f" Counts all things of kind {i}." for i in range(40))
    assert 2 <= len(held_out) <= 16
    assert all(x.prompt.startswith(more) for x in train)
    assert all(x.prompt.endswith("\n\nIn one line:") for x in train)
    longest = instructions.BODY[1] + len(" ...\n\nIn one line:")
    assert max(len(x.prompt) for x in train) == longest


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        finetune_llama.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("(default: 60)", "microadam 0.0001", "weigh equally", "SmolLM2"):
        assert words in text
    assert '{"prompt": "...", "completion": "..."}' in text
    assert "None" not in text
