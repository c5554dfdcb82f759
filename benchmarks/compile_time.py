"""Seconds to trace and compile a jitted update: MicroAdam against optax.adamw.

python benchmarks/compile_time.py
"""

import statistics
import time

import jax
import optax
from tqdm import tqdm

from common import report, transformations

CASES = {
    "1 leaf": [(1024, 1024)],
    "16 equal leaves": [(1024, 1024)] * 16,
    "64 equal leaves": [(1024, 1024)] * 64,
    "16 distinct leaves": [(1024, 64 * n) for n in range(1, 17)],
    "64 distinct leaves": [(64 * (n // 8 + 1), 128 * (n % 8 + 1)) for n in range(64)],
}


def seconds(tx: optax.GradientTransformation, shapes: list, repeats: int) -> float:
    gradients = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    state = jax.eval_shape(tx.init, gradients)
    taken = []
    for _ in range(repeats):
        jax.clear_caches()
        began = time.perf_counter()
        jax.jit(tx.update).lower(gradients, state, gradients).compile()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    txs = {"optax.adamw": optax.adamw(1e-3), **transformations()}
    rows: dict = {}
    for case, shapes in tqdm(CASES.items()):
        repeats = 3 if len(shapes) == 1 else 1
        rows[case] = {name: seconds(tx, shapes, repeats) for name, tx in txs.items()}
    for case, row in rows.items():
        base = row["optax.adamw"]
        ratios = [f"{n} {t:.2f} s ({t / base:.1f} times)" for n, t in row.items()]
        print(f"{case}: " + ", ".join(ratios))
    report("compile_time", {"seconds": rows})


if __name__ == "__main__":
    main()
