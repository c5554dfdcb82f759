"""Seconds until a jitted update has run once: MicroAdam against optax.adamw.

python benchmarks/compile_time.py [--xla]

Tracing, compiling and the first step. What the CPU kernel needs once on a machine is
compiled before. With `--xla` as without numba, the default setting alone.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from common import SETTINGS, report
from microadam_optax import microadam

CASES = {
    "1 leaf": [(1024, 1024)],
    "16 equal leaves": [(1024, 1024)] * 16,
    "64 equal leaves": [(1024, 1024)] * 64,
    "64 distinct leaves": [(64 * (n // 8 + 1), 128 * (n % 8 + 1)) for n in range(64)],
}


def seconds(tx: optax.GradientTransformation, shapes: list, repeats: int) -> float:
    gradients = [jnp.ones(shape) for shape in shapes]
    state = jax.block_until_ready(jax.jit(tx.init)(gradients))
    taken = []
    for _ in range(repeats):
        jax.clear_caches()
        began = time.perf_counter()
        jax.block_until_ready(jax.jit(tx.update)(gradients, state, gradients))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xla", action="store_true", help="as without numba")
    xla = parser.parse_args().xla
    implementation = "xla" if xla else None
    settings = dict(list(SETTINGS.items())[: 1 if xla else None])
    txs = {"optax.adamw": optax.adamw(1e-3)} | {
        name: microadam(1e-3, weight_decay=1e-4, **given, implementation=implementation)
        for name, given in settings.items()
    }
    for tx in txs.values():
        seconds(tx, [(64, 64)], repeats=1)
    rows: dict = {}
    for case, shapes in tqdm(CASES.items()):
        repeats = 1 if xla and len(shapes) > 1 else 3
        rows[case] = {name: seconds(tx, shapes, repeats) for name, tx in txs.items()}
    for case, row in rows.items():
        base = row["optax.adamw"]
        ratios = [f"{n} {t:.2f} s ({t / base:.1f} times)" for n, t in row.items()]
        print(f"{case}: " + ", ".join(ratios))
    report("compile_time_xla" if xla else "compile_time", {"seconds": rows})


if __name__ == "__main__":
    main()
