"""What the package depends on, reads and connects to."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RUNTIME = {"jax", "optax"}
WITH_JAX = {"numpy"}  # jax itself requires it
OPTIONAL = {  # the extras `planner` and `cpu`, and the files that may want them
    "rich": {"_planner.py"},
    "numba": {"cpu.py", "cpu_block.py", "cpu_call.py", "cpu_llvm.py"},
    "llvmlite": {"cpu_call.py", "cpu_llvm.py"},  # numba requires it
}
UNSAFE = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch",
}
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def sources(*folders):
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def imported(file):
    """Top-level names of all modules that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_the_package_requires_jax_and_optax_alone():
    required = importlib.metadata.requires("microadam-optax")
    always = [x for x in required if "extra ==" not in x]
    assert sorted(always) == ["jax>=0.10.2", "optax>=0.2.8"]  # what CI's oldest run has


def test_the_package_imports_nothing_else():
    for file in sources("microadam_optax"):
        for name in imported(file):
            known = name in sys.stdlib_module_names | RUNTIME | WITH_JAX
            optional = file.name in OPTIONAL.get(name, ())
            assert known or optional or name == "microadam_optax", (file, name)


@pytest.mark.parametrize("folder", ["microadam_optax", "examples"])
def test_nothing_loads_pickles(folder):
    for file in sources(folder):
        assert not UNSAFE & set(imported(file)), file
        assert "allow_pickle" not in file.read_text(), file


@pytest.mark.promotes
def test_no_network_when_it_runs():
    code = NO_NETWORK + (
        "import jax.numpy as jnp, microadam_optax as m\n"
        "from microadam_optax import memory\n"
        "tx = m.microadam(0.1, dense=m.smaller_than(4))\n"
        "params = {'w': jnp.ones(300), 'b': jnp.ones(2)}\n"
        "updates, state = tx.update(params, tx.init(params), params)\n"
        "print(memory.optimizer_bytes(tx, params), sorted(updates))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "['b', 'w']" in run.stdout


@pytest.mark.promotes
def test_the_example_needs_no_network(tmp_path):
    script = ROOT / "examples" / "train_lm.py"
    sizes = ["--steps=2", "--width=16", "--depth=1", "--heads=1", "--length=16"]
    code = NO_NETWORK + (
        "import runpy\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n"
        f"sys.argv = {[str(script), *sizes]!r}\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "no network" not in run.stderr
    assert run.returncode == 0, run.stderr
