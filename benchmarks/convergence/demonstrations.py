"""What is no study on docs/convergence.md: the mechanism, and the Rosenbrock function."""

import sys

import pictures
from runs import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import pages

IMAGES = ROOT / "docs" / "images"


def rosenbrock_section() -> str:
    found = pages.load("convergence/rosenbrock")
    pictures.rosenbrock(found, IMAGES / "rosenbrock.png")
    some = found["optimizers"]
    rates = next(iter(some.values()))["last_values"]
    rows = [
        [name, *(f"{value:.2g}" for value in one["last_values"].values())]
        for name, one in some.items()
    ]
    header = [f"value after {found['steps']:,} steps, by learning rate", *rates]
    return (
        "![Four paths on the Rosenbrock function](images/rosenbrock.png)\n\n"
        f"{pages.table(header, rows)}\n\n{pages.measured_on(found)}."
    )


def mechanism_section() -> str:
    found = pages.load("convergence/mechanism")
    pictures.mechanism(found, IMAGES / "mechanism.png")
    rows = [
        [
            name,
            f"{sum(found['after_selection'][name]):.1f}",
            f"{found['after_selection'][name][0]:.1f}",
            f"{100 * one['moving']:.0f} %",
            *(f"{value:.2f}" for value in one["cosine"].values()),
        ]
        for name, one in found["along_adam"].items()
    ]
    horizons = next(iter(found["along_adam"].values()))["cosine"]
    header = ["(window, density)", "moves in all", "at once", "coordinates moving"]
    header += [f"cosine over {h}" for h in horizons]
    return (
        "![After a selection, and agreement with Adam](images/mechanism.png)\n\n"
        f"{pages.table(header, rows)}\n\n{pages.measured_on(found)}."
    )
