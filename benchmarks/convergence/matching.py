"""Adam's own learning rate: how far from Adam's loss each setting ends, by rate.

python benchmarks/convergence/matching.py [task ...]

Every setting, without `match_adam` and with it at two exponents of the density (the
longer tasks at the chosen one alone), at a half, once and twice the best learning rate of
Adam, two seeds. Runs are kept one by one, so it goes on where it was. At the end it draws
docs/images/matching.png of the tasks that were named, at the chosen exponent.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import matching_picture
import methods
import study
import tasks
from microadam_optax import _moments
from runs import ROOT, Runs, mean_score

FACTORS = (0.5, 1.0, 2.0)
SEEDS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "(1, 4 %)": {"window": 1, "density": 0.04},
    "(1, 25 %)": {"window": 1, "density": 0.25},
    "(2, 6 %)": {"window": 2, "density": 0.06},
    "(2, 12 %)": {"window": 2, "density": 0.12},
    "(10, 1 %)": {"window": 10, "density": 0.01},
    "(1, 4 %), blocks of 64": {"window": 1, "density": 0.04, "block_size": 64},
    "(2, 6 %), blocks of 64": {"window": 2, "density": 0.06, "block_size": 64},
}
# The exponents of the share of selected entries; None is the literal method.
WAYS = {"literal": None, "exponent 0.75": 0.75, "exponent 0.5": 0.5}
CHOSEN = ("literal", "exponent 0.5")


class Trial(NamedTuple):
    """What is trained for how long, and the rate that Adam's search begins around."""

    task: Callable[[], tasks.Task]
    steps: int
    centre: float
    ways: tuple[str, ...] = tuple(WAYS)


TRIALS = {
    "digits, 1,000 steps": Trial(tasks.digits, 1000, 4e-3),
    "language, 400 steps": Trial(study.language, 400, 4e-3),
    "language, 2,000 steps": Trial(study.language, 2000, 4e-3, CHOSEN),
    "MiniLM, 100 steps": Trial(tasks.bert_docstrings, 100, 2.5e-4, CHOSEN),
}


def all_methods(ways: tuple[str, ...]) -> dict[str, methods.Method]:
    found = {"Adam": methods.PEERS["Adam"]}
    for name, settings in SETTINGS.items():
        for way in ways:
            found[f"{name}, {way}"] = methods.micro(
                **settings, match_adam=WAYS[way] is not None
            )
    return found


def best_of_adam(work: study.Work, trial: Trial) -> tuple[float, float]:
    """Adam's best rate, and its score there, the lower the better."""
    rate = study.search(trial.centre, lambda x: work.rows(x, 1, trial.steps))
    return rate, mean_score(work.rows(rate, SEEDS, trial.steps))


def curves(name: str) -> dict[str, dict[float, float]]:
    """Of every setting and way, the score minus Adam's by the rate over Adam's."""
    trial, task = TRIALS[name], functools.cache(TRIALS[name].task)
    one = study.Study(
        name, trial.task, all_methods(trial.ways), trial.steps, evaluations=1
    )
    runs, found = Runs(f"matching_{name.split(',')[0].lower()}"), {}
    rate, least = best_of_adam(study.Work(one, runs, task, "Adam"), trial)
    for title in list(one.methods)[1:]:
        jax.clear_caches()
        _moments.EXPONENT = WAYS[title.rpartition(", ")[2]] or _moments.EXPONENT
        work = study.Work(one, runs, task, title)
        for factor in FACTORS:
            rows = work.rows(float(f"{factor * rate:.3g}"), SEEDS, trial.steps)
            found.setdefault(title, {})[factor] = mean_score(rows) - least
        print(f"{name}, {title}: {found[title]}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"parts of names: {list(TRIALS)}")
    args = parser.parse_args(arguments)
    wanted = [x for x in TRIALS if not args.tasks or any(y in x for y in args.tasks)]
    found = {name: curves(name) for name in wanted}
    matching_picture.draw(found, ROOT / "docs" / "images" / "matching.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
