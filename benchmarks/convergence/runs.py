"""A study's runs, on disk and as what they say."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "convergence"
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402

Row = dict[str, Any]
TEXTS = {  # whose data are the help, the code or the packages of a Python
    "language",
    "language_finetuned",
    "bert",
    "bert_code",
    "matching_language",
    "matching_minilm",
    "micro_batches",
}


class Runs:
    """The runs of a study; a run is known by optimizer, rate, seed and steps."""

    def __init__(self, name: str, folder: pathlib.Path = RESULTS):
        self.file = folder / f"{name}.json"
        self.read()

    def read(self) -> None:
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows: list[Row] = found.get("runs", [])
        self.machine = found.get("machine")

    def find(self, **wanted: Any) -> list[Row]:
        return [x for x in self.rows if all(x[key] == wanted[key] for key in wanted)]

    def add(self, row: Row) -> None:
        """Keeps a run beside those that other processes have added meanwhile.

        The record names the machine of its first run; a run elsewhere names its own.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.file.parent):
            self.read()
            here = common.machine()
            self.machine = self.machine or here
            self.check(here)
            own = {key: here[key] for key in here if here[key] != self.machine[key]}
            own.pop("command", None)
            self.rows.append(row | ({"machine": own} if own else {}))
            content = {"machine": self.machine, "runs": self.rows}
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(content).replace('{"method"', '\n{"method"') + "\n")
            new.replace(self.file)

    def check(self, here: dict[str, str]) -> None:
        """The data of some studies are texts of the Python that runs: they must agree."""
        if self.file.stem not in TEXTS or self.machine is None:
            return
        known, python = (x["python"] for x in (self.machine, here))
        if known.split(".")[:2] != python.split(".")[:2]:
            raise SystemExit(
                f"{self.file.stem}: the texts of its runs are those of Python {known}; "
                f"those of {python} are others"
            )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Outcome(NamedTuple):
    """An optimizer at its best learning rate, over the seeds."""

    method: str
    rate: float
    steps: int
    state_bytes: float
    values: list[float]
    rows: list[Row]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values)


def deciding(row: Row) -> str:
    """The name of the figure that decides: the first."""
    return next(iter(row["figures"]))


def score(row: Row) -> float:
    """The deciding figure of a run, the lower the better; infinite if it diverged."""
    name = deciding(row)
    value = row["figures"][name]
    if not math.isfinite(value):
        return math.inf
    return value if name.endswith("loss") else -value


def mean_score(rows: list[Row]) -> float:
    return sum(map(score, rows)) / len(rows)


def outcome(runs: Runs, method: str, steps: int, seeds: int) -> Outcome | None:
    """The best rate of those that ran with all seeds; None if there is none yet."""
    rows = runs.find(method=method, steps=steps)
    rates = {row["learning_rate"] for row in rows}
    complete = []
    for rate in rates:
        own = [x for x in rows if x["learning_rate"] == rate and x["seed"] < seeds]
        if len(own) == seeds:
            complete.append(own)
    if not complete:
        return None
    own = min(complete, key=mean_score)
    values = [row["figures"][deciding(row)] for row in own]
    first = own[0]
    rate, held = first["learning_rate"], first["state_bytes"]
    return Outcome(method, rate, steps, held, values, own)


def by_rate(runs: Runs, method: str, steps: int, seeds: int) -> list[tuple[float, float]]:
    """Learning rates with the mean deciding figure of the search's runs, in order."""
    found: dict[float, list[float]] = {}
    for row in runs.find(method=method, steps=steps):
        if row["seed"] < seeds:
            value = row["figures"][deciding(row)]
            found.setdefault(row["learning_rate"], []).append(value)
    return [(rate, statistics.fmean(found[rate])) for rate in sorted(found)]
