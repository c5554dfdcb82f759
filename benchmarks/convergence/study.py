"""Runs a study, or what is missing of it, and keeps every run's figures as JSON.

python benchmarks/convergence/study.py digits
python benchmarks/convergence/study.py --list

For every optimizer the learning rate is searched on a grid of factors of two, five
points at first and more while the best lies at an end; the best runs again with further
seeds. Longer runs begin at that rate and halve it while that helps. MicroAdam as it comes
has Adam's best rate, without a search, in both. Results are written
after each run, so that a study that was interrupted goes on where it was.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import methods
import tasks
import training
from runs import Runs, common, mean_score, outcome, score

GRID = 5  # learning rates at first, each twice the one before
WIDEST = 9  # and at most


class Study(NamedTuple):
    """What to train with which optimizers, for how long and how often."""

    about: str
    task: Callable[[], tasks.Task]
    methods: dict[str, methods.Method]
    steps: int
    seeds: int = 3
    search_seeds: int = 1
    evaluations: int = 10  # of a run
    long: int = 0  # steps of longer runs, if any
    long_for: tuple[str, ...] = ()  # the optimizers that have those; all, if empty
    record: str = ""  # the study that has the same task, whose runs it shares


def pretrained() -> Any:
    """The help text's language model, trained with Adam as in the study of that."""
    task, adam = tasks.language(tasks.help_text()), methods.PEERS["Adam"]
    step = training.make_step(task, adam)
    return training.run(task, adam, step, 2e-3, 0, 5000, title="pretraining")[1]


def finetuned_language() -> tasks.Task:
    return tasks.language(tasks.source_text(), start=pretrained())


def language() -> tasks.Task:
    return tasks.language(tasks.help_text())


STUDIES = {
    "digits": Study(
        "scikit-learn digits, a convolutional network of 87 thousand parameters",
        tasks.digits,
        methods.ALL,
        steps=1000,
        seeds=10,
        search_seeds=3,
    ),
    "language": Study(
        "byte language model from scratch",
        language,
        methods.MAIN,
        steps=1000,
        long=5000,
    ),
    "language_finetuned": Study(
        "byte language model, from help text to source code",
        finetuned_language,
        methods.MAIN,
        steps=500,
        long=5000,
        long_for=("Adam", *methods.OURS),
    ),
    "bert": Study(
        "MiniLM (22.6 million parameters) fine-tuned on docstrings",
        tasks.bert_docstrings,
        methods.scaled(methods.MAIN, 1 / 8),
        steps=100,
        evaluations=1,
    ),
    "language_windows": Study(
        "byte language model from scratch, settings of MicroAdam",
        language,
        {**methods.WINDOWS, **methods.SHORT_OPTIONS},
        steps=1000,
        record="language",
    ),
}


def record(name: str) -> Runs:
    """A study's runs, those of another study of the same task among them."""
    return Runs(STUDIES[name].record or name)


def search(centre: float, trained: Callable[[float], list[dict[str, Any]]]) -> float:
    """The best rate of a grid around `centre` that grows until its best lies inside."""
    scores: dict[int, float] = {}

    def rate(i: int) -> float:
        return float(f"{centre * 2.0**i:.3g}")

    def visit(i: int) -> None:
        scores[i] = mean_score(trained(rate(i)))

    for i in range(-(GRID // 2), GRID // 2 + 1):
        visit(i)
    while len(scores) < WIDEST:
        found = min(scores, key=lambda i: scores[i])
        if min(scores) < found < max(scores):
            break
        visit(found + 1 if found == max(scores) else found - 1)
    return rate(min(scores, key=lambda i: scores[i]))


class Work:
    """The runs of one optimizer in a study: read where they are on disk, else done."""

    def __init__(
        self, study: Study, runs: Runs, task: Callable[[], tasks.Task], title: str
    ):
        self.study, self.runs, self.task, self.title = study, runs, task, title
        self.method = study.methods[title]

    @functools.cached_property
    def step(self) -> Callable:
        return training.make_step(self.task(), self.method)

    def rows(self, rate: float, seeds: int, steps: int) -> list[dict[str, Any]]:
        self.runs.read()  # another process may do a part of the same study
        found = []
        for seed in range(seeds):
            key = {"learning_rate": rate, "seed": seed, "steps": steps}
            key = {"method": self.title, **key}
            if not self.runs.find(**key):
                self.run(rate, seed, steps)
            found += self.runs.find(**key)
        return found

    def run(self, rate: float, seed: int, steps: int) -> None:
        self.runs.check(common.machine())
        label = f"{self.title}, rate {rate:g}, seed {seed}"
        what = self.task(), self.method, self.step
        how = rate, seed, steps, self.study.evaluations
        row, _ = training.run(*what, *how, title=label)
        held = round(training.state_bytes(self.task(), self.method), 4)
        self.runs.add({"method": self.title, "state_bytes": held, **row})

    def best(self) -> tuple[float, list[dict[str, Any]]]:
        """The best rate, and its runs with all seeds."""
        study = self.study
        if self.method.centre is None:
            return self.at_adams()
        rate = search(
            self.method.centre, lambda x: self.rows(x, study.search_seeds, study.steps)
        )
        found = self.rows(rate, study.seeds, study.steps)
        if not study.long or self.title not in (study.long_for or study.methods):
            return rate, found

        def first(x: float) -> float:
            return mean_score(self.rows(x, 1, study.long))

        while first(rate / 2) < first(rate):  # longer runs want smaller rates
            rate /= 2
        return rate, self.rows(rate, study.seeds, study.long)

    def at_adams(self) -> tuple[float, list[dict[str, Any]]]:
        """Adam's best rate, which has to be known, and the runs there."""
        study, rate, found = self.study, math.nan, []
        for steps in filter(None, (study.steps, study.long)):
            adam = outcome(self.runs, "Adam", steps, study.seeds)
            if adam is None:
                raise SystemExit(f"Adam has not run for {steps} steps: it comes first")
            rate, found = adam.rate, self.rows(adam.rate, study.seeds, steps)
        return rate, found


def conduct(name: str, only: str = "") -> None:
    """Does all runs of a study that are not on disk."""
    study, runs = STUDIES[name], record(name)
    task = functools.cache(study.task)
    for number, title in enumerate(study.methods, 1):
        if only in title:
            rate, rows = Work(study, runs, task, title).best()
            figures = ", ".join(f"{abs(score(row)):.4f}" for row in rows)
            print(f"{number}/{len(study.methods)} {title}: rate {rate:g}: {figures}")
            jax.clear_caches()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="optimizers with this in the name"
    )
    parser.add_argument("--list", action="store_true", help="what there is, and no more")
    args = parser.parse_args(arguments)
    if args.list or not args.study:
        for name, study in STUDIES.items():
            print(f"{name}: {study.about}; {len(study.methods)} optimizers")
        return 0
    conduct(args.study, args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
