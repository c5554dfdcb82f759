"""Training in several processes: the same losses, and a killed one changes nothing."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "train_sharded.py"
SIZES = {"batch": 8, "length": 32, "width": 64, "depth": 1, "heads": 2}
STEPS = 20
EVERY = 4
PATIENCE = 600  # seconds for a run, after which it counts as hanging
CACHED = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def start(*arguments):
    sizes = (f"--{name}={size}" for name, size in SIZES.items())
    command = [sys.executable, str(SCRIPT), *sizes, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=CACHED
    )


def run(folder, *arguments):
    """The loss at each step; nothing is said but the last one."""
    curve = folder / "curve.json"
    process = start("--quiet", "--curve", curve, *arguments)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    losses = dict(json.loads(curve.read_text())["loss"])
    last = max(losses)
    assert out == f"loss {losses[last]:.4f} at step {last}\n"
    return losses


def children(process):
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()]


def kill_one_after_the_second_checkpoint(process, folder):
    while not (folder / str(2 * EVERY)).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(children(process)[1], signal.SIGKILL)
    return process.communicate(timeout=PATIENCE)[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.promotes
def test_fsdp_killed_and_restarted(tmp_path):
    """The restart goes on from the checkpoint with the losses of an unbroken run."""
    unbroken = run(tmp_path, "--steps", STEPS)
    assert list(unbroken) == list(range(1, STEPS + 1))
    assert unbroken[STEPS] < 0.9 * unbroken[1]

    folder = tmp_path / "checkpoints"
    same = ("--steps", STEPS, "--checkpoints", folder, "--save-every", EVERY)
    broken = start(*same)
    out = kill_one_after_the_second_checkpoint(broken, folder)
    assert broken.returncode == 1
    assert "process 1 ended with SIGKILL" in out
    rest = run(tmp_path, *same)
    assert 2 * EVERY < min(rest) <= STEPS
    assert min(rest) % EVERY == 1
    assert rest == {step: unbroken[step] for step in rest}

    refused = start(*same, "--window", 4)
    out, _ = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 2
    assert "was made with `window` 2, but this transformation has `window` 4" in out

    # Eight devices in one process add the gradients up in another order than the two
    # processes do: float32 rounding apart, carried through every step.
    once = ("--steps", STEPS, "--processes", 1, "--devices", 8)
    once += ("--checkpoints", tmp_path / "alone", "--save-every", 7)
    alone = run(tmp_path, *once)
    tolerance = STEPS * 8 * np.finfo(np.float32).eps
    np.testing.assert_allclose(
        list(alone.values()), list(unbroken.values()), rtol=tolerance
    )
    # The last step is saved whatever divides it, and the same command has no more to do.
    out, _ = start(*once).communicate(timeout=PATIENCE)
    assert out == f"already at step {STEPS} of {STEPS}; nothing to do\n"
    # With more to do it says what takes its time, and how far it is.
    more = start("--steps", STEPS + 1, *once[2:])
    out, _ = more.communicate(timeout=PATIENCE)
    assert f"from step {STEPS}\ncompiling the training step ... " in out
    assert f"{STEPS + 1}/{STEPS + 1}" in out


@pytest.mark.parametrize("parallel", ["data", "zero"])
@pytest.mark.promotes
def test_two_devices_in_two_processes_or_in_one(parallel, tmp_path):
    """The sum of two gradients has no order, so here the losses are equal."""
    shared = ("--steps", 10, "--parallel", parallel, "--window", 1)
    curves = [
        run(tmp_path, *shared, "--processes", processes, "--devices", devices)
        for processes, devices in [(2, 1), (1, 2)]
    ]
    assert curves[0] == curves[1]
    assert all(a != b for a, b in itertools.pairwise(curves[0].values()))


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
def test_errors_are_one_line(arguments, message):
    refused = start(*arguments)
    out, _ = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 2
    assert out == f"train_sharded.py: error: {message}\n"
