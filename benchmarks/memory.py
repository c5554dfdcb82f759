"""Bytes of optimizer state, by arithmetic and by shapes, and of temporary memory.

    python benchmarks/memory.py

Nothing is allocated: shapes only, and XLA's own account of a compiled step.
"""

import argparse
import functools
import math
from typing import Any

import jax
import optax

from common import SETTINGS, report, transformations
from microadam_optax import microadam
from microadam_optax.memory import optimizer_bytes
from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.sizes import MODELS

SHOWN = {"Llama-2-7B": "llama2-7b", "GPT-2 small": "gpt2"}
LEAVES = {  # shape, dtype and number
    "1024 x 4096": ((1024, 4096), "float32", 1),
    "20 of 1024 x 4096": ((1024, 4096), "float32", 20),
    "4096 x 11008": ((4096, 11008), "float32", 1),
    "4096 x 11008, bfloat16": ((4096, 11008), "bfloat16", 1),
    "50257 x 768": ((50257, 768), "float32", 1),
    "12 x 768 x 3072": ((12, 768, 3072), "float32", 1),
    "4,194,301": ((4_194_301,), "float32", 1),
}
RATE = 1e-3  # plays no part in what is held
PEERS = {
    "Adam": optax.scale_by_adam(),
    "AdamW, mu in bfloat16": optax.adamw(RATE, mu_dtype="bfloat16"),
    "Lion": optax.lion(RATE),
    "Adafactor": optax.adafactor(RATE),
}
for rank in (128, 1024):
    PEERS[f"GaLore, rank {rank}"] = optax.contrib.galore(RATE, rank=rank)


def by_arithmetic(
    window: int = 2,
    density: float = 0.06,
    bits: int = 4,
    block: int = 256,
    **others: Any,
) -> float:
    """Bytes a parameter of a leaf that its blocks fill."""
    del others  # they do not count here
    k = math.ceil(density * block)
    return bits / 8 + (window - 1) * k * 3 / block + 4 / block


def shapes(model: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a built-in model's float32 parameters."""
    found = shapes_of(MODELS[model])
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in found.items()}


def state_bytes(params: dict[str, jax.ShapeDtypeStruct]) -> dict[str, float]:
    """Bytes a parameter of each optimizer."""
    number = sum(leaf.size for leaf in params.values())
    txs = {**PEERS, **transformations()}
    return {name: optimizer_bytes(tx, params) / number for name, tx in txs.items()}


def temporary_bytes(tx: optax.GradientTransformation, leaves: list[Any]) -> int:
    """Of a jitted update with gradients and state donated."""
    state = jax.eval_shape(tx.init, leaves)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(leaves, state).compile().memory_analysis().temp_size_in_bytes


def temporaries() -> dict[str, dict[str, int]]:
    """Bytes of leaves of several shapes, and what their update needs beside."""
    kept = {name: kw for name, kw in SETTINGS.items() if kw}
    rows = {}
    for name, (shape, dtype, number) in LEAVES.items():
        leaves = [jax.ShapeDtypeStruct(shape, dtype)] * number
        row = {
            "leaf": leaves[0].dtype.itemsize * leaves[0].size,
            "Adam": temporary_bytes(optax.adam(RATE), leaves),
        }
        for how, implementation in (("kernel", None), ("XLA", "xla")):
            of = functools.partial(microadam, RATE, implementation=implementation)
            found = [temporary_bytes(of(**kw), leaves) for kw in ({}, *kept.values())]
            row[how], row[f"{how}, most"] = found[0], max(found)
        rows[name] = row
        print(
            f"  {name:20}", {x: f"{n / 1e6:.1f} MB" for x, n in row.items()}, flush=True
        )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results: dict = {"state_bytes_a_parameter": {}}
    for name, model in SHOWN.items():
        params = shapes(model)
        total = sum(leaf.size for leaf in params.values())
        results["state_bytes_a_parameter"][name] = state_bytes(params)
        print(f"{name}, {total:,} parameters: bytes of state for each")
        for setting, held in results["state_bytes_a_parameter"][name].items():
            known = SETTINGS.get(setting)
            formula = "" if known is None else f"{by_arithmetic(**known):.3f} by formula"
            print(f"  {setting:10} {held:.3f}  {formula}")
    print("temporary bytes of a donated update, learning rate included")
    results["temporary_bytes"] = temporaries()
    report("memory", results)


if __name__ == "__main__":
    main()
