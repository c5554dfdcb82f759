"""How long a step of the optimizer takes on the GPU that is here, beside its peers."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpu_peers import FIRST, WIDTHS, Case, cases, llama_like, peers
from microadam_optax.memory import array_bytes


def moved_bytes(state: Any, params: Any) -> int:
    """The least that a step moves: gradients, parameters and state are read once.

    And the state is written, and the update, or the parameters it is applied to.
    """
    total = 3 * array_bytes(params)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        size = x.size * x.dtype.itemsize
        windowed = {"indices", "values"} & {getattr(key, "name", None) for key in path}
        total += size if windowed else 2 * size  # of a window, one slot is written
    return total


def step(tx: Any, apply: bool, params: Any, gradients: Any, state: Any) -> Any:
    """Alone, the update takes the place of the gradients, which the caller gives away.

    Applied, gradients arise in the program, as those of a training step do.
    """
    if not apply:
        updates, state = tx.update(gradients, state, params)
        return params, updates, state
    updates, state = tx.update(arisen(*gradients), state, params)
    return optax.apply_updates(params, updates), None, state


def arisen(number: jax.Array, first: Any, second: Any) -> Any:
    """One of two batches of gradients, behind a condition that XLA does not fuse."""
    return jax.lax.cond(number % 2 == 0, lambda x, _: x, lambda _, y: y, first, second)


def given(gradients: list, apply: bool, i: int) -> Any:
    """What a step is called with."""
    if apply:
        return (jnp.int32(i), *gradients)
    return jax.tree.map(jnp.copy, gradients[i % 2])


def compile_step(tx: Any, apply: bool, shapes: list, dtype: str) -> tuple[Any, dict]:
    """The step, with donated parameters and state, and what it holds by XLA's account."""
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(tx.init, leaves)
    jitted = jax.jit(
        functools.partial(step, tx, apply), donate_argnums=(0, 2) if apply else (0, 1, 2)
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    gradients = (number, leaves, leaves) if apply else leaves
    compiled = jitted.lower(leaves, gradients, state).compile()
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    if apply:  # those that arise are all that a training step would hold
        peak -= 2 * array_bytes(leaves)
    row = {"least_bytes": moved_bytes(state, leaves), "state_bytes": array_bytes(state)}
    row |= {"temporary_bytes": memory.temp_size_in_bytes, "peak_bytes": peak}
    return compiled, row


def made(shapes: list, dtype: str, seed: int = 0) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    make = jax.jit(
        lambda key, shape: 0.01 * jax.random.normal(key, shape, dtype), static_argnums=1
    )
    return [make(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def measure(
    tx: Any, compiled: Any, gradients: list, steps: int, apply: bool = False
) -> dict[str, float]:
    """Seconds of one of several steps in a row, on two batches of gradients by turns."""
    params = jax.tree.map(jnp.copy, gradients[0])
    state = jax.jit(tx.init)(params)
    times = []
    for _ in range(4):  # the first warms up
        each = [given(gradients, apply, i) for i in range(steps)]
        jax.block_until_ready((each, params, state))
        began = time.perf_counter()
        for own in each:
            params, updates, state = compiled(params, own, state)
        jax.block_until_ready((params, updates, state))
        times.append((time.perf_counter() - began) / steps)
    return {"seconds": statistics.median(times[1:]), "slowest": max(times[1:])}


def making(gradients: list, steps: int) -> float:
    """Seconds that gradients take to arise, which an applied step contains."""
    make = jax.jit(arisen)
    jax.block_until_ready(make(jnp.int32(0), *gradients))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        for i in range(steps):
            arose = make(jnp.int32(i), *gradients)
        jax.block_until_ready(arose)
        times.append((time.perf_counter() - began) / steps)
    return statistics.median(times[1:])


def copy_bandwidth(size: int, steps: int) -> float:
    """Bytes read and written a second by a copy of float32 numbers."""
    x = jax.random.normal(jax.random.key(0), (size // 4,))
    copy = jax.jit(lambda x: -x, donate_argnums=0)
    x = jax.block_until_ready(copy(x))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(steps):
            x = copy(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / steps)
    return 2 * x.size * 4 / statistics.median(times)


def line(row: dict[str, Any]) -> str:
    kind = f"{'stacked' if row['stacked'] else 'leaves'} "
    kind += "applied" if row["apply"] else "alone"
    return (
        f"{row['size']} {row['dtype']:8} {kind:15} {row['name']:40} "
        f"{row['seconds'] * 1e3:8.3f} ms {row['bytes_a_second'] / 1e9:5.0f} GB/s "
        f"{row['ratio_to_adamw']:5.2f} x adamw {row['ratio_to_copy']:5.2f} x copy "
        f"{row['peak_bytes'] / 1e9:6.2f} GB"
    )


def wanted(case: Case, only: str) -> bool:
    """All cases, or those whose line has a text; what they are compared with, always."""
    return case.name == FIRST or only in " ".join(map(str, case))


def prepare(case: Case) -> Any:
    """Its compiled step, or why there is none."""
    widths = WIDTHS.get(case.size, (64, 256, 1))
    shapes = llama_like(*widths, stacked=case.stacked)
    try:
        return compile_step(peers()[case.name], case.apply, shapes, case.dtype)
    except Exception as error:  # of one peer: the others go on
        return f"{type(error).__name__}: {str(error)[:200]}"


def run(
    enough: Callable[[], bool],
    keep: Callable,
    threads: int,
    only: str = "",
    tiny: bool = False,
) -> None:
    """Compiles all in threads, then times one after the other; keeps all rows so far."""
    steps = 2 if tiny else 10
    copy = copy_bandwidth(2**16 if tiny else 2**32, steps)
    print(f"copy: {copy / 1e9:.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        listed = [case for case in cases(tiny) if wanted(case, only)]
        prepared = dict(zip(listed, pool.map(prepare, listed), strict=True))
    print(f"{len(listed)} programs compiled in {time.monotonic() - began:.0f} s")
    kept: tuple[Any, Any] = (None, None)
    for case in listed:
        if enough():
            print("time is over")
            return
        kind = case[:3]
        if kept[0] != kind:
            kept = (None, None)
            kept = (kind, Kind(case, steps))
        row = timed(case, prepared.pop(case), kept[1], copy)
        rows.append(row)
        print(line(row) if "seconds" in row else row, flush=True)
        keep({"copy_bytes_a_second": copy, "rows": rows})


class Kind:
    """Gradients that several cases share, and what they are compared with."""

    def __init__(self, case: Case, steps: int):
        shapes = llama_like(*WIDTHS.get(case.size, (64, 256, 1)), case.stacked)
        self.gradients = [made(shapes, case.dtype, seed) for seed in (0, 1)]
        self.making = making(self.gradients, steps)
        self.number = sum(map(math.prod, shapes))
        self.steps = steps
        self.adamw: dict[bool, float] = {}


def timed(case: Case, prepared: Any, kind: Kind, copy: float) -> dict[str, Any]:
    """A row of the results."""
    try:
        compiled, row = prepared
        tx = peers()[case.name]
        row |= measure(tx, compiled, kind.gradients, kind.steps, case.apply)
    except Exception as error:  # of one case, such as out of memory: the others go on
        failed = prepared if isinstance(prepared, str) else f"{error}"[:200]
        return {**case._asdict(), "failed": failed}
    if case.apply:
        row["making_seconds"] = kind.making
        row["seconds"] -= kind.making
    first = kind.adamw.setdefault(case.apply, row["seconds"])  # with float32 state
    row["parameters"] = kind.number
    row["ratio_to_adamw"] = row["seconds"] / first
    row["bytes_a_second"] = row["least_bytes"] / row["seconds"]
    row["ratio_to_copy"] = copy / row["bytes_a_second"]
    return {**case._asdict(), **row}
