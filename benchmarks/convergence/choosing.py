"""Which setting is the default: every candidate at Adam's own learning rate.

python benchmarks/convergence/choosing.py [study ...] [--settings "(1, 4 %)" ...]
    [--exponents 0.5 ...] [--factors 1 ...] [--list]

The criterion, written before the runs. A candidate's score in a study is the mean over
the seeds of its deciding figure at Adam's best rate, minus Adam's, over the standard
deviation of Adam's seeds; the least mean score of all studies wins. Candidates within
half a standard deviation of it are equal, and between them decide, in this order, the
mean score at half and twice that rate, and the bytes. None may hold more than 0.9 bytes
a parameter. Small leaves are dense, as by default.

Runs are kept one by one, in the records of study.py, so it goes on where it was.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import llama_task
import methods
import study
import tasks
import variational
from microadam_optax import _moments
from runs import ROOT, Runs, mean_score, score

sys.path.append(str(ROOT / "benchmarks"))

import pages

BLOCKS = (256, 64)
SHAPES = ((1, 0.04), (1, 0.12), (1, 0.25), (2, 0.06), (2, 0.12))
EXPONENTS = (0.5, 0.6, 0.75)
FACTORS = {1.0: 3, 0.5: 1, 2.0: 1}  # of Adam's rate, with the number of seeds


class Trial(NamedTuple):
    """What is trained for how long, around which rate, and whose record keeps it."""

    task: Callable[[], tasks.Task]
    steps: int
    centre: float
    record: str
    search_seeds: int = 1  # of the search for Adam's rate
    evaluations: int = 1  # of a run


TRIALS = {
    "digits, 1,000 steps": Trial(tasks.digits, 1000, 4e-3, "digits", 3, 10),
    "variational inference, 600 steps": Trial(
        variational.variational, 600, 4e-2, "variational"
    ),
    "fine-tuned language, 50 steps": Trial(
        study.finetuned_language, 50, 4e-3, "language_finetuned"
    ),
    "language, 1,000 steps": Trial(study.language, 1000, 2e-3, "language", 1, 10),
    "language, 5,000 steps": Trial(study.language, 5000, 2e-3, "language", 1, 10),
    "MiniLM, 100 steps": Trial(tasks.bert_docstrings, 100, 2.5e-4, "bert"),
    "MiniLM on code, 100 steps": Trial(tasks.bert_code, 100, 2.5e-4, "bert_code"),
    "SmolLM2, 150 steps": Trial(llama_task.llama, 150, 1e-4, "llama"),
}


class Candidate(NamedTuple):
    """A setting, and the exponent of the share of selected entries: 0.5 as it comes."""

    window: int
    density: float
    block_size: int = 256
    exponent: float = 0.5

    @property
    def title(self) -> str:
        """As the records name it."""
        own = f"MicroAdam ({self.window}, {round(100 * self.density)} %)"
        blocks = "" if self.block_size == 256 else f", blocks of {self.block_size}"
        way = "" if self.exponent == 0.5 else f", exponent {self.exponent:g}"
        return own + blocks + way

    @property
    def method(self) -> methods.Method:
        return methods.micro(self.window, self.density, block_size=self.block_size)


def candidates(exponents: tuple[float, ...]) -> list[Candidate]:
    return [
        Candidate(*shape, block_size, exponent)
        for exponent in exponents
        for block_size in BLOCKS
        for shape in SHAPES
    ]


def work_of(trial: Trial, title: str, method: methods.Method, task: Any) -> study.Work:
    of_one, often = {title: method}, trial.evaluations
    one = study.Study(title, trial.task, of_one, trial.steps, evaluations=often)
    return study.Work(one, Runs(trial.record), task, title)


def of_adam(trial: Trial, task: Any) -> tuple[float, list[dict[str, Any]]]:
    """Adam's best rate, and all its runs there."""
    work = work_of(trial, "Adam", methods.PEERS["Adam"], task)
    rate = study.search(
        trial.centre, lambda x: work.rows(x, trial.search_seeds, trial.steps)
    )
    work.rows(rate, FACTORS[1.0], trial.steps)
    found = work.runs.find(method="Adam", learning_rate=rate, steps=trial.steps)
    return rate, found


def rows_of(
    trial: Trial, one: Candidate, task: Any, rate: float, factor: float
) -> list[dict[str, Any]]:
    """The runs of a candidate at Adam's rate times a factor."""
    work = work_of(trial, one.title, one.method, task)
    kept, own = _moments.EXPONENT, float(f"{factor * rate:.3g}")
    jax.clear_caches()  # what was traced has the exponent of the one before
    _moments.EXPONENT = one.exponent
    try:
        return work.rows(own, FACTORS[factor], trial.steps)
    finally:
        _moments.EXPONENT = kept


def above(rows: list[dict[str, Any]], adam: list[dict[str, Any]]) -> float:
    """How far runs end above Adam's, in standard deviations of Adam's seeds."""
    return (mean_score(rows) - mean_score(adam)) / statistics.stdev(map(score, adam))


def conduct(name: str, wanted: list[Candidate], factors: list[float]) -> None:
    """Does all runs of a study that are not on disk, and prints the scores."""
    trial = TRIALS[name]
    task = functools.cache(trial.task)
    rate, adam = of_adam(trial, task)
    least, spread = mean_score(adam), statistics.stdev(map(score, adam))
    print(f"{name}: Adam {least:.4f} +- {spread:.4f} at {rate:g}", flush=True)
    for factor in factors:
        for one in wanted:
            scored = above(rows_of(trial, one, task, rate, factor), adam)
            print(f"{name}, {one.title}, rate x {factor:g}: {scored:+.2f}", flush=True)


def known_adam(trial: Trial) -> list[dict[str, Any]]:
    """Adam's runs at the best rate that ran with all seeds; none if there is none."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in Runs(trial.record).find(method="Adam", steps=trial.steps):
        by_rate.setdefault(row["learning_rate"], []).append(row)
    complete = [rows for rows in by_rate.values() if len(rows) >= FACTORS[1.0]]
    return min(complete, key=mean_score, default=[])


def known_score(trial: Trial, one: Candidate, adam: list[dict[str, Any]]) -> float | None:
    """A candidate's at Adam's rate, from runs on disk; None if some are missing."""
    rate, seeds = adam[0]["learning_rate"], FACTORS[1.0]
    runs = Runs(trial.record)
    found = runs.find(method=one.title, steps=trial.steps, learning_rate=rate)
    some = [row for row in found if row["seed"] < seeds]
    if len(some) < seeds:
        return None
    return above(some, adam)


def section() -> str:
    """The scores at Adam's rate, for docs/tuning.md."""
    adams = {name: known_adam(trial) for name, trial in TRIALS.items()}
    shown = [name for name, adam in adams.items() if adam]
    rows = []
    for one in candidates((0.5,)):
        known = [known_score(TRIALS[name], one, adams[name]) for name in shown]
        cells = ["" if x is None else f"{x:+.1f}" for x in known]
        rows.append([one.title.removeprefix("MicroAdam "), *cells])
    return pages.table(["(window, density)", *shown], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("studies", nargs="*", help="parts of their names; all by default")
    add("--settings", nargs="*", metavar="X", help="such as '(1, 4 %%), blocks of 64'")
    add("--exponents", nargs="+", type=float, default=EXPONENTS, metavar="X")
    add("--factors", nargs="+", type=float, default=list(FACTORS), metavar="X")
    add("--list", action="store_true", help="the studies, and no more")
    args = parser.parse_args(arguments)
    every = candidates(tuple(args.exponents))
    wanted = {f"MicroAdam {x}" for x in args.settings or []}
    some = [x for x in every if not wanted or x.title in wanted]
    for name in TRIALS:
        if args.studies and not any(part in name for part in args.studies):
            continue
        if args.list:
            print(name)
        else:
            conduct(name, some, args.factors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
