"""Training in several processes: the same losses, and a killed one changes nothing.

If it fails, a run in several processes is another one, or is lost when a process ends.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import few_optimizations

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "train_sharded.py"
SIZES = {"batch": 8, "length": 32, "width": 64, "depth": 1, "heads": 2}
FOUR = ("--processes", 2, "--devices", 2)
STEPS = 16
EVERY = 4
PATIENCE = 600  # seconds for a run, after which it counts as hanging
TRIES = 3  # of a test, where a process comes too late for another
WAITED = re.compile(r"^WARNING:absl:Waiting for previous save .*\n", re.MULTILINE)
LATE = re.compile(r"Gloo .*failed|DEADLINE_EXCEEDED")  # by half a minute


def start(*arguments):
    sizes = (f"--{name}={size}" for name, size in SIZES.items())
    command = [sys.executable, str(SCRIPT), *sizes, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = few_optimizations.environment()  # all runs are compiled alike
    return subprocess.Popen(command, text=True, env=environment, **pipes)


class TooLateError(Exception):
    """The machine is so busy that Gloo has given up."""


def patient(test):
    """Tries again where Gloo has given up, in a folder of its own."""

    @functools.wraps(test)
    def tried(tmp_path, **arguments):
        for number in range(TRIES):
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                return test(tmp_path=folder, **arguments)
            except TooLateError:
                continue
        return pytest.skip(f"{TRIES} times a process came too late for another")

    return tried


def output(process, status=0):
    """What a process has said that ended as it should."""
    out, _ = process.communicate(timeout=PATIENCE)
    if process.returncode != status and LATE.search(out):
        raise TooLateError(out)
    assert process.returncode == status, out
    return WAITED.sub("", out)  # what Orbax says on a slow disk


def run(folder, *arguments):
    """The loss at each step; nothing is said but the last one."""
    losses, out = curve_and_output(folder, "--quiet", *arguments)
    last = max(losses)
    assert out == f"loss {losses[last]:.4f} at step {last}\n"
    return losses


def curve_and_output(folder, *arguments):
    curve = folder / "curve.json"
    out = output(start("--curve", curve, *arguments))
    return dict(json.loads(curve.read_text())["loss"]), out


def children(process):
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()]


def kill_one_after_the_second_checkpoint(process, folder):
    while not (folder / str(2 * EVERY)).exists():
        assert process.poll() is None, output(process)
        time.sleep(0.02)
    os.kill(children(process)[1], signal.SIGKILL)
    return output(process, status=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.promotes
@pytest.mark.slow
@patient
def test_fsdp_killed_and_restarted(tmp_path):
    """The restart goes on from the checkpoint with the losses of an unbroken run."""
    unbroken = run(tmp_path, *FOUR, "--steps", STEPS)
    assert list(unbroken) == list(range(1, STEPS + 1))
    assert unbroken[STEPS] < 0.9 * unbroken[1]

    folder = tmp_path / "checkpoints"
    same = (*FOUR, "--steps", STEPS, "--checkpoints", folder, "--save-every", EVERY)
    broken = start(*same)
    out = kill_one_after_the_second_checkpoint(broken, folder)
    assert "process 1 ended with SIGKILL" in out
    rest, out = curve_and_output(tmp_path, *same)
    assert 2 * EVERY < min(rest) <= STEPS
    assert min(rest) % EVERY == 1
    assert rest == {step: unbroken[step] for step in rest}
    # It says what takes its time, and how far it is.
    assert f"from step {min(rest) - 1}\ncompiling the training step ... " in out
    assert f"{STEPS}/{STEPS}" in out

    out = output(start(*same, "--window", 4), status=2)
    assert "was made with `window` 2, but this transformation has `window` 4" in out


@pytest.mark.promotes
@pytest.mark.slow
@patient
def test_two_devices_in_two_processes_or_in_one(tmp_path):
    """The sum of two gradients has no order, so here the losses are equal."""
    shared = ("--steps", 10, "--parallel", "zero", "--window", 1)
    alone = (*shared, "--processes", 1, "--devices", 2)
    alone += ("--checkpoints", tmp_path / "alone", "--save-every", 7)
    both = run(tmp_path, *shared, "--processes", 2, "--devices", 1)
    curves = [both, run(tmp_path, *alone)]
    assert curves[0] == curves[1]
    assert all(a != b for a, b in itertools.pairwise(curves[0].values()))
    # The last step is saved whatever divides it, and the same command has no more to do.
    assert output(start(*alone)) == "already at step 10 of 10; nothing to do\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 7], "--batch 7 is not a multiple of the 8 devices"),
        (
            ["--checkpoints", f"{__file__}/saved"],
            f"--checkpoints: cannot write in {__file__}/saved: Not a directory",
        ),
        (
            ["--curve", "/proc/curve.json"],
            "--curve: cannot write /proc/curve.json: No such file or directory",
        ),
    ],
)
@pytest.mark.slow
def test_errors_are_one_line(arguments, message):
    out = output(start(*arguments), status=2)
    assert out == f"train_sharded.py: error: {message}\n"
