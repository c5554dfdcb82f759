"""Bytes of optimizer state, by arithmetic and by shapes, and of temporary memory.

    python benchmarks/memory.py

Nothing is allocated: shapes only, and XLA's own account of a compiled step.
"""

import math

import jax
import optax

from common import (
    SETTINGS,
    abstract,
    gpt2_small,
    llama2_7b,
    report,
    size_in_bytes,
    transformations,
)

MODELS = {"Llama-2-7B": llama2_7b, "GPT-2 small": gpt2_small}
RATE = 1e-3  # plays no part in what is held
PEERS = {
    "Adam": optax.scale_by_adam(),
    "AdamW, mu in bfloat16": optax.adamw(RATE, mu_dtype="bfloat16"),
    "Lion": optax.lion(RATE),
    "Adafactor": optax.adafactor(RATE),
}
for rank in (128, 1024) if hasattr(optax.contrib, "galore") else ():
    PEERS[f"GaLore, rank {rank}"] = optax.contrib.galore(RATE, rank=rank)


def by_arithmetic(window: int, density: float, bits: int = 4, block: int = 256) -> float:
    """Bytes a parameter of a leaf that its blocks fill."""
    k = math.ceil(density * block)
    return bits / 8 + (window - 1) * k * 3 / block + 4 / block


def state_bytes(model: dict) -> dict[str, float]:
    parameters = sum(math.prod(shape) for shape in model.values())
    txs = {**PEERS, **transformations()}
    held = {name: jax.eval_shape(tx.init, abstract(model)) for name, tx in txs.items()}
    return {name: size_in_bytes(state) / parameters for name, state in held.items()}


def temporary_bytes(tx: optax.GradientTransformation, leaves: int) -> int:
    """Of a jitted update with gradients and state donated, over equal leaves."""
    gradients = [jax.ShapeDtypeStruct((1024, 4096), "float32")] * leaves
    state = jax.eval_shape(tx.init, gradients)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(gradients, state).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    results: dict = {"state_bytes_a_parameter": {}, "temporary_bytes": {}}
    for name, shapes in MODELS.items():
        model = shapes()
        total = sum(math.prod(shape) for shape in model.values())
        results["state_bytes_a_parameter"][name] = state_bytes(model)
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
