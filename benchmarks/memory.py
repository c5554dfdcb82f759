"""Bytes of optimizer state, by arithmetic and by shapes, and of temporary memory.

    python benchmarks/memory.py

Nothing is allocated: shapes only, and XLA's own account of a compiled step.
"""

import math

import jax
import optax

from common import SETTINGS, report, transformations
from microadam_optax._models import MODELS, shapes_of
from microadam_optax.memory import optimizer_bytes

SHOWN = {"Llama-2-7B": "llama2-7b", "GPT-2 small": "gpt2"}
RATE = 1e-3  # plays no part in what is held
PEERS = {
    "Adam": optax.scale_by_adam(),
    "AdamW, mu in bfloat16": optax.adamw(RATE, mu_dtype="bfloat16"),
    "Lion": optax.lion(RATE),
    "Adafactor": optax.adafactor(RATE),
}
for rank in (128, 1024):
    PEERS[f"GaLore, rank {rank}"] = optax.contrib.galore(RATE, rank=rank)


def by_arithmetic(window: int, density: float, bits: int = 4, block: int = 256) -> float:
    """Bytes a parameter of a leaf that its blocks fill."""
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


def temporary_bytes(tx: optax.GradientTransformation, leaves: int) -> int:
    """Of a jitted update with gradients and state donated, over equal leaves."""
    gradients = [jax.ShapeDtypeStruct((1024, 4096), "float32")] * leaves
    state = jax.eval_shape(tx.init, gradients)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(gradients, state).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    results: dict = {"state_bytes_a_parameter": {}, "temporary_bytes": {}}
    for name, model in SHOWN.items():
        params = shapes(model)
        total = sum(leaf.size for leaf in params.values())
        results["state_bytes_a_parameter"][name] = state_bytes(params)
        print(f"{name}, {total:,} parameters: bytes of state for each")
        for setting, held in results["state_bytes_a_parameter"][name].items():
            known = SETTINGS.get(setting)
            formula = f"{by_arithmetic(**known):.3f} by the formula" if known else ""
            print(f"  {setting:10} {held:.3f}  {formula}")
    print("temporary bytes of a donated update, leaves of 1024 x 4096 float32 (16.8 MB)")
    for setting, tx in {"Adam": optax.scale_by_adam(), **transformations()}.items():
        scaled = optax.chain(tx, optax.scale_by_learning_rate(1e-3))
        some = {
            f"{leaves}{name}": temporary_bytes(each, leaves)
            for name, each in (("", tx), (" scaled", scaled))
            for leaves in (1, 20)
        }
        results["temporary_bytes"][setting] = some
        print(f"  {setting:10}", {name: f"{n / 1e6:.2f} MB" for name, n in some.items()})
    report("memory", results)


if __name__ == "__main__":
    main()
