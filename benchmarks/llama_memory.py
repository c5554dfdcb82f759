"""Memory of a step of examples/finetune_llama.py on an H200 that need not exist.

    python benchmarks/llama_memory.py

The program's own step with the shapes of Llama-2-7B in bfloat16, rounded at random,
compiled and not run, by XLA's account. It wants what gpu_memory.py wants.
"""

import argparse
import functools
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import kernels
from common import report
from microadam_optax.memory import array_bytes

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import llama
import llama_optimizers
import llama_step
from llama_config import Config

BATCH, LENGTH = 1, 2048
RATE, STEPS = 1e-4, 100  # play no part in what is held
LLAMA_2_7B = Config(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tied=False,
    attention_bias=False,
    sliding_window=None,
    max_position=4096,
    model_type="llama",
    bos_id=1,
    eos_id=2,
)


class Case(NamedTuple):
    """The options of the program."""

    optimizer: str
    layerwise: bool = False
    accumulate: int = 1

    @property
    def options(self) -> str:
        """As they are given."""
        words = [f"--optimizer {self.optimizer}", "--dtype bfloat16"]
        words += ["--layerwise"] * self.layerwise
        words += [f"--accumulate {self.accumulate}"] * (self.accumulate > 1)
        return " ".join(words)


CASES = [
    Case("adamw"),
    Case("microadam"),
    Case("microadam", layerwise=True),
    Case("microadam", layerwise=True, accumulate=4),
]


def compile_step(case: Case, config: Config, device: Any) -> tuple[Any, Any]:
    """The donated step, compiled for a device, and the shapes of the parameters."""
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    tx = llama_optimizers.make_optimizer(case.optimizer, RATE, STEPS, case.accumulate)
    step = llama_step.by_layer if case.layerwise else llama_step.ordinary
    init = functools.partial(llama.init_params, config, dtype=jnp.bfloat16)
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(functools.partial(llama_step.init, tx), params)
    batch = llama_step.Batch(
        jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32),
        jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32),
    )
    jitted = jax.jit(
        functools.partial(step, config, tx),
        donate_argnums=(0, 1),
        in_shardings=whole,
        out_shardings=whole,
        compiler_options=llama_step.EXACT,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jitted.trace(params, state, batch, key).lower().compile(), params


def measure(case: Case, config: Config, device: Any) -> dict[str, Any]:
    """A row of the results."""
    began = time.process_time()
    compiled, params = compile_step(case, config, device)
    found = compiled.memory_analysis()
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = {
        "arguments": found.argument_size_in_bytes,
        "outputs_beside": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    peak = sum(held.values())
    return {
        "options": case.options,
        **case._asdict(),
        "parameters": number,
        "parameter_bytes": int(array_bytes(params)),
        **held,
        "peak": peak,
        "peak_a_parameter": peak / number,
        "compile_cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    kernels.prepare(dump=False)
    made = topologies.get_topology_desc(
        "", "cuda", target_config=kernels.H200, topology="1x1x1"
    )
    rows = []
    for case in CASES:
        row = measure(case, LLAMA_2_7B, made.devices[0])
        rows.append(row)
        gigabytes = row["peak"] / 1e9
        each = row["peak_a_parameter"]
        print(f"{case.options}: {gigabytes:.1f} GB, {each:.2f} bytes a parameter")
        report("llama_memory", {"batch": BATCH, "length": LENGTH, "rows": rows})


if __name__ == "__main__":
    main()
