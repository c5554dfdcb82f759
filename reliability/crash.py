"""Kills examples/train_sharded.py at random moments and lets it go on.

python reliability/crash.py             # 20 kills, some minutes
python reliability/crash.py --kills 2 --steps 20

Half of the kills strike at a random time, half while a checkpoint is being written. Each
time the losses after the restart, and the last checkpoint with parameters and optimizer
state, must have the bits of a run that was not interrupted. Then the last checkpoint is
truncated, and replaced by a foreign one: both must be refused in one sentence, and then
the one before must load.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402

RESULT = ROOT / "reliability" / "results" / "crash.json"
SCRIPT = ROOT / "examples" / "train_sharded.py"
EVERY = 5  # steps to a checkpoint
SIZES = {"batch": 4, "length": 32, "width": 64, "depth": 1, "heads": 2, "window": 2}
OPTIONS = {"processes": 1, "devices": 2, "save-every": EVERY}


class Training:
    """The example with a folder for its checkpoints."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path, steps: int):
        self.checkpoints, self.curve = folder / "checkpoints", folder / "curve.json"
        self.steps = steps
        numbers = {**SIZES, **OPTIONS, "steps": steps, "checkpoints": self.checkpoints}
        flags = [f"--{name}={value}" for name, value in numbers.items()]
        script = [sys.executable, str(SCRIPT), "--quiet"]
        self.command = [*script, *flags, f"--curve={self.curve}"]
        self.env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command, env=self.env, **pipes)

    def finish(self) -> dict[int, float]:
        """Runs to the end; the losses of the steps that it did."""
        process = self.start()
        out, _ = process.communicate()
        assert process.returncode == 0, out
        return dict(json.loads(self.curve.read_text())["loss"])

    def refused(self) -> str:
        process = self.start()
        out, _ = process.communicate()
        assert process.returncode == 2, out
        (said,) = (x for x in out.splitlines() if ": error: " in x)
        return said  # after it, asyncio may complain of reads that were not awaited

    def saved(self) -> list[np.ndarray]:
        """All arrays of the last checkpoint."""
        with ocp.StandardCheckpointer() as checkpointer:
            path = (self.checkpoints / str(self.steps) / "default").absolute()
            tree = checkpointer.restore(path)
        return [np.asarray(x) for x in _leaves(tree)]

    def writing(self) -> bool:
        return any("tmp" in x.name for x in self.checkpoints.glob("*"))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [x for key in sorted(tree) for x in _leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [x for one in tree for x in _leaves(one)]
    return [] if tree is None else [tree]


def kill(training: Training, rng: random.Random, seconds: float, writing: bool) -> bool:
    """Kills a run at a random moment; whether a checkpoint was being written then."""
    process = training.start()
    moment = time.monotonic() + rng.uniform(0, seconds)
    if writing:  # at one of the first writes that begin after that moment
        while process.poll() is None:
            if time.monotonic() > moment and training.writing():
                break
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
    else:
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return training.writing()


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def kills(number: int, seed: int, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    rng, cache = random.Random(seed), folder / "cache"
    whole = Training(folder / "whole", cache, steps)
    whole.finish()  # fills the cache of compiled programs
    shutil.rmtree(whole.checkpoints)
    began = time.monotonic()
    losses = whole.finish()
    seconds, arrays = time.monotonic() - began, whole.saved()
    reached, amid = [], 0
    for trial in tqdm(range(number), desc="kills"):
        training = Training(folder / f"trial {trial}", cache, steps)
        amid += kill(training, rng, seconds, writing=trial % 2 == 1)
        rest = training.finish()
        assert rest == {step: losses[step] for step in rest}, f"trial {trial}: losses"
        assert same(training.saved(), arrays), f"trial {trial}: checkpoints"
        reached.append(min(rest, default=steps + 1) - 1)
        if trial < number - 1:
            shutil.rmtree(training.checkpoints)
    return {"kills": number, "amid_a_write": amid, "went_on_from_step": reached}


def damage(training: Training) -> dict[str, str]:
    """What is said of a truncated and of a foreign checkpoint."""
    steps, on = training.steps, training.steps - EVERY
    last, before = (training.checkpoints / str(x) for x in (steps, on))
    assert before.exists()
    files = [x for x in last.rglob("*") if x.is_file()]
    largest = max(files, key=lambda x: x.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    truncated = training.refused()
    assert f"to go on from step {on}" in truncated, truncated
    shutil.rmtree(last)
    with ocp.StandardCheckpointer() as checkpointer:
        path = (last / "default").absolute()
        checkpointer.save(path, {"weights": np.ones(3), "momentum": np.ones(3)})
    shutil.copy(before / "_CHECKPOINT_METADATA", last / "_CHECKPOINT_METADATA")
    foreign = training.refused()
    shutil.rmtree(last)
    assert min(training.finish()) == on + 1
    return {"truncated": truncated, "foreign": foreign}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help=f"a multiple of {EVERY}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    if args.kills < 1 or args.steps < 2 * EVERY or args.steps % EVERY:
        parser.error(f"one kill at least, and a multiple of {EVERY} steps, at least two")
    if jax.config.jax_num_cpu_devices < OPTIONS["devices"]:  # those of its checkpoints
        jax.config.update("jax_num_cpu_devices", OPTIONS["devices"])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        found = kills(args.kills, args.seed, folder, args.steps)
        name_of_last = f"trial {args.kills - 1}"
        last = Training(folder / name_of_last, folder / "cache", args.steps)
        said = {what: x.replace(name, "...") for what, x in damage(last).items()}
    result = {"machine": common.machine(), **found, "refused": said}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
