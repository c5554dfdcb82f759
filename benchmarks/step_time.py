"""Time of a donated, jitted optimizer step: MicroAdam against optax.adamw.

    python benchmarks/step_time.py [--steps N] [--largest MILLIONS] [--cores N] [--xla]

"With apply": several whole steps in one program, as training runs them. Each makes its
gradients, which are temporaries, from one row, updates and applies; the time of a program
that only makes gradients is subtracted. "Update alone": one call of the update, over the
gradients and the state that it is given. All are run in turn, and the least time of each
counts: more would be what else the machine did. On all cores, and a part on one. With
`--xla` as without numba, in blocks of 256 of the smaller sizes.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
PADDED = {4: [(381, 11008)], 34: [(1524, 11008)] * 2, 62: [(2816, 11008)] * 2}
BLOCKS: dict[str, tuple[int, dict]] = {  # the argument, and the leaves of each size
    "256": (256, FILLED),
    "64": (64, FILLED),
    "232, padded": (256, PADDED),
}
STEPS = 20  # in one program, which asks for new memory once
ONE_CORE = 34  # millions of parameters, which are also run on one core
Case = tuple[int, str, str, bool]  # millions, setting, blocks, apply_updates


def whole_steps(tx: Any, params: list, gradients: list) -> Callable[[], float]:
    """A function that returns the seconds of a step; without tx of making gradients."""
    import jax
    import optax

    def make(scale):
        return [jax.numpy.broadcast_to(x[0] * scale, x.shape) for x in gradients]

    def step(_, carry):
        scale, params, state = carry
        # XLA would make them within the update, which then reads none. It cannot behind
        # a condition; one behind optimization_barrier it does.
        made = jax.lax.cond(scale > 0, make, lambda _: gradients, scale)
        if tx is None:
            # Of every leaf, or XLA makes only some.
            return 1 + 1e-9 * sum(x[0, 0] for x in made), params, state
        updates, state = tx.update(made, state, params)
        params = optax.apply_updates(params, updates)
        return 1 + 1e-9 * params[0][0, 0], params, state

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry):
        return jax.lax.fori_loop(0, STEPS, step, carry)

    params = jax.tree.map(jax.numpy.copy, params)
    carry = jax.numpy.float32(1), params, jax.jit(tx.init)(params) if tx else ()

    def run() -> float:
        nonlocal carry
        began = time.perf_counter()
        carry = jax.block_until_ready(steps(carry))
        return (time.perf_counter() - began) / STEPS

    return run


def update_alone(tx: Any, params: list, gradients: list) -> Callable[[], float]:
    """A function that returns the seconds of one update."""
    import jax

    # JAX pairs what is donated with outputs in their order.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(gradients, state):
        return tx.update(gradients, state, params)

    state = jax.jit(tx.init)(params)

    def run() -> float:
        nonlocal state
        copies = jax.block_until_ready(jax.tree.map(jax.numpy.copy, gradients))
        began = time.perf_counter()
        _, state = jax.block_until_ready(update(copies, state))
        return time.perf_counter() - began

    return run


def compare(shapes: list, settings: dict, apply: bool, steps: int) -> dict[str, float]:
    import jax
    import optax

    from microadam_optax import microadam

    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    txs = [optax.adamw(1e-3), microadam(1e-3, weight_decay=1e-4, **settings)]
    runner = whole_steps if apply else update_alone
    runs = [runner(tx, gradients, gradients) for tx in txs]
    making = whole_steps(None, [], gradients) if apply else lambda: 0.0
    parameters = sum(g.size for g in gradients)
    rounds = [[f() / parameters * 1e9 for f in (making, *runs)] for _ in range(steps + 2)]
    made, adamw, ours = (min(times) for times in zip(*rounds[2:], strict=True))
    return {
        "parameters": parameters,
        "ratio": (ours - made) / (adamw - made),
        "adamw_ns_a_parameter": adamw - made,
        "ns_a_parameter": ours - made,
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
    return min(times) / parameters * 1e9


def cases(sizes: list[int], blocks: list[str]) -> list[Case]:
    return list(itertools.product(sizes, SETTINGS, blocks, (True, False)))


def measure(case: Case, cores: int, args: argparse.Namespace) -> dict[str, Any]:
    millions, name, blocks, apply = case
    block_size, shapes = BLOCKS[blocks]
    settings = SETTINGS[name] | {"block_size": block_size}
    settings |= {"implementation": "xla" if args.xla else None}
    row = compare(shapes[millions], settings, apply, args.steps)
    more = {
        "millions": millions,
        "setting": name,
        "blocks": blocks,
        "apply_updates": apply,
        "cores": cores,
    }
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
    parser.add_argument("--xla", action="store_true", help="as without numba")
    args = parser.parse_args()
    here = len(os.sched_getaffinity(0))
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        some = cases([ONE_CORE], list(BLOCKS))
        print(json.dumps([measure(case, args.cores, args) for case in some]))
        return
    from tqdm import tqdm

    from common import report

    rows = []
    print("parameters  setting    blocks                step   adamw ns, ours, ratio")
    largest = min(args.largest, ONE_CORE) if args.xla else args.largest
    sizes = [size for size in FILLED if size <= largest]
    for case in tqdm(cases(sizes, ["256"] if args.xla else list(BLOCKS))):
        rows.append(measure(case, here, args))
        tqdm.write(show(rows[-1]))
    if largest >= ONE_CORE and here > 1 and not args.xla:
        one = on_one_core(args.steps)
        print("\n".join(map(show, one)))
        rows += one
    copy = copy_time(largest * 2**20)
    print(f"copy of a float32 array: {copy:.2f} ns an element")
    name = "step_time_xla" if args.xla else "step_time"
    report(name, {"copy_ns_an_element": copy, "rows": rows})


if __name__ == "__main__":
    main()
