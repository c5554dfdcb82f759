"""What the package connects to.

If it fails, training needs a network.
"""

import pathlib
import subprocess
import sys

import pytest

from few_optimizations import environment

ROOT = pathlib.Path(__file__).parents[1]
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.mark.promotes
def test_no_network_when_it_runs():
    code = NO_NETWORK + (
        "import jax, jax.numpy as jnp, microadam_optax as m\n"
        "from microadam_optax import memory\n"
        "tx = m.microadam(0.1, dense=m.smaller_than(4))\n"
        "params = {'w': jnp.ones(300), 'b': jnp.ones(2)}\n"
        "updates, state = jax.jit(tx.update)(params, tx.init(params), params)\n"
        "print(memory.optimizer_bytes(tx, params), sorted(updates))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "['b', 'w']" in run.stdout


@pytest.mark.promotes
@pytest.mark.slow
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
    here = {"cwd": tmp_path, "env": environment()}
    run = subprocess.run(command, capture_output=True, text=True, **here)
    assert "no network" not in run.stderr
    assert run.returncode == 0, run.stderr
