"""Whether the GPU's kernel computes what XLA does, there and on the CPU.

Each step starts from the kernel's state, so that differences do not add up. Both GPU
programs divide approximately; a CPU does not.
"""

import functools
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

import kernel_cases
from microadam_optax import PAPER, accumulate, microadam, scale_by_microadam

STEPS = 50
SETTINGS: dict[str, dict[str, Any]] = {
    "(2, 6 %)": {},
    "(1, 25 %)": {"window": 1, "density": 0.25},
    "(10, 1 %)": PAPER,
}
BLOCKS: dict[str, tuple[tuple[int, int], dict[str, int]]] = {  # a leaf, arguments
    "256": ((16, 2048), {"block_size": 256}),
    "232": ((4, 11008), {}),
    "96": ((16, 768), {}),
    "64": ((16, 2048), {"block_size": 64}),
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def cases() -> dict[str, tuple]:
    """Shape, dtype and arguments of a leaf: the tests' cases, and all that is common."""
    common = {
        f"{name}, blocks of {block}, {dtype}": (shape, DTYPES[dtype], settings | more)
        for (name, settings), (block, (shape, more)), dtype in itertools.product(
            SETTINGS.items(), BLOCKS.items(), DTYPES
        )
    }
    return kernel_cases.CASES | common


def kernel_here() -> str:
    """The kernel of this GPU; elsewhere, to try the script, the same interpreted."""
    return "pallas" if jax.default_backend() == "gpu" else "interpret_gpu"


@jax.jit
def differences(ours: Any, theirs: Any) -> jax.Array:
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


def check(
    shape: tuple[int, ...], dtype: Any, arguments: dict[str, Any], steps: int = STEPS
) -> dict[str, Any]:
    """How far the kernel's steps are from XLA's on this device and on a CPU."""
    arguments = {**arguments, "dense": None}
    kernel = scale_by_microadam(**arguments, implementation=kernel_here())
    xla = scale_by_microadam(**arguments, implementation="xla")
    ours, theirs = jax.jit(kernel.update), jax.jit(xla.update)
    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    state = kernel.init(jnp.zeros(shape, dtype))
    found: dict[str, list] = {"xla": [], "cpu": []}
    for gradient in kernel_cases.gradients(shape, dtype, steps):
        args = (gradient, state)
        got = ours(*args)
        found["xla"].append(differences(got, theirs(*args)))
        want = theirs(*jax.device_put(args, cpu))
        found["cpu"].append(differences(got, jax.device_put(want, here)))
        state = got[1]
    elements = steps * sum(x.size for x in jax.tree.leaves(state))
    result: dict[str, Any] = {"elements": elements, "passed": True}
    for name, steps_found in found.items():
        codes, other, _ = (float(x) for x in sum(steps_found))
        worst = float(max(x[2] for x in steps_found))
        result[name] = {"codes": codes, "other_state": other, "worst_update": worst}
        # A code next to a boundary may go either way, by an approximate division.
        result["passed"] &= max(codes, other) <= 1e-4 * elements and worst <= 64
    return result


def contexts() -> dict[str, dict[str, Any]]:
    """Whether None, the default, is the kernel and is right, wherever it is called."""
    leaf = 0.01 * jax.random.normal(jax.random.key(0), (4, 64, 1024))
    own, xla = (microadam(1e-3, implementation=x) for x in (None, "xla"))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    whole = jax.sharding.PartitionSpec("data")

    def step(tx: Any, g: jax.Array) -> jax.Array:
        updates, state = tx.update(g, tx.init(g), g)
        return tx.update(0.5 * g, state, g)[0] + updates

    def scanned(tx: Any, g: jax.Array) -> jax.Array:
        def body(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(g, state, g)
            return state, updates

        return jax.lax.scan(body, tx.init(g[0]), g)[1]

    def mapped(tx: Any, g: jax.Array) -> jax.Array:
        return jax.vmap(functools.partial(step, tx))(g)

    def in_shards(tx: Any, g: jax.Array) -> jax.Array:
        one = functools.partial(step, tx)
        return jax.shard_map(one, mesh=mesh, in_specs=whole, out_specs=whole)(g)

    def kept(tx: Any, g: jax.Array) -> jax.Array:
        return jax.checkpoint(functools.partial(step, tx))(g)

    found = {}
    for f in (step, scanned, mapped, in_shards, kept):
        compiled = jax.jit(functools.partial(f, own)).lower(leaf).compile()
        apart = jnp.abs(compiled(leaf) - jax.jit(functools.partial(f, xla))(leaf))
        kernel = "microadam" in compiled.as_text() and "triton" in compiled.as_text()
        worst = float(jnp.max(apart))
        found[f.__name__] = {"kernel": kernel, "worst": worst}
        found[f.__name__]["passed"] = kernel and worst <= 1e-8
    return found


def micro_batches(every: int = 3, steps: int = 12) -> dict[str, dict[str, Any]]:
    """Numbers of the state that differ from XLA's where gradients are accumulated."""
    found = {}
    for (name, settings), dtype in itertools.product(SETTINGS.items(), ("f32", "bf16")):
        kernel, xla = (
            accumulate(scale_by_microadam(**settings, implementation=x), every)
            for x in (kernel_here(), "xla")
        )
        ours, theirs = jax.jit(kernel.update), jax.jit(xla.update)
        shape = (16, 2048)
        state, differing = kernel.init(jnp.zeros(shape, DTYPES[dtype])), 0
        for gradient in kernel_cases.gradients(shape, DTYPES[dtype], steps):
            (_, new), (_, want) = (f(gradient, state) for f in (ours, theirs))
            same = jax.tree.map(lambda a, b: int(jnp.sum(a != b)), new, want)
            differing, state = differing + sum(jax.tree.leaves(same)), new
        label = f"{name}, {dtype}, {every} micro-batches"
        found[label] = {"differing": differing, "passed": differing == 0}
    return found


def _named(name: str, steps: int) -> tuple[str, dict[str, Any]]:
    try:
        return name, check(*cases()[name], steps=steps)
    except Exception as error:  # of one case: the others go on
        return name, {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}


def run(processes: int, steps: int = STEPS, only: str = "") -> dict[str, Any]:
    """All cases, shared by processes."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    names = [name for name in cases() if only in name]
    found = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for name, result in pool.map(_named, names, itertools.repeat(steps)):
            found[name] = result
            if not result["passed"] or "xla" not in result:
                print(f"FAILED {name}: {result}", flush=True)
    for key in ("xla", "cpu"):
        rows = [x[key] for x in found.values() if key in x]
        total = sum(x["codes"] for x in rows), sum(x["other_state"] for x in rows)
        worst = max((x["worst_update"] for x in rows), default=0)
        elements = sum(x.get("elements", 0) for x in found.values())
        print(
            f"against {key}: {len(rows)} cases, {elements} numbers of state, differing "
            f"codes {total[0]:.0f}, others {total[1]:.0f}, updates by {worst:.1f} ulp"
        )
    return found
