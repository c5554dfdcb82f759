"""Whole training steps on the GPU that is here: time, and the peak of its allocator.

Each case in a process of its own; all compile at the same time, then run one by one.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERED = "MicroAdam, layer by layer"
CASES = [  # model, optimizer as gpu_memory.py names it
    ("1.7B", "optax.adamw, float32 moments"),
    ("1.7B", "optax.adamw"),
    ("1.7B", "MicroAdam"),
    ("1.7B", LAYERED),
    ("Llama-2-7B", LAYERED),
    ("Llama-2-7B", "MicroAdam"),
    ("Llama-2-7B", "optax.adamw"),
]
STEPS = 6


def one(model_name: str, optimizer: str) -> None:
    """Compiles a case, says so, waits for a line, and runs it; wants its own process."""
    import gpu_memory
    from gpu_steps import MODELS, init, shapes

    model = MODELS[model_name]
    case = gpu_memory.Case(model_name, "bfloat16", optimizer, "")
    tx, device = gpu_memory.transformation(case), jax.devices()[0]
    compiled = gpu_memory.compile_step(device, model, "bfloat16", tx, case.step)
    held = gpu_memory.account(compiled, shapes(model.config, "bfloat16"), case.step)
    print("compiled", flush=True)
    sys.stdin.readline()
    params = make_params(shapes(model.config, "bfloat16"))
    state = jax.jit(lambda params: init(tx, params, case.step))(params)
    rng = np.random.default_rng(0)
    size = (model.batch, model.length + 1)
    tokens = jnp.asarray(rng.integers(0, model.config["vocab_size"], size), jnp.int32)
    jax.block_until_ready((params, state))
    before = device.memory_stats() or {}
    times, losses = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        params, state, loss = compiled(params, state, tokens)
        losses.append(float(loss))
        times.append(time.perf_counter() - began)
    after = device.memory_stats() or {}
    row = {"model": model_name, "optimizer": optimizer, "parameters": held["number"]}
    row |= {"seconds": statistics.median(times[2:]), "losses": losses}
    row["account_bytes"] = held["peak"] * held["number"]
    row["bytes_before"] = before.get("bytes_in_use", 0)
    row["peak_before"] = before.get("peak_bytes_in_use", 0)
    row["peak_bytes"] = after.get("peak_bytes_in_use", 0)
    print(json.dumps(row), flush=True)


def make_params(like: Any) -> Any:
    """Leaf by leaf, so that making them needs less than the step; scales are 1."""
    params: dict[str, dict[str, jax.Array]] = {}
    make = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16),
        static_argnums=1,
    )
    for kind, leaves in like.items():
        params[kind] = {}
        for i, (name, x) in enumerate(leaves.items()):
            scale = "scale" in name
            key = jax.random.key(i)
            params[kind][name] = (
                jnp.ones(x.shape, x.dtype) if scale else make(key, x.shape)
            )
    return params


def run(enough: Any, keep: Any, only: str = "") -> None:
    """All cases; what was measured is kept after each."""
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    here = pathlib.Path(__file__).parent / "gpu.py"
    started = []
    for case in CASES:
        if only in " ".join(case):
            command = [sys.executable, str(here), "whole", "--one", *case]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            child = subprocess.Popen(command, text=True, env=env, **pipes)
            started.append((case, child))
    rows, ready = [], [child.stdout.readline() for _, child in started]
    print(f"{sum(map(bool, ready))} of {len(ready)} steps compiled", flush=True)
    for (case, child), said in zip(started, ready, strict=True):
        if enough():
            child.kill()
            continue
        out, _ = child.communicate("\n" if said else "")
        if child.returncode or not out.strip():
            rows.append({"model": case[0], "optimizer": case[1], "failed": True})
            print(f"FAILED: {case}", flush=True)
            continue
        row = json.loads(out.strip().splitlines()[-1])
        rows.append(row)
        print(line(row), flush=True)
        keep({"rows": rows})


def line(row: dict[str, Any]) -> str:
    number = row["parameters"]
    return (
        f"{row['model']:10} {row['optimizer']:30} {row['seconds'] * 1e3:8.1f} ms a step, "
        f"peak {row['peak_bytes'] / 1e9:6.2f} GB, {row['peak_bytes'] / number:.2f} "
        f"B/param (account {row['account_bytes'] / number:.2f}; before the step "
        f"{row['peak_before'] / number:.2f}), loss {row['losses'][0]:.3f} to "
        f"{row['losses'][-1]:.3f}"
    )
