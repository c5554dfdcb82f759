"""The main job, from its command line: what it prints, writes and refuses.

If it fails, the command line of the main example does not say what is wrong.
"""

import itertools
import re
import types

import numpy as np
import pytest

import command_line
import pure_bfloat16
import train_lm
from few_optimizations import few_optimizations

SIZES = {"steps": 12, "batch": 4, "length": 32, "width": 32, "depth": 1, "heads": 2}
SMALL = [f"--{name}={size}" for name, size in SIZES.items()]


def run(tmp_path, *arguments):
    plot = tmp_path / "loss.png"
    with few_optimizations():
        assert train_lm.main([*SMALL, "--plot", str(plot), *arguments]) == 0
    return plot


def fake_clock(monkeypatch):
    """A step takes a tick, an evaluation many; the one speed that is to be shown."""
    clock = itertools.count()
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
    evaluate = train_lm.evaluate

    def slow(*arguments):
        list(itertools.islice(clock, 1000))
        return evaluate(*arguments)

    monkeypatch.setattr(train_lm, "time", fake)
    monkeypatch.setattr(train_lm, "evaluate", slow)
    return {f"{SIZES['batch'] * SIZES['length']:,}"}


@pytest.mark.promotes
@pytest.mark.slow
def test_it_learns_a_file_and_draws(tmp_path, capsys, monkeypatch):
    """Beats the unigram model on text with structure."""
    speeds = fake_clock(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    # So wide that most of it is not in small leaves, which are dense.
    wide = ("--width", "64")
    long = ("--steps", "80", "--learning-rate", "1e-2")
    drawn = ("--log-diagnostics", "--window", "3")
    plot = run(tmp_path, "--data", str(text), *wide, *long, *drawn)
    out, err = capsys.readouterr()
    assert re.match(r"compiling the training step \.\.\. \d+\.\d s\n", err)
    assert set(re.findall(r"([\d,]+) tokens/s", err)) == speeds
    held, adam = (
        int(number.replace(",", ""))
        for number in re.search(r"state: \w+ ([\d,]+) bytes.*Adam ([\d,]+)", out).groups()
    )
    assert held < 0.2 * adam
    said = re.search(r"validation loss (\d\.\d+) nats a byte, unigram model (.*)", out)
    assert float(said[1]) < 0.8 * float(said[2])
    for picture in (plot, plot.with_stem("loss_health")):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.promotes
@pytest.mark.slow
def test_with_adamw_and_quiet(tmp_path, capsys):
    plot = run(tmp_path, "--optimizer", "adamw", "--quiet")
    assert plot.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert err == ""
    assert re.fullmatch(r"validation loss \d\.\d+ nats a byte, unigram .*\n", out)


def test_embedded_text_and_its_unigram_loss():
    text = train_lm.load_text([])
    assert len(text) > 300_000
    train, held_out = train_lm.split_text(text, 128)
    assert held_out.shape[1] == 129
    assert train.size + held_out.size <= len(text)
    uniform = np.arange(256, dtype=np.uint8)
    assert train_lm.unigram_loss(uniform, uniform[None]) == pytest.approx(np.log(256))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: invalid positive int value: '0'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--log-diagnostics", "--optimizer", "adamw"], "is for --optimizer microadam"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--heads", "3"], "--width 32 is not a multiple of --heads 3"),
        (["--density", "2"], "`density` must be a number in (0, 1], got 2.0."),
        (["--data", "missing.txt"], "cannot read missing.txt: No such file or directory"),
        (["--data", "."], "cannot read .: Is a directory"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "short.txt"], "the text has 40 bytes; training and held-out"),
        (["--plot", "no/loss.png"], "--plot: cannot write no/loss.png: No such file"),
        (["--plot", "empty.txt/loss.png"], "empty.txt/loss.png: Not a directory"),
        (["--plot", "folder.png"], "cannot write folder.png: Is a directory"),
        (["--plot", "loss"], "--plot: loss must end in a dot and one of "),
        (["--plot", "a.png", "--log-diagnostics"], "write a_health.png: Is a directory"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x" * 40)
    for folder in ("folder.png", "a_health.png"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(train_lm, "train", lambda *_: pytest.fail("it began"))
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        train_lm.main([*SMALL, *arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert set(tmp_path.iterdir()) == before


def test_a_file_that_is_there_is_only_tried(tmp_path):
    parser, file = command_line.Parser(), tmp_path / "loss.png"
    command_line.check_picture(parser, "--plot", file)
    assert not file.exists()
    file.write_bytes(b"before")
    command_line.check_picture(parser, "--plot", file)
    assert file.read_bytes() == b"before"


@pytest.mark.promotes
@pytest.mark.slow
def test_pure_bfloat16(capsys):
    sizes = {"steps": 40, "batch": 4, "length": 16, "width": 64, "depth": 1}
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    fixed = ["--quiet", "--window=1", "--learning-rate=1e-4"]
    with few_optimizations():
        assert pure_bfloat16.main([*fixed, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    shares = [int(re.search(r"(\d+)% of late", line)[1]) for line in lines]
    assert shares[0] == 0
    assert min(shares[1:]) > 50
