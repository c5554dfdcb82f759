"""Runs a study, or what is missing of it, and keeps every run's figures as JSON.

python benchmarks/convergence/study.py digits
python benchmarks/convergence/study.py --list

For every optimizer the learning rate is searched on a grid of factors of two, five
points at first and more while the best lies at an end; the best runs again with further
seeds. Longer runs begin at that rate and halve it while that helps. Results are written
after each run, so that a study that was interrupted goes on where it was.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import methods
import tasks
import training
from runs import Runs, mean_score, score

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


def pretrained() -> Any:
    """The help text's language model, trained with Adam as in the study of that."""
    task, adam = tasks.language(tasks.help_text()), methods.PEERS["Adam"]
    step = training.make_step(task, adam)
    return training.run(task, adam, step, 2e-3, 0, 5000, title="pretraining")[1]


def finetuned_language() -> tasks.Task:
    return tasks.language(tasks.source_text(), start=pretrained())


@functools.cache
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
        steps=1000,
        long=5000,
    ),
    "bert": Study(
        "MiniLM (22.6 million parameters) fine-tuned on docstrings",
        tasks.bert_docstrings,
        methods.scaled(methods.MAIN, 1 / 8),
        steps=150,
        evaluations=1,
    ),
    "language_windows": Study(
        "byte language model from scratch, settings of MicroAdam",
        language,
        {**methods.WINDOWS, **methods.OPTIONS},
        steps=1000,
    ),
}


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


def conduct(name: str, only: str | None = None) -> None:
    """Does all runs of a study that are not on disk."""
    study, runs = STUDIES[name], Runs(name)
    task: tasks.Task | None = None

    for number, (title, method) in enumerate(study.methods.items(), 1):
        if only and only not in title:
            continue
        step: Callable | None = None

        def trained(
            rate: float,
            seeds: int,
            steps: int = study.steps,
            title: str = title,
            method: methods.Method = method,
        ) -> list[dict[str, Any]]:
            nonlocal task, step
            rows = []
            runs.read()  # another process may do a part of the same study
            for seed in range(seeds):
                key = {
                    "method": title,
                    "learning_rate": rate,
                    "seed": seed,
                    "steps": steps,
                }
                if not runs.find(**key):
                    task = task or study.task()
                    step = step or training.make_step(task, method)
                    label = f"{title}, rate {rate:g}, seed {seed}"
                    run = task, method, step, rate, seed, steps, study.evaluations
                    row, _ = training.run(*run, title=label)
                    held = round(training.state_bytes(task, method), 4)
                    runs.add({"method": title, "state_bytes": held, **row})
                rows += runs.find(**key)
            return rows

        rate = search(method.centre, lambda x, go=trained: go(x, study.search_seeds))
        rows = trained(rate, study.seeds)
        if study.long:
            score_of = functools.cache(
                lambda x, go=trained: mean_score(go(x, 1, study.long))
            )
            while score_of(rate / 2) < score_of(rate):  # longer runs want smaller rates
                rate /= 2
            rows = trained(rate, study.seeds, study.long)
        figures = ", ".join(f"{abs(score(row)):.4f}" for row in rows)
        print(f"{number}/{len(study.methods)} {title}: rate {rate:g}: {figures}")
        jax.clear_caches()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--only", metavar="TEXT", help="optimizers with this in the name")
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
