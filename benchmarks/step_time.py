"""Time of a donated, jitted optimizer step: MicroAdam against optax.adamw.

    python benchmarks/step_time.py [--steps N] [--largest MILLIONS]

Both are run in turn on the same gradients, and the median of the ratios of
neighbouring runs is printed, for the update alone and with apply_updates.
Parameters, gradients and state are donated.
"""

import argparse
import statistics
import time

import jax
import optax
from tqdm import tqdm

from common import SETTINGS, report
from microadam_optax import microadam

SHAPES = {
    4: [(1024, 4096)],
    16: [(4096, 4096)],
    32: [(4096, 4096), (4096, 1024), (1024, 4096), (2048, 4096)],
    64: [(4096, 4096), (4096, 11008)],
}


def runner(tx: optax.GradientTransformation, params: list, apply: bool):
    """A function that runs one step on copies of gradients and returns seconds."""

    def step(params, gradients, state):
        updates, state = tx.update(gradients, state, params)
        if apply:
            params = optax.apply_updates(params, updates)
        return params, updates, state

    # The update takes the gradient's memory, as inside a whole training step.
    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    held = [jax.tree.map(lambda x: x + 0, params), jax.jit(tx.init)(params)]

    def run(gradients) -> float:
        copies = jax.block_until_ready(jax.tree.map(lambda x: x + 0, gradients))
        began = time.perf_counter()
        held[0], updates, held[1] = compiled(held[0], copies, held[1])
        jax.block_until_ready((held, updates))
        return time.perf_counter() - began

    return run


def compare(shapes: list, settings: dict, apply: bool, steps: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    adamw = runner(optax.adamw(1e-3), gradients, apply)
    ours = runner(microadam(1e-3, weight_decay=1e-4, **settings), gradients, apply)
    pairs = [(adamw(gradients), ours(gradients)) for _ in range(steps + 2)][2:]
    parameters = sum(g.size for g in gradients)
    return {
        "parameters": parameters,
        "ratio": statistics.median(b / a for a, b in pairs),
        "adamw_ns_a_parameter": statistics.median(a for a, _ in pairs) / parameters * 1e9,
        "ns_a_parameter": statistics.median(b for _, b in pairs) / parameters * 1e9,
    }


def copy_time(parameters: int, steps: int = 9) -> float:
    """Nanoseconds an element for reading and writing a float32 array."""
    x = jax.numpy.ones(parameters)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(steps):
        jax.block_until_ready(x)
        began = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - began)
    return statistics.median(times) / parameters * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--largest", type=int, default=64, help="millions of parameters")
    args = parser.parse_args()
    sizes = [size for size in SHAPES if size <= args.largest]
    cases = [(n, s, a) for n in sizes for s in SETTINGS for a in (False, True)]
    rows = []
    for millions, name, apply in tqdm(cases):
        row = compare(SHAPES[millions], SETTINGS[name], apply, args.steps)
        rows.append({"setting": name, "apply_updates": apply, **row})
    copy = copy_time(sizes[-1] * 2**20)
    print(f"copy of a float32 array: {copy:.2f} ns an element")
    print("parameters  setting    step            adamw ns  ns a parameter  ratio")
    for row in rows:
        kind = "with apply" if row["apply_updates"] else "update alone"
        print(
            f"{row['parameters']:>10,}  {row['setting']:10} {kind:14} "
            f"{row['adamw_ns_a_parameter']:9.2f} {row['ns_a_parameter']:15.2f} "
            f"{row['ratio']:6.2f}"
        )
    report("step_time", {"copy_ns_an_element": copy, "rows": rows})


if __name__ == "__main__":
    main()
