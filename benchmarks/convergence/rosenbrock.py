"""The paper's first figure: what error feedback does, on Rosenbrock's function.

python benchmarks/convergence/rosenbrock.py

Adam, Adam that sees only the larger of the two entries of the gradient, and MicroAdam,
which sees no more of them but carries the other one on, from the paper's starting point.
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from microadam_optax import microadam

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import common

START = (-0.5, 1.0)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS, EVERY = 4000, 20


def rosenbrock(point: jax.Array) -> jax.Array:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def keep_largest(k: int) -> optax.GradientTransformation:
    """Sets all but the `k` largest entries of a vector to zero, and forgets them."""

    def update(updates: Any, params: Any = None) -> Any:
        del params
        _, kept = jax.lax.top_k(jnp.abs(updates), k)
        return jnp.zeros_like(updates).at[kept].set(updates[kept])

    return optax.stateless(update)


LITERAL = {"dense": None, "match_adam": False}
# A leaf of two is one block of 8, of which an eighth is one entry. The second number is
# the rate of the path that is drawn: MicroAdam's steps are longer, see mechanism.py.
OPTIMIZERS = {
    "Adam": (optax.adam, 3e-3),
    "Top-1 Adam, without error feedback": (
        lambda rate: optax.chain(keep_largest(1), optax.adam(rate)),
        3e-3,
    ),
    "MicroAdam, window 10, 1 of 2 entries": (
        lambda rate: microadam(rate, window=10, density=0.125, **LITERAL),
        3e-4,
    ),
    "MicroAdam, window 2, 1 of 2 entries": (
        lambda rate: microadam(rate, window=2, density=0.125, **LITERAL),
        3e-4,
    ),
}


def path(tx: optax.GradientTransformation) -> list[list[float]]:
    """Points on the way, every few steps."""

    def step(carry, _):
        point, state = carry
        updates, state = tx.update(jax.grad(rosenbrock)(point), state, point)
        return (optax.apply_updates(point, updates), state), point

    start = jnp.array(START)
    _, points = jax.lax.scan(step, (start, tx.init(start)), None, length=STEPS)
    return np.asarray(points)[::EVERY].astype(float).round(4).tolist()


def main() -> None:
    found: dict[str, Any] = {}
    for name, (make, drawn) in OPTIMIZERS.items():
        paths = {rate: path(make(rate)) for rate in RATES}
        values = {
            f"{rate:g}": float(f"{rosenbrock(jnp.array(points[-1])):.3g}")
            for rate, points in paths.items()
        }
        found[name] = {"rate": drawn, "path": paths[drawn], "last_values": values}
        print(f"{name}: {values}")
    common.report("convergence/rosenbrock", {"steps": STEPS, "optimizers": found})


if __name__ == "__main__":
    main()
