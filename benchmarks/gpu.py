"""Checks the kernels on the GPU that is here, and times them against their peers.

    python benchmarks/gpu.py [--minutes 8] [--output FOLDER]

First every case of tests/kernel_cases.py runs 50 steps on the device; each step both
kernel and XLA start from the kernel's state. Then one step is timed, alone and with
`apply_updates`, at 1e9 and 1e8 parameters in the shapes of Llama's layers. One table
and gpu.json are the result. When the minutes are over, what was measured is kept.
"""

import argparse
import functools
import math
import pathlib
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import optax

from common import SETTINGS, report
from microadam_optax import microadam, scale_by_microadam
from microadam_optax.memory import array_bytes

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import kernel_cases

CHECKED_STEPS = 50
WIDTHS = {"1e9": (4096, 11008, 5), "1e8": (2048, 5504, 2)}  # embed, MLP, layers
PROGRAMS = ((1, 1), (2, 1), (4, 4), (8, 8))  # rows and warps
DECAY = 1e-4  # optax.adamw's default


def kernel_here() -> str:
    """The kernel of this GPU; elsewhere, to try the script, the same interpreted."""
    return "pallas" if jax.default_backend() == "gpu" else "interpret_gpu"


@jax.jit
def differences(ours, theirs) -> jax.Array:
    """Codes and other numbers of the state that differ, and how far updates do."""
    (updates, state), (want, want_state) = ours, theirs
    same = jax.tree.map(
        lambda a, b: jnp.sum((a != b) & ~((a != a) & (b != b))), state, want_state
    )
    other = jax.tree.leaves(same._replace(codes=None))
    got, want = (x.astype(jnp.float32) for x in (updates, want))
    unit = float(jnp.finfo(updates.dtype).eps) * jnp.maximum(jnp.abs(want), 1)
    apart = jnp.where(jnp.isfinite(want), jnp.abs(got - want) / unit, 0)
    found = (same.codes, sum(other), jnp.max(apart))
    return jnp.stack([x.astype(jnp.float32) for x in found])


def check(shape, dtype, arguments, steps: int) -> dict:
    """How far the kernel's steps are from XLA's, each from the kernel's state."""
    arguments = {**arguments, "dense": None}
    kernel = scale_by_microadam(**arguments, implementation=kernel_here())
    xla = scale_by_microadam(**arguments, implementation="xla")
    ours, theirs = jax.jit(kernel.update), jax.jit(xla.update)
    state = kernel.init(jnp.zeros(shape, dtype))
    found = []
    for gradient in kernel_cases.gradients(shape, dtype, steps):
        want = theirs(gradient, state)
        got = ours(gradient, state)
        found.append(differences(got, want))
        state = got[1]
    codes, other, _ = (float(x) for x in sum(found))
    elements = steps * sum(x.size for x in jax.tree.leaves(state))
    worst = float(max(x[2] for x in found))
    # Both divide approximately on a GPU; a code next to a boundary may go either way.
    passed = max(codes, other) <= 1e-4 * elements and worst <= 64
    return {
        "codes": codes,
        "other_state": other,
        "elements": elements,
        "worst_update": worst,
        "passed": passed,
    }


def llama_like(embed: int, mlp: int, layers: int) -> list[tuple[int, ...]]:
    """Layers stacked, as they are for a scan over them: nine leaves."""
    layer = [(embed, embed)] * 4 + [(embed, mlp)] * 2 + [(mlp, embed)] + [(embed,)] * 2
    return [(layers, *shape) for shape in layer]


def with_float32_state(tx: optax.GradientTransformation):
    """optax's own moments have the dtype of the parameters."""

    def init(params):
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params):
        new, state = tx.update(updates, state, params)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, updates), state

    return optax.GradientTransformation(init, update)


def peers(small: bool) -> dict[str, optax.GradientTransformation]:
    own = functools.partial(microadam, 1e-3, weight_decay=DECAY)
    table = {
        "optax.adamw, float32 state": with_float32_state(optax.adamw(1e-3)),
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
    }
    for implementation, label in ((kernel_here(), "kernel"), ("xla", "XLA")):
        for name, settings in SETTINGS.items():
            tx = own(**settings, implementation=implementation)
            table[f"MicroAdam {name}, {label}"] = tx
    galore = getattr(optax.contrib, "galore", None)
    if galore and small:  # its projections are singular value decompositions
        never, always = 10**9, 1
        table["optax.contrib.galore"] = galore(1e-3, update_proj_gap=never)
        table["optax.contrib.galore, projecting"] = galore(1e-3, update_proj_gap=always)
    return table


def moved_bytes(state, params) -> int:
    """The least that a step moves: gradients, parameters and state are read once.

    And the state is written, and the update, or the parameters it is applied to.
    """
    total = 3 * array_bytes(params)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        size = x.size * x.dtype.itemsize
        windowed = {"indices", "values"} & {getattr(key, "name", None) for key in path}
        total += size if windowed else 2 * size  # of a window, one slot is written
    return total


def seconds(compiled, params, gradients, state, steps: int) -> tuple[float, list]:
    """Of one of several steps in a row, each with gradients of its own to overwrite."""
    copies = [jax.tree.map(lambda x: x + 0, gradients) for _ in range(steps)]
    jax.block_until_ready((copies, params, state))
    began = time.perf_counter()
    for copy in copies:
        params, updates, state = compiled(params, copy, state)
    jax.block_until_ready((params, updates, state))
    return (time.perf_counter() - began) / steps, [params, state]


def measure(tx, params, gradients, apply: bool, steps: int) -> dict:
    def step(params, gradients, state):
        updates, state = tx.update(gradients, state, params)
        if apply:
            params = optax.apply_updates(params, updates)
            updates = None
        return params, updates, state

    params = jax.tree.map(lambda x: x + 0, params)
    state = jax.jit(tx.init)(params)
    least = moved_bytes(state, params)
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, gradients, state)
    began = time.perf_counter()
    compiled = lowered.compile()
    row = {"compile_seconds": time.perf_counter() - began, "least_bytes": least}
    memory = compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes
    row["peak_bytes"] = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    row["state_bytes"] = array_bytes(state)
    times = []
    for _ in range(4):  # the first warms up
        time_of_step, (params, state) = seconds(compiled, params, gradients, state, steps)
        times.append(time_of_step)
    return row | {"seconds": statistics.median(times[1:])}


def copy_bandwidth(size: int, steps: int) -> float:
    """Bytes read and written a second by a copy of float32 numbers."""
    x = jax.random.normal(jax.random.key(0), (size // 4,))
    copy = jax.jit(lambda x: -x, donate_argnums=0)
    jax.block_until_ready(copy(x + 0))
    times = []
    for _ in range(5):
        jax.block_until_ready(x)
        began = time.perf_counter()
        for _ in range(steps):
            x = copy(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / steps)
    return 2 * x.size * 4 / statistics.median(times)


def tune(shapes, dtype: str, steps: int) -> dict:
    """Seconds of the kernels alone for each number of rows and warps of a program."""
    from microadam_optax._kernels import gpu

    original, found = gpu.update, {}
    gradients = [0.01 * jax.random.normal(jax.random.key(1), s, dtype) for s in shapes]
    for name, settings in SETTINGS.items():
        for rows, warps in PROGRAMS:
            gpu.update = functools.partial(original, rows=rows, warps=warps)
            jax.clear_caches()
            tx = scale_by_microadam(**settings, implementation=kernel_here())
            result = measure(tx, gradients, gradients, apply=False, steps=steps)
            found[f"{name}, {rows} rows, {warps} warps"] = result["seconds"]
            print(
                f"  {name}, {rows} rows, {warps} warps: {result['seconds'] * 1e3:.3f} ms"
            )
    gpu.update = original
    jax.clear_caches()
    return found


def compare(size: str, widths, dtype: str, copy: float, enough, steps: int) -> list[dict]:
    shapes = llama_like(*widths)
    number = sum(map(math.prod, shapes))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = [
        0.01 * jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    rows = []
    adamw: dict[bool, float] = {}
    for name, tx in peers(small=number < 5e8).items():
        for apply in (False, True):
            if enough():
                return rows
            try:
                row = measure(tx, gradients, gradients, apply, steps)
            except Exception as error:  # of one peer, such as out of memory: kept
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{size} {dtype} {name}: {reason}")
                row = {"failed": reason}
                rows.append({"size": size, "dtype": dtype, "name": name, **row})
                continue
            adamw.setdefault(apply, row["seconds"])  # the first, with float32 state
            row["ratio_to_adamw"] = row["seconds"] / adamw[apply]
            row["bytes_a_second"] = row["least_bytes"] / row["seconds"]
            row["ratio_to_copy"] = copy / row["bytes_a_second"]
            labels = {"size": size, "parameters": number, "dtype": dtype, "name": name}
            rows.append({**labels, "apply_updates": apply, **row})
            print(line(rows[-1]))
    return rows


def line(row: dict) -> str:
    return (
        f"{row['size']} {row['dtype']:8} {row['name']:34} "
        f"{'applied' if row['apply_updates'] else 'alone':7} "
        f"{row['seconds'] * 1e3:8.3f} ms {row['bytes_a_second'] / 1e9:6.0f} GB/s "
        f"{row['ratio_to_adamw']:5.2f} x adamw {row['ratio_to_copy']:5.2f} x copy "
        f"{row['peak_bytes'] / 1e9:6.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", help="folder for gpu.json, not benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="only to try the script")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    began = time.monotonic()

    def enough(minutes: float = args.minutes) -> bool:
        return time.monotonic() - began > 60 * minutes

    results: dict = {"checks": {}, "tuning": {}, "rows": []}
    cases = dict(list(kernel_cases.CASES.items())[: 2 if args.tiny else None])
    for name, case in cases.items():
        found = check(*case, steps=2 if args.tiny else CHECKED_STEPS)
        results["checks"][name] = found
        print(f"{'passed' if found['passed'] else 'FAILED'}: {name}: {found}")
    sizes = {"tiny": (64, 128, 1)} if args.tiny else WIDTHS
    steps = 2 if args.tiny else 10
    copy = results["copy_bytes_a_second"] = copy_bandwidth(
        2**16 if args.tiny else 2**32, steps
    )
    print(f"copy: {copy / 1e9:.0f} GB/s")
    report("gpu", results, args.output)
    for dtype in ("bfloat16", "float32"):
        for size, widths in sizes.items():
            results["rows"] += compare(size, widths, dtype, copy, enough, steps)
            report("gpu", results, args.output)
    if not enough():
        *_, smallest = sizes.values()
        results["tuning"] = tune(llama_like(*smallest), "bfloat16", steps)
        report("gpu", results, args.output)
    failed = [name for name, found in results["checks"].items() if not found["passed"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
