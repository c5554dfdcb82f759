"""Rows and warps of a program of the GPU's kernel, and one launch for a profiler."""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from gpu_check import SETTINGS, kernel_here
from gpu_time import compile_step, made, measure
from microadam_optax import scale_by_microadam
from microadam_optax._kernels import gpu

LEAVES = {"256": [(8, 4096, 4096)], "232": [(4, 4096, 11008)]}  # by their blocks
SMALL = {"256": [(4, 512)], "232": [(2, 11008)]}
PROGRAMS = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (1, 2))  # rows and warps


def transformation(settings: dict[str, Any]) -> Any:
    settings = {**settings, "dense": None}
    return scale_by_microadam(**settings, implementation=kernel_here())


def run(
    keep: Callable, threads: int, dtype: str = "bfloat16", tiny: bool = False
) -> None:
    """Seconds of each number of rows and warps, for each setting."""
    steps = 2 if tiny else 10
    original, jobs, rows = gpu.update, [], []
    leaves = SMALL if tiny else LEAVES
    with ThreadPoolExecutor(threads) as pool:
        for (block, shapes), (name, settings), (rows_, warps) in itertools.product(
            leaves.items(), SETTINGS.items(), PROGRAMS[: 2 if tiny else None]
        ):
            tx = transformation(settings)
            gpu.update = functools.partial(original, rows=rows_, warps=warps)
            jax.clear_caches()
            lowered = lower(tx, shapes, dtype)  # here the patch is seen
            jobs.append((block, name, rows_, warps, tx, pool.submit(lowered.compile)))
        gpu.update = original
        jax.clear_caches()
    gradients = {
        block: [made(shapes, dtype, seed) for seed in (0, 1)]
        for block, shapes in leaves.items()
    }
    for block, name, rows_, warps, tx, compiled in jobs:
        label = {"block": block, "setting": name, "rows": rows_, "warps": warps}
        try:
            found = measure(tx, compiled.result(), gradients[block], steps)
        except Exception as error:  # such as too many registers
            print(f"  {label}: {error}"[:200])
            continue
        number = sum(x.size for x in gradients[block][0])
        each = found["seconds"] / number * 1e12
        rows.append({**label, "picoseconds_a_parameter": each})
        print(
            f"  {block} {name:10} {rows_} rows {warps} warps {each:7.2f} ps", flush=True
        )
        keep({"dtype": dtype, "rows": rows})


def lower(tx: Any, shapes: list, dtype: str) -> Any:
    def update(params: Any, gradients: Any, state: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return params, updates, state

    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(tx.init, leaves)
    return jax.jit(update, donate_argnums=(0, 1, 2)).lower(leaves, leaves, state)


def launches(only: str) -> Iterator[str]:
    """Runs each kernel twice, for a profiler that looks at them."""
    for (block, shapes), (name, settings) in itertools.product(
        LEAVES.items(), SETTINGS.items()
    ):
        if only not in f"{block} {name}":
            continue
        tx = transformation(settings)
        compiled, _ = compile_step(tx, False, shapes, "bfloat16")
        gradients = made(shapes, "bfloat16")
        state = jax.jit(tx.init)(gradients)
        for _ in range(2):
            _, updates, state = compiled(gradients, made(shapes, "bfloat16"), state)
            gradients = made(shapes, "bfloat16")
            jax.block_until_ready(updates)
        yield f"{block} {name}"
