"""The tests of the optimizer on one device in jax's strict modes, one after another.

python reliability/modes.py    # with the jax that is installed; half an hour

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
FILES = (
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


def passed(mode: Mode, workers: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--tb=short"]
    if mode.mark:
        command += ["-m", f"not {mode.mark}"]
    env = {**os.environ, mode.variable: mode.value}
    began = time.monotonic()
    command += [f"tests/test_{name}.py" for name in FILES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode.variable}={mode.value}\n{done.stdout}{done.stderr}")
    number = re.findall(r"(\d+) passed", done.stdout)[-1]
    return {"passed": int(number), "seconds": round(time.monotonic() - began)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(MODES), help="this mode alone")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    machine = common.machine()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    own = found.setdefault(machine["jax"], {"machine": machine, "modes": {}})
    for name in [args.only] if args.only else MODES:
        own["modes"][name] = passed(MODES[name], args.workers)
        print(f"{name}: {own['modes'][name]}", flush=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
