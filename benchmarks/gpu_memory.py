"""Memory of a whole training step on an H200 that need not exist, by XLA's account.

    pip install jax-cuda13-plugin jax-cuda13-pjrt --no-deps
    pip install nvidia-cuda-nvcc
    python benchmarks/gpu_memory.py [--only TEXT]

Models of Llama's kind whose layers are stacked and scanned, each rematerialized in the
backward pass; forward, backward, update and `apply_updates` in one program that donates
parameters and state. "Layer by layer" updates each layer in the backward pass. Compiled,
not run. With `--only` just the rows whose line has that text; others stay as they were.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import kernels
from common import report, with_float32_state
from gpu_steps import MODELS, Model, by_layer, init, ordinary, shapes
from microadam_optax import accumulate, microadam
from microadam_optax.memory import array_bytes

FILE = pathlib.Path(__file__).parent / "results" / "gpu_memory.json"
RATE = 1e-3  # plays no part in what is held
EVERY = 4  # micro-batches to a step, where they are accumulated
LARGEST = "Llama-2-7B"  # where a row of each kind is enough
DTYPES = ("bfloat16", "float32")
IN_LAYERS = ", layer by layer"
NONE, MULTI_STEPS, ACCUMULATE = "", "MultiSteps", "accumulate"


class Case(NamedTuple):
    """A row: what is trained, and how."""

    model: str
    dtype: str
    optimizer: str
    accumulation: str

    @property
    def line(self) -> str:
        """What it is called in the results."""
        more = f", {self.accumulation}" if self.accumulation else ""
        return f"{self.model} {self.dtype} {self.optimizer}{more}"

    @property
    def step(self) -> Callable:
        """The training step."""
        return by_layer if IN_LAYERS in self.optimizer else ordinary


def transformations() -> dict[str, optax.GradientTransformation]:
    def ours(**settings: Any) -> optax.GradientTransformation:
        return microadam(RATE, weight_decay=1e-4, **settings)

    return {
        "optax.adamw": optax.adamw(RATE),
        "optax.adamw, float32 moments": with_float32_state(optax.adamw(RATE)),
        f"optax.adamw{IN_LAYERS}": optax.adamw(RATE),
        "optax.adafactor": optax.adafactor(RATE),
        "optax.lion": optax.lion(RATE),
        "optax.contrib.galore": optax.contrib.galore(RATE),
        "MicroAdam": ours(),
        "MicroAdam (1, 25 %)": ours(window=1, density=0.25),
        'MicroAdam, implementation="xla"': ours(implementation="xla"),
        f"MicroAdam{IN_LAYERS}": ours(),
    }


def accumulations(optimizer: str) -> tuple[str, ...]:
    """How micro-batches can be accumulated with it."""
    own = (ACCUMULATE,) if "MicroAdam" in optimizer else ()
    return (NONE, *own) if IN_LAYERS in optimizer else (NONE, MULTI_STEPS, *own)


def cases() -> Iterator[Case]:
    """All that is measured: of the largest model what others show, too, is left out."""
    for model in MODELS:
        for dtype in DTYPES:
            if (model, dtype) == (LARGEST, "float32"):
                continue
            for optimizer in transformations():
                for accumulation in accumulations(optimizer):
                    yield Case(model, dtype, optimizer, accumulation)


def transformation(case: Case) -> Any:
    """The optimizer, with what accumulates around it."""
    tx = transformations()[case.optimizer]
    if case.accumulation == MULTI_STEPS:
        return optax.MultiSteps(tx, EVERY).gradient_transformation()
    return accumulate(tx, EVERY) if case.accumulation else tx


def compile_step(device: Any, model: Model, dtype: Any, tx: Any, step: Callable) -> Any:
    """The donated step, compiled for a device."""
    whole = NamedSharding(
        jax.sharding.Mesh(np.array([device]), ("device",)), PartitionSpec()
    )
    jitted = jax.jit(
        functools.partial(step, tx),
        donate_argnums=(0, 1),
        in_shardings=whole,
        out_shardings=whole,
    )
    params = shapes(model.config, dtype)
    state = jax.eval_shape(lambda params: init(tx, params, step), params)
    tokens = jax.ShapeDtypeStruct((model.batch, model.length + 1), jnp.int32)
    return jitted.trace(params, state, tokens).lower().compile()


def gradient_bytes(params: Any, step: Callable) -> float:
    """Of the gradients that exist together; they are among the temporary memory."""
    if step is not by_layer:
        return array_bytes(params)
    layers = params["layers"]
    count = next(iter(layers.values())).shape[0]
    return array_bytes(params["rest"]) + array_bytes(layers) / count


def account(compiled: Any, params: Any, step: Callable) -> dict[str, float]:
    """Bytes a parameter, at the peak."""
    found = compiled.memory_analysis()
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = {
        "parameters": array_bytes(params),
        "gradients": gradient_bytes(params, step),
        "arguments": found.argument_size_in_bytes,
        "outputs_beside": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    peak = held["arguments"] + held["outputs_beside"] + held["temporary"]
    each = {name: x / number for name, x in (held | {"peak": peak}).items()}
    return {"number": number, **each}


def measure(case: Case, device: Any) -> dict[str, Any]:
    """A row of the results."""
    model, began = MODELS[case.model], time.process_time()
    tx = transformation(case)
    compiled = compile_step(device, model, case.dtype, tx, case.step)
    spent = time.process_time() - began
    held = account(compiled, shapes(model.config, case.dtype), case.step)
    every = EVERY if case.accumulation else 1
    row = {"line": case.line, **case._asdict(), "every": every, **held}
    return row | {"compile_cpu_seconds": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT")
    args = parser.parse_args()
    kernels.prepare(dump=False)
    made = topologies.get_topology_desc(
        "", "cuda", target_config=kernels.H200, topology="1x1x1"
    )
    kept = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    rows = {row["line"]: row for row in kept}
    for case in cases():
        if args.only in case.line:
            row = rows[case.line] = measure(case, made.devices[0])
            print(f"{case.line}: {row['peak']:.2f} bytes a parameter", flush=True)
            ordered = [rows[x.line] for x in cases() if x.line in rows]
            report("gpu_memory", {"rows": ordered})


if __name__ == "__main__":
    main()
