"""Invariants over many steps of small problems, and the rate of convergence.

python reliability/long_runs.py    # 100,000 steps each, a few minutes
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
from microadam_optax import microadam, scale_by_microadam  # noqa: E402

RESULT = ROOT / "reliability" / "results" / "long_runs.json"
SETTINGS = {
    "(10, 1 %)": {"window": 10, "density": 0.01, "match_adam": False},  # as in PAPER
    "(2, 6 %)": {"window": 2, "density": 0.06},
    "(2, 6 %), stochastic": {"window": 2, "density": 0.06, "stochastic_rounding": True},
}
SIZE = 500  # two blocks of 256, of which 12 elements pad
HALF_BFLOAT16, HALF_FLOAT32 = 2.0**-9, 2.0**-24  # relative rounding errors
LENGTHS = (1_000, 3_000, 10_000, 30_000, 100_000)  # of runs that show the rate
SEEDS = 3


def gradients(key: jax.Array, size: int = SIZE) -> jax.Array:
    """Coordinates of very different size, and a tenth of them at a time."""
    normal, sparse = jax.random.split(key)
    scale = jnp.exp(jnp.linspace(-4, 2, size))
    seen = jax.random.bernoulli(sparse, 0.1, (size,))
    return jnp.where(seen, scale * jax.random.normal(normal, (size,)), 0)


def error_of(state: Any, bits: int = 4) -> jax.Array:
    """The error feedback of the only leaf, in blocks, padding included."""
    codes = state.codes.reshape(-1, state.codes.shape[-1])
    step, zero = jnp.split(state.ranges.astype(jnp.float32).reshape(-1, 2), 2, axis=-1)
    parts = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return (jnp.concatenate(parts, -1).astype(jnp.float32) - zero) * step


def make(setting: str) -> optax.GradientTransformation:
    return scale_by_microadam(**SETTINGS[setting], shards=1, dense=None)


def error_norms(setting: str, steps: int) -> dict[str, float]:
    """The largest norms of the error, over the gradients' mean norm."""
    tx = make(setting)

    def step(state: Any, key: jax.Array) -> Any:
        g = gradients(key)
        _, state = tx.update(g, state)
        norm = jnp.linalg.norm
        return state, (norm(error_of(state)), norm(g))

    keys = jax.random.split(jax.random.key(0), steps)
    _, (errors, norms) = jax.jit(functools.partial(jax.lax.scan, step))(
        tx.init(jnp.zeros(SIZE)), keys
    )
    errors = np.asarray(errors) / float(norms.mean())
    return {
        "largest_of_first_half": float(errors[: steps // 2].max()),
        "largest_of_last_half": float(errors[steps // 2 :].max()),
        "last": float(errors[-1]),
    }


def conservation(setting: str, steps: int) -> dict[str, float]:
    """Sum of the gradients against that of what was selected and the error.

    Per coordinate they differ by the roundings alone: a step of the error's codes in
    each step (half of one to nearest), the selected value's to bfloat16, as the state
    holds it, and float32's of the sum.
    """
    tx = make(setting)
    rounding = 1.0 if "stochastic" in setting else 0.5

    def step(carry: Any, key: jax.Array) -> Any:
        state = carry
        g = gradients(key)
        before = error_of(state)
        _, state = tx.update(g, state)
        blocks = state.codes.shape[-2]
        slots = state.ages.size
        k = state.indices.shape[-1] // slots
        newest = (state.count - 1) % slots * k
        at = jax.lax.dynamic_slice_in_dim(state.indices, newest, k, -1)
        value = jax.lax.dynamic_slice_in_dim(state.values, newest, k, -1)
        at, value = at.reshape(blocks, k), value.reshape(blocks, k).astype(jnp.float32)
        rows = jnp.arange(blocks)[:, None]
        selected = jnp.zeros(before.shape).at[rows, at.astype(jnp.int32)].set(value)
        width = state.ranges.astype(jnp.float32).reshape(-1, 2)[:, :1]
        return state, (g, selected, before, error_of(state), width)

    keys = jax.random.split(jax.random.key(0), steps)
    state = tx.init(jnp.zeros(SIZE))
    scan = jax.jit(functools.partial(jax.lax.scan, step))
    blocks = state.codes.shape[-2]
    total = np.zeros((blocks, state.codes.shape[-1] * 2))
    bound = np.zeros_like(total)
    pieces = max(1, steps // 1000)  # float64 sums on the host
    for part in np.array_split(np.arange(steps), pieces):
        state, found = scan(state, keys[part])
        g, selected, before, after, width = (np.asarray(x, np.float64) for x in found)
        padded = np.zeros((len(part), total.size))
        padded[:, :SIZE] = g
        g = padded.reshape(len(part), *total.shape)
        total += (g - selected).sum(0)
        unselected = selected == 0
        bound += (rounding * width * unselected).sum(0)
        bound += HALF_BFLOAT16 * np.abs(selected).sum(0) * (1 + 2.0**-7)
        bound += HALF_FLOAT32 * (np.abs(g) + 2 * np.abs(before)).sum(0)
    gap = np.abs(total - after[-1])
    bound += np.finfo(np.float64).eps * steps * np.abs(total)
    real = bound > 0
    return {
        "largest_gap": float(gap.max()),
        "largest_gap_over_bound": float((gap[real] / bound[real]).max()),
        "mean_gap_over_bound": float((gap[real] / bound[real]).mean()),
    }


def untouched(setting: str, steps: int) -> dict[str, float]:
    """A third of the coordinates never has a gradient, in blocks where others do."""
    tx = optax.chain(make(setting), optax.scale(-1e-3))
    touched = jnp.arange(SIZE) % 3 != 0

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jnp.where(touched, gradients(key), 0), state)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(SIZE), tx.init(jnp.zeros(SIZE))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(start, keys)
    error = np.asarray(error_of(state[0])).ravel()
    still = ~np.asarray(touched)
    params = np.asarray(params)
    return {
        "moved": int((params[still] != 0).sum()),
        "error": int((error[:SIZE][still] != 0).sum()),
        "padding": int((error[SIZE:] != 0).sum()),
        "others_moved": float((params[~still] != 0).mean()),
    }


def mean_gradient(tx_of: Callable, rate: float, steps: int, seed: int) -> float:
    """Mean square of the true gradient over a run on a noisy non-convex function.

    f(x) = sum of x**2 / (1 + x**2) with curvatures from 0.1 to 10, gradients with
    normal noise of deviation 1; the learning rate falls as ``steps**-0.5``.
    """
    scale = jnp.logspace(-0.5, 0.5, SIZE)
    tx = tx_of(rate / steps**0.5)

    def true_gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum((scale * x) ** 2 / (1 + (scale * x) ** 2)))(x)

    def step(carry: Any, key: jax.Array) -> Any:
        x, state, total = carry
        g = true_gradient(x)
        noisy = g + jax.random.normal(key, g.shape)
        updates, state = tx.update(noisy, state, x)
        return (optax.apply_updates(x, updates), state, total + jnp.mean(g**2)), None

    x = jax.random.normal(jax.random.key(seed), (SIZE,))
    keys = jax.random.split(jax.random.key(1000 + seed), steps)
    carry = x, tx.init(x), jnp.float32(0)
    (_, _, total), _ = jax.jit(functools.partial(jax.lax.scan, step))(carry, keys)
    return float(total) / steps


def rates(lengths: tuple[int, ...] = LENGTHS, seeds: int = SEEDS) -> dict[str, Any]:
    """The running mean by number of steps, and the slope of their logarithms."""
    optimizers: dict[str, tuple[Callable, float]] = {"Adam": (optax.adam, 1.0)}
    for name, settings in SETTINGS.items():
        made = functools.partial(microadam, **settings, shards=1, dense=None)
        optimizers[f"MicroAdam {name}"] = (made, 1.0)
    found = {}
    for name, (tx_of, rate) in tqdm(optimizers.items(), desc="rates"):
        means = [
            float(np.mean([mean_gradient(tx_of, rate, n, seed) for seed in range(seeds)]))
            for n in lengths
        ]
        slope = float(np.polyfit(np.log(lengths), np.log(means), 1)[0])
        found[name] = {
            "mean_square": dict(zip(lengths, means, strict=True)),
            "slope": slope,
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": common.machine(), "steps": args.steps}
    for check in (error_norms, conservation, untouched):
        result[check.__name__] = {
            name: check(name, args.steps) for name in tqdm(SETTINGS, desc=check.__name__)
        }
    result["rates"] = rates()
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
