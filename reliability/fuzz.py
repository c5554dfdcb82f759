"""Random leaves, arguments and gradients against the oracle, and one way against another.

python reliability/fuzz.py --seconds 600     # from seed 0 on, until the time is over
python reliability/fuzz.py --seed 123        # one seed again

A seed draws a leaf and the arguments that shape its state, for which the update is
compiled once; then some cases, each with its own b1, b2, eps and sequence of gradients.
Every case follows the float64 oracle of tests/oracle.py. The last sequence is then run
in another way (eager, scan, donated, in a tree, sharded over 8 devices, in the kernels'
interpreter), and all bits of the state must be equal.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
import following  # noqa: E402
import oracle  # noqa: E402
from microadam_optax import scale_by_microadam, state_shardings  # noqa: E402

RESULT = ROOT / "reliability" / "results" / "fuzz.json"
CASES = 20  # of a seed
STEPS = 5  # of a case, at most
LARGEST_LEAF = 700
EDGES = (1, 2, 7, 8, 9, 16, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
PRIMES = (2, 3, 5, 7, 11, 13, 31, 61, 127, 251, 257, 509)
KINDS = ("normal", "heavy", "sparse", "ties", "zeros", "alternating", "outlier", "equal")
DTYPES = (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)
WAYS = ("eager", "scan", "donated", "tree", "sharded", "interpret_gpu", "interpret_tpu")
WAY_SHARES = (0.2, 0.15, 0.15, 0.2, 0.2, 0.05, 0.05)  # the last are slow


class Form(NamedTuple):
    """What an update is compiled for."""

    shape: tuple[int, ...]
    dtype: Any
    arguments: dict[str, Any]
    way: str


def draw_form(rng: np.random.Generator) -> Form:
    shape: tuple[int, ...] = ()
    for _ in range(rng.integers(0, 6)):
        room = LARGEST_LEAF // max(1, math.prod(shape))
        near = rng.choice([rng.integers(1, 12), rng.choice(PRIMES), rng.choice(EDGES)])
        shape = (int(min(near, max(room, 1))), *shape)
    arguments = {
        "window": int(rng.choice([1, 1, 2, 2, 3, 5, 10])),
        "density": float(rng.choice([0.001, 0.01, 0.04, 0.06, 0.12, 0.25, 0.5, 1.0])),
        "block_size": int(rng.choice([8, 16, 64, 256, 256, 264, 1024])),
        "error_bits": int(rng.choice([2, 4, 4, 8])),
        "shards": int(rng.choice([1, 2, 3, 8, 8, 16])),
        "alpha": float(rng.choice([0, 0, 0, 0.1, 0.5])),
        "stochastic_rounding": bool(rng.random() < 0.2),
        "seed": int(rng.integers(0, 2**31)),
        "match_adam": bool(rng.random() < 0.5),
    }
    dtype = DTYPES[rng.integers(len(DTYPES))]
    return Form(shape, dtype, arguments, str(rng.choice(WAYS, p=WAY_SHARES)))


def draw_gradients(rng: np.random.Generator, form: Form) -> list[jax.Array]:
    """A sequence whose kind and size change on the way."""
    top = 3.0 if form.dtype == jnp.float16 else 37.0
    size = 10.0 ** rng.choice([0, 0, 0, -3, -10, top, rng.uniform(-20, top)])
    if form.dtype == jnp.float16:
        size = max(size, 1e-3)
    first = rng.normal(size=form.shape)
    found = []
    for step in range(rng.integers(1, STEPS + 1)):
        g, kind = rng.normal(size=form.shape), rng.choice(KINDS)
        if kind == "heavy":
            g = g * np.exp(2 * rng.normal(size=form.shape))
        elif kind == "sparse":
            g = np.where(rng.random(form.shape) < 0.1, g, 0)
        elif kind == "ties":
            g = np.round(g)
        elif kind == "zeros":
            g = np.zeros(form.shape)
        elif kind == "alternating":
            g = first * (-1) ** step
        elif kind == "outlier" and g.size:
            g.flat[rng.integers(g.size)] *= 1e6 if top > 4 else 10
        elif kind == "equal":
            g = np.full(form.shape, -0.5)
        limit = float(jnp.finfo(form.dtype).max)
        found.append(jnp.asarray(np.clip(g * size, -limit, limit), form.dtype))
    return found


def draw_decays(rng: np.random.Generator) -> tuple[float, float, float]:
    b1 = rng.choice([0.0, 0.5, 0.9, 0.95, rng.random() * 0.999])
    b2 = rng.choice([0.0, 0.9, 0.95, 0.99, 0.999, 0.9999])
    return float(b1), float(b2), float(rng.choice([1e-12, 1e-8, 1e-8, 1e-3]))


def options_of(form: Form, decays: tuple[float, float, float]) -> oracle.Options:
    same = "window", "density", "block_size", "shards", "alpha", "match_adam"
    known = {name: form.arguments[name] for name in same}
    return oracle.Options(*decays, **known, bits=form.arguments["error_bits"])


def update_of(form: Form, implementation: str = "xla") -> Any:
    """The update of one leaf with b1, b2 and eps as further arguments."""

    def update(gradient, state, decays):
        b1, b2, eps = decays
        tx = scale_by_microadam(
            b1, b2, eps, implementation=implementation, dense=None, **form.arguments
        )
        return tx.update(gradient, state)

    return update


def run(update: Any, state: Any, gradients: list[jax.Array]) -> tuple[Any, Any]:
    found = []
    for gradient in gradients:
        updates, state = update(gradient, state)
        found.append(updates)
    return found, state


def another_way(form: Form, decays: Any, state: Any, gradients: list[jax.Array]) -> Any:
    """Updates and state of the sequence; None if that way does not take such a leaf."""
    update = functools.partial(update_of(form), decays=decays)
    if form.way == "eager":
        return run(update, state, gradients)
    if form.way == "donated":
        return run(jax.jit(update, donate_argnums=(0, 1)), *copies((state, gradients)))
    if form.way == "scan":
        swapped = lambda state, gradient: update(gradient, state)[::-1]  # noqa: E731
        scan = jax.jit(lambda state, gs: jax.lax.scan(swapped, state, gs))
        state, found = scan(state, jnp.stack(gradients))
        return list(found), state
    if form.way == "tree":
        return in_a_tree(form, decays, gradients)
    if form.way == "sharded":
        return sharded(form, update, state, gradients)
    try:
        return run(
            functools.partial(jax.jit(update_of(form, form.way)), decays=decays),
            state,
            gradients,
        )
    except NotImplementedError:
        return None


def copies(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def in_a_tree(form: Form, decays: Any, gradients: list[jax.Array]) -> Any:
    """First of three leaves, one of them equal and one not."""

    def tree(x: jax.Array) -> Any:
        return {"a": x, "b": (x, jnp.ones((3, 40), jnp.bfloat16))}

    b1, b2, eps = decays
    tx = scale_by_microadam(b1, b2, eps, **form.arguments, dense=None)
    update, state = jax.jit(tx.update), tx.init(tree(gradients[0]))
    found, state = run(update, state, [tree(x) for x in gradients])
    fields = (getattr(state, x) for x in ("codes", "ranges", "indices", "values"))
    own = [None if x is None else x["a"] for x in fields]
    names = ("codes", "ranges", "indices", "values")
    return [x["a"] for x in found], state._replace(**dict(zip(names, own, strict=True)))


def sharded(form: Form, update: Any, state: Any, gradients: list[jax.Array]) -> Any:
    """Over as many devices as divide one of the axes."""
    axes = list(enumerate(form.shape))
    ways = [(axis, n) for axis, size in axes for n in (8, 4, 2) if not size % n]
    if not ways:
        return None
    axis, number = ways[0]
    mesh = jax.make_mesh((number,), ("x",), axis_types=(AxisType.Auto,))
    spec = P(*(("x" if i == axis else None) for i in range(len(form.shape))))
    place = jax.NamedSharding(mesh, spec)
    gradients = [jax.device_put(x, place) for x in gradients]
    tx = scale_by_microadam(**form.arguments, dense=None)
    places = state_shardings(tx, gradients[0])
    jitted = jax.jit(update, out_shardings=(place, places))
    return run(jitted, jax.device_put(state, places), gradients)


def same_bits(one: Any, other: Any) -> None:
    """Also of zeros and of NaN."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def check(seed: int, cases: int = CASES) -> dict[str, Any]:
    """Counts of what was compared; AssertionError that says how to do it again."""
    rng = np.random.default_rng(seed)
    form = draw_form(rng)
    try:
        return _check(rng, form, cases)
    except Exception as error:
        again = f"python reliability/fuzz.py --seed {seed}"
        raise AssertionError(f"seed {seed}, {form}: {error} ({again})") from error


def _check(rng: np.random.Generator, form: Form, cases: int) -> dict[str, Any]:
    tx = scale_by_microadam(**form.arguments, dense=None)
    start = tx.init(jnp.zeros(form.shape, form.dtype))
    compiled = jax.jit(update_of(form))
    seed = form.arguments["seed"] if form.arguments["stochastic_rounding"] else None
    counts = {"cases": 0, "steps": 0, "decisions": 0, "way": form.way}
    for _ in range(cases):
        gradients, decays = draw_gradients(rng, form), draw_decays(rng)
        update = functools.partial(compiled, decays=decays)
        options = options_of(form, decays)
        decided = following.follow(update, start, gradients, options, seed)
        counts["cases"] += 1
        counts["steps"] += len(gradients)
        counts["decisions"] += decided
    expected = run(update, start, gradients)
    other = another_way(form, decays, start, gradients)
    if other is None:
        counts["way"] = "no other"
    elif form.way.startswith("interpret"):
        same_bits(expected[1], other[1])  # updates differ by float32's rounding
    else:
        same_bits(expected, other)
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", 8)
    if args.seed is not None:
        print(check(args.seed))
        return 0
    return many(args.first, args.seconds, args.output)


def many(first: int, seconds: float, output: pathlib.Path) -> int:
    """Seeds until the time is over; what was done is on disk every 50 of them."""
    output.parent.mkdir(exist_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    ways: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    with tqdm(unit="case") as bar:
        for seed in itertools.count(first):
            found = check(seed)
            ways[found.pop("way")] += 1
            counts.update(found)
            bar.update(found["cases"])
            spent = time.monotonic() - began
            if seed % 50 == 49 or spent > seconds:
                jax.clear_caches()  # else programs of all leaves stay in memory
                result = {"machine": common.machine(), "seeds": [first, seed]}
                result |= {"seconds": round(spent), **counts}
                result["compared_in_another_way"] = dict(sorted(ways.items()))
                output.write_text(json.dumps(result, indent=1) + "\n")
            if spent > seconds:
                return 0


if __name__ == "__main__":
    sys.exit(main())
