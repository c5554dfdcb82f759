"""Why short windows train better: what becomes of a selected entry, and of the rest.

python benchmarks/convergence/mechanism.py

1. How far a coordinate moves after it was selected once, in learning rates, by step.
2. All optimizers are fed the same gradients, those along Adam's own training of the byte
   language model. How well do their updates, summed over some steps, agree with Adam's
   (the cosine), and what share of coordinates moves in a step?
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import methods
import study
import training
from microadam_optax import scale_by_microadam

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import common

SETTINGS = {
    "(10, 1 %)": (10, 0.01),
    "(5, 2 %)": (5, 0.02),
    "(3, 4 %)": (3, 0.04),
    "(2, 6 %)": (2, 0.06),
    "(2, 12 %)": (2, 0.12),
    "(1, 4 %)": (1, 0.04),
    "(1, 12 %)": (1, 0.12),
}
LATE = 10_000  # steps, after which the bias correction is 1
AFTER = 15  # steps that are watched after a selection
HORIZONS = (1, 3, 10, 30, 100, 300)  # steps over which updates are summed
STEPS, BEGIN = 900, 300  # of training, of which the first are not looked at


def transformation(window: int, density: float) -> optax.GradientTransformation:
    literal = {"dense": None, "match_adam": False}
    return scale_by_microadam(window=window, density=density, **literal)


def moves(tx: optax.GradientTransformation) -> list[float]:
    """Updates of a coordinate that had one gradient, and none before or after."""
    size = 256
    state = tx.init(jnp.zeros(size))
    state = state._replace(count=jnp.int32(LATE))
    pulse = jnp.zeros(size).at[7].set(1.0)
    update, seen = jax.jit(tx.update), []
    for step in range(AFTER):
        updates, state = update(pulse if step == 0 else jnp.zeros(size), state)
        seen.append(round(float(updates[7]), 4))
    return seen


def matrices(tree: Any) -> list[jax.Array]:
    """The leaves that are compressed in every method, flat."""
    return [x.ravel() for x in jax.tree.leaves(tree) if x.size >= methods.SMALL]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30))


def along_adam() -> dict[str, dict[str, Any]]:
    """Each setting's updates beside Adam's, on the gradients of Adam's path."""
    task = study.language()
    followed = {name: transformation(*some) for name, some in SETTINGS.items()}
    adam, rate = optax.scale_by_adam(), methods.PEERS["Adam"].centre
    params, stream = task.init(0), task.batches(0)

    @jax.jit
    def step(params, state, others, batch):
        gradients = jax.grad(task.loss)(params, batch)
        gradients, _ = optax.clip_by_global_norm(training.CLIP).update(
            gradients, optax.EmptyState()
        )
        updates, state = adam.update(gradients, state)
        moved, kept = {"Adam": jnp.concatenate(matrices(updates))}, {}
        for name, tx in followed.items():
            mine, kept[name] = tx.update(gradients, others[name])
            moved[name] = jnp.concatenate(matrices(mine))
        params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
        return params, state, kept, moved

    state = adam.init(params)
    others = {name: tx.init(params) for name, tx in followed.items()}
    sums: dict[str, np.ndarray] = {}
    figures: dict[str, dict[str, Any]] = {
        name: {"cosine": {str(h): [] for h in HORIZONS}, "moving": []}
        for name in SETTINGS
    }
    # Running sums at the start of each horizon's present interval.
    marks: dict[int, dict[str, np.ndarray]] = {}
    for number in tqdm(range(1, STEPS + 1), unit="step"):
        params, state, others, moved = step(params, state, others, next(stream))
        if number <= BEGIN:
            continue
        now = {name: np.asarray(x, np.float64) for name, x in moved.items()}
        for name in SETTINGS:
            figures[name]["moving"].append(float((now[name] != 0).mean()))
        if not sums:
            sums = {name: np.zeros_like(x) for name, x in now.items()}
            marks = {h: {name: x.copy() for name, x in sums.items()} for h in HORIZONS}
        for name, x in now.items():
            sums[name] += x
        for h in HORIZONS:
            if (number - BEGIN) % h == 0:
                parts = {name: sums[name] - marks[h][name] for name in sums}
                for name in SETTINGS:
                    value = cosine(parts[name], parts["Adam"])
                    figures[name]["cosine"][str(h)].append(value)
                marks[h] = {name: x.copy() for name, x in sums.items()}
    return {
        name: {
            "cosine": {
                h: round(float(np.mean(x)), 4) for h, x in found["cosine"].items()
            },
            "moving": round(float(np.mean(found["moving"])), 4),
        }
        for name, found in figures.items()
    }


def main() -> None:
    after = {name: moves(transformation(*some)) for name, some in SETTINGS.items()}
    after["Adam"] = moves(optax.scale_by_adam())
    along = along_adam()
    for name, figures in along.items():
        print(name, f"moves {sum(after[name]):.1f} in all;", figures)
    common.report(
        "convergence/mechanism", {"after_selection": after, "along_adam": along}
    )


if __name__ == "__main__":
    main()
