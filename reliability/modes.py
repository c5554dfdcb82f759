"""The tests in jax's strict modes, one after another.

python reliability/modes.py    # with the jax that is installed; an hour and a half

Warnings are errors in every run (pyproject.toml). Left out of a mode are the tests with
the mark of what it forbids, since they do it on purpose or have optax do it.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402

RESULT = ROOT / "reliability" / "results" / "modes.json"
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
ONE_DEVICE = (
    "adam",
    "apply",
    "dense",
    "determinism",
    "diagnostics",
    "errors",
    "fuzz",
    "hostile",
    "invariants",
    "memory",
    "optax_contract",
    "oracle",
    "parts",
    "trees",
)
PARTS = {
    "the optimizer on one device": [x for x in TESTS if x.stem[5:] in ONE_DEVICE],
    "meshes, checkpoints, kernels, examples, benchmarks": [
        x for x in TESTS if x.stem[5:] not in ONE_DEVICE
    ],
}


class Mode(NamedTuple):
    """What sets it, and the mark of the tests that it forbids."""

    variable: str
    value: str
    mark: str = ""


MODES = {
    "jax_enable_checks": Mode("JAX_ENABLE_CHECKS", "1"),
    "jax_debug_nans": Mode("JAX_DEBUG_NANS", "1", "makes_nan"),
    "jax_numpy_dtype_promotion=strict": Mode(
        "JAX_NUMPY_DTYPE_PROMOTION", "strict", "promotes"
    ),
}


def pytest(
    mode: Mode, tests: list[str], workers: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--tb=short"]
    command += ["-m", f"not {mode.mark}" if mode.mark else ""]  # the slow ones, too
    env = {**os.environ, mode.variable: mode.value}
    return subprocess.run(
        [*command, *tests], cwd=ROOT, env=env, capture_output=True, text=True
    )


def count(what: str, done: subprocess.CompletedProcess[str]) -> int:
    return int((re.findall(rf"(\d+) {what}", done.stdout) or ["0"])[-1])


def passed(mode: Mode, files: list[pathlib.Path], workers: str) -> dict[str, Any]:
    """How many tests pass, and which of them only alone: processes have time limits."""
    began = time.monotonic()
    done = pytest(mode, [str(x) for x in files], workers)
    alone = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    number = count("passed", done)
    if done.returncode:
        again = pytest(mode, alone, "0") if alone else done
        if again.returncode:
            said = done.stdout + done.stderr + again.stdout
            raise SystemExit(f"{mode.variable}={mode.value}\n{said}")
        number += count("passed", again)
    seconds = round(time.monotonic() - began)
    return {"passed": number, "alone": alone, "seconds": seconds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(MODES), help="this mode alone")
    parser.add_argument("--part", choices=list(PARTS), help="these tests alone")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    machine = common.machine()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    own = found.setdefault(machine["jax"], {"machine": machine, "modes": {}})
    for name in [args.only] if args.only else MODES:
        for part in [args.part] if args.part else PARTS:
            one = passed(MODES[name], PARTS[part], args.workers)
            own["modes"].setdefault(name, {})[part] = one
            print(f"{name}, {part}: {one}", flush=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
