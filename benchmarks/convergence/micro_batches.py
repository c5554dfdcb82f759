"""Micro-batches in the error feedback against `optax.MultiSteps`, at equal total batch.

python benchmarks/convergence/micro_batches.py [--tasks TEXT]

Each step's batch is cut into 4 or 16 micro-batches. The default setting at 4 and 8 bits
of error, with and without stochastic rounding, `match_adam=False`, three seeds, at the
best learning rate of MultiSteps. Runs are kept one by one, so it goes on where it was;
`report.py` writes the table.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import methods
import study
import tasks
import training
from microadam_optax import accumulate, microadam, smaller_than
from runs import ROOT, Runs, deciding, outcome

sys.path.append(str(ROOT / "benchmarks"))

import pages

RECORD = "micro_batches"
EVERY = (4, 16)
SEEDS = 3
WHOLE = "MultiSteps"
WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, stochastic rounding": {"stochastic_rounding": True},
    "8 bits": {"error_bits": 8},
    "8 bits, stochastic rounding": {"error_bits": 8, "stochastic_rounding": True},
}


class Trial(NamedTuple):
    """What is trained, for how long, and how many of its batches make one."""

    task: Callable[[], tasks.Task]
    steps: int
    centre: float  # of the search for the learning rate
    joined: int = 1


TRIALS = {
    "digits, 500 steps of 32 images": Trial(tasks.digits, 500, 4e-3),
    "language, 400 steps of 16 texts": Trial(study.language, 400, 4e-3, joined=2),
}


def in_micro_batches(task: tasks.Task, joined: int, every: int) -> tasks.Task:
    """The task, whose batches lead with an axis of micro-batches."""

    def batches(seed: int) -> Iterator[Any]:
        stream = task.batches(seed)
        while True:
            several = [next(stream) for _ in range(joined)]
            whole = jax.tree.map(lambda *parts: np.concatenate(parts), *several)
            yield jax.tree.map(lambda x: x.reshape(every, -1, *x.shape[1:]), whole)

    return task._replace(batches=batches)


def transformation(way: str, every: int, rate: Any) -> optax.GradientTransformation:
    own = {} if way == WHOLE else WAYS[way]
    own = {"dense": smaller_than(methods.SMALL), "match_adam": False, **own}
    tx = microadam(rate, **own)
    if way == WHOLE:
        return optax.MultiSteps(tx, every).gradient_transformation()
    return accumulate(tx, every)


def make_step(task: tasks.Task, method: methods.Method) -> Callable:
    """The jitted step of all micro-batches of a batch."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any, rate: Any) -> Any:
        tx = training.optimizer(method, rate)  # clips each micro-batch

        def one(carry: Any, part: Any) -> Any:
            params, state = carry
            loss, gradients = jax.value_and_grad(task.loss)(params, part)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(one, (params, state), batch)
        return params, state, jnp.mean(losses)

    return step


def rows(
    name: str, way: str, every: int, rate: float, seeds: int
) -> list[dict[str, Any]]:
    """The runs of one way, read where they are on disk, else done."""
    trial, runs, title = TRIALS[name], Runs(RECORD), title_of(name, way, every)
    method = methods.Method(functools.partial(transformation, way, every), 0.0)
    task = in_micro_batches(task_of(name), trial.joined, every)
    step = make_step(task, method)
    for seed in range(seeds):
        key = {"method": title, "learning_rate": rate, "seed": seed, "steps": trial.steps}
        if not runs.find(**key):
            how = rate, seed, trial.steps, 1
            row, _ = training.run(task, method, step, *how, title=f"{title}, {seed}")
            held = round(training.state_bytes(task, method), 4)
            runs.add({"method": title, "state_bytes": held, **row})
    return runs.find(method=title, learning_rate=rate, steps=trial.steps)


def title_of(name: str, way: str, every: int) -> str:
    """Under which a way's runs are kept."""
    return f"{name}: {way}, {every} micro-batches"


@functools.cache
def task_of(name: str) -> tasks.Task:
    return TRIALS[name].task()


def conduct(name: str) -> None:
    """All runs of a trial that are not on disk."""
    rate = study.search(TRIALS[name].centre, lambda x: rows(name, WHOLE, EVERY[0], x, 1))
    for every in EVERY:
        for way in (WHOLE, *WAYS):
            jax.clear_caches()
            found = [x["figures"] for x in rows(name, way, every, rate, SEEDS)]
            print(f"{name}, {every} micro-batches, {way}: rate {rate:g}: {found}")


def section() -> str:
    """The table of all ways: mean and spread over the seeds, at their best rate."""
    runs = Runs(RECORD)
    header = [f"{name}, {every} micro-batches" for name in TRIALS for every in EVERY]
    rows = []
    for way in (WHOLE, *WAYS):
        cells = [cell(runs, name, way, every) for name in TRIALS for every in EVERY]
        title = "optax.MultiSteps" if way == WHOLE else f"accumulate, {way}"
        rows.append([title, *cells])
    machine = pages.measured_on({"machine": runs.machine})
    return f"{pages.table(['', *header], rows)}\n\n{machine}."


def cell(runs: Runs, name: str, way: str, every: int) -> str:
    found = outcome(runs, title_of(name, way, every), TRIALS[name].steps, SEEDS)
    assert found is not None, (name, way, every)
    if deciding(found.rows[0]).endswith("loss"):
        return f"loss {found.mean:.3f} ± {found.spread:.3f}"
    return f"{100 * found.mean:.2f} % ± {100 * found.spread:.2f} %"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="", help=f"part of a name: {list(TRIALS)}")
    args = parser.parse_args(arguments)
    for name in TRIALS:
        if args.tasks in name:
            conduct(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
