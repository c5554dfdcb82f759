"""Time of a donated, jitted optimizer step: MicroAdam against optax.adamw.

    python benchmarks/step_time.py [--steps N] [--largest MILLIONS] [--cores N]

Both are run in turn on the same gradients, and the median of the ratios of
neighbouring runs is printed, for the update alone and with apply_updates.
Parameters, gradients and state are donated. On all cores, and a part on one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

SETTINGS = {
    "(2, 6 %)": {"window": 2, "density": 0.06},
    "(1, 25 %)": {"window": 1, "density": 0.25},
    "(10, 1 %)": {"window": 10, "density": 0.01},
}
FILLED = {
    4: [(1024, 4096)],
    34: [(4096, 4096), (4096, 1024), (1024, 4096), (2048, 4096)],
    62: [(4096, 4096), (4096, 11264)],
}
PADDED = {4: [(381, 11008)], 34: [(3048, 11008)], 62: [(5632, 11008)]}
BLOCKS: dict[str, tuple[int, dict]] = {  # the argument, and the leaves of each size
    "256": (256, FILLED),
    "64": (64, FILLED),
    "232, padded": (256, PADDED),
}
ONE_CORE = 34  # millions of parameters, which are also run on one core
Case = tuple[int, str, str, bool]  # millions, setting, blocks, apply_updates


def runner(tx: Any, params: list, apply: bool):
    """A function that runs one step on copies of gradients and returns seconds."""
    import jax
    import optax

    def step(params, gradients, state):
        updates, state = tx.update(gradients, state, params)
        if apply:
            return optax.apply_updates(params, updates), state
        return params, state, updates

    # The update takes the gradient's memory, as inside a whole training step.
    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    held = [jax.tree.map(lambda x: x + 0, params), jax.jit(tx.init)(params)]

    def run(gradients) -> float:
        copies = jax.block_until_ready(jax.tree.map(lambda x: x + 0, gradients))
        began = time.perf_counter()
        held[0], held[1], *updates = compiled(held[0], copies, held[1])
        jax.block_until_ready((held, updates))
        return time.perf_counter() - began

    return run


def compare(shapes: list, settings: dict, apply: bool, steps: int) -> dict[str, float]:
    import jax
    import optax

    from microadam_optax import microadam

    # With apply_updates no output has the place of a gradient that adamw does not need.
    warnings.filterwarnings("ignore", "Some donated buffers")
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
    import jax

    x = jax.numpy.ones(parameters)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(steps):
        jax.block_until_ready(x)
        began = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - began)
    return statistics.median(times) / parameters * 1e9


def cases(sizes: list[int]) -> list[Case]:
    return [
        (millions, name, blocks, apply)
        for millions in sizes
        for name in SETTINGS
        for blocks in BLOCKS
        for apply in (True, False)
    ]


def measure(case: Case, cores: int, steps: int) -> dict[str, Any]:
    millions, name, blocks, apply = case
    block_size, shapes = BLOCKS[blocks]
    settings = SETTINGS[name] | {"block_size": block_size}
    row = compare(shapes[millions], settings, apply, steps)
    more = {"setting": name, "blocks": blocks, "apply_updates": apply, "cores": cores}
    return {**more, **row}


def on_one_core(steps: int) -> list[dict[str, Any]]:
    """Rows of a process that has one core before JAX counts them."""
    command = [sys.executable, __file__, "--cores", "1", f"--steps={steps}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def show(row: dict[str, Any]) -> str:
    kind = "with apply" if row["apply_updates"] else "update alone"
    return (
        f"{row['parameters']:>10,}  {row['setting']:10} {row['blocks']:12} "
        f"{row['cores']} cores  {kind:14} {row['adamw_ns_a_parameter']:6.2f} "
        f"{row['ns_a_parameter']:6.2f} {row['ratio']:6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--largest", type=int, default=62, help="millions of parameters")
    parser.add_argument("--cores", type=int, help="print rows of this many cores as JSON")
    args = parser.parse_args()
    here = len(os.sched_getaffinity(0))
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        some = cases([ONE_CORE])
        print(json.dumps([measure(case, args.cores, args.steps) for case in some]))
        return
    from tqdm import tqdm

    from common import report

    rows = []
    print("parameters  setting    blocks                step   adamw ns, ours, ratio")
    for case in tqdm(cases([size for size in FILLED if size <= args.largest])):
        rows.append(measure(case, here, args.steps))
        tqdm.write(show(rows[-1]))
    if args.largest >= ONE_CORE and here > 1:
        rows += on_one_core(args.steps)
        print("\n".join(map(show, rows[-len(cases([ONE_CORE])) :])))
    copy = copy_time(args.largest * 2**20)
    print(f"copy of a float32 array: {copy:.2f} ns an element")
    report("step_time", {"copy_ns_an_element": copy, "rows": rows})


if __name__ == "__main__":
    main()
