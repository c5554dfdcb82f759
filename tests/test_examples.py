"""The main job, from its command line: what it prints, writes and refuses."""

import re

import numpy as np
import pytest

import pure_bfloat16
import train_lm

SIZES = {"steps": 12, "batch": 4, "length": 32, "width": 32, "depth": 1, "heads": 2}
SMALL = ["--quiet", *(f"--{name}={size}" for name, size in SIZES.items())]


def run(tmp_path, *arguments):
    plot = tmp_path / "loss.png"
    assert train_lm.main([*SMALL, "--plot", str(plot), *arguments]) == 0
    return plot


@pytest.mark.parametrize("optimizer", ["microadam", "adamw"])
@pytest.mark.promotes
def test_it_trains_on_files_and_draws(optimizer, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    plot = run(tmp_path, "--data", str(text), "--optimizer", optimizer)
    out = capsys.readouterr().out
    held, adam = (
        int(number.replace(",", ""))
        for number in re.search(r"state: \w+ ([\d,]+) bytes.*Adam ([\d,]+)", out).groups()
    )
    assert held < 0.2 * adam if optimizer == "microadam" else held >= adam
    assert re.search(r"validation loss \d\.\d+ nats a byte, unigram model \d\.\d+", out)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.promotes
def test_diagnostics_are_drawn(tmp_path, capsys):
    plot = run(tmp_path, "--log-diagnostics", "--window", "3")
    assert plot.with_stem("loss_health").read_bytes().startswith(b"\x89PNG")
    assert "diagnostics: " in capsys.readouterr().out


@pytest.mark.promotes
def test_it_learns():
    """Beats the unigram model on text with structure."""
    text = np.frombuffer(b"abcdefgh" * 400, np.uint8)
    parser = train_lm.make_parser("")
    args = parser.parse_args([*SMALL, "--steps", "80", "--learning-rate", "1e-2"])
    curves = train_lm.train(args, text)
    assert curves["validation"][-1][1] < 0.8 * curves["unigram"][0]


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
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x" * 40)
    with pytest.raises(SystemExit) as stopped:
        train_lm.main([*SMALL, *arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.promotes
def test_pure_bfloat16(capsys):
    sizes = {"steps": 40, "batch": 4, "length": 16, "width": 16, "depth": 1}
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    assert (
        pure_bfloat16.main(["--quiet", "--window=1", "--learning-rate=1e-4", *arguments])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    shares = [int(re.search(r"(\d+)% of late", line)[1]) for line in lines]
    assert shares[0] == 0
    assert min(shares[1:]) > 50
