"""Builds wheel and sdist, installs each into an empty environment and tests it there.

python reliability/installed.py    # needs `pip install build`; some minutes

The tests run in a folder outside of the source tree that holds everything but the
package, so that they can only import what was installed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402

RESULT = ROOT / "reliability" / "results" / "installed.json"
TESTS = (
    "tests/test_adam.py",
    "tests/test_oracle.py",
    "tests/test_trees.py",
    "tests/test_errors.py",
    "tests/test_memory.py",
)
BESIDE = ("tests", "examples", "benchmarks", "reliability", "docs", "README.md")


def run(*command: Any, **kwargs: Any) -> str:
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, check=False, **kwargs
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def test_installed(package: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """In an environment of its own: first alone, then with what the tests need."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", package)
    alone = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    run(python, "-m", "pip", "install", "--quiet", f"{package}[test,examples]")
    outside = folder / "outside"
    outside.mkdir()
    for name in BESIDE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, outside / name)
    project = (ROOT / "pyproject.toml").read_text()
    (outside / "pyproject.toml").write_text(project)
    where = run(
        python, "-c", "import microadam_optax as m; print(m.__file__)", cwd=outside
    )
    assert str(folder / "env") in where, where
    env = {x: y for x, y in os.environ.items() if x != "PYTHONPATH"}
    out = run(python, "-m", "pytest", "-q", *TESTS, cwd=outside, env=env)
    return {
        "installed_alone": sorted(f"{x['name']} {x['version']}" for x in alone),
        "tests": out.strip().splitlines()[-1],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": common.machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
        for package in sorted((folder / "dist").iterdir()):
            kind = "wheel" if package.suffix == ".whl" else "sdist"
            (folder / kind).mkdir()
            began = time.monotonic()
            result[kind] = test_installed(package, folder / kind)
            result[kind]["seconds"] = round(time.monotonic() - began)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
