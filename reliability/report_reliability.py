"""Writes the figures of docs/reliability.md, and its picture, from reliability/results.

python reliability/report_reliability.py
"""

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import pages  # noqa: E402

RESULTS = ROOT / "reliability" / "results"
PAGE = ROOT / "docs" / "reliability.md"
PICTURE = ROOT / "docs" / "images" / "rate.png"


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def fuzz_section(found: dict[str, Any]) -> str:
    ways = {x: n for x, n in found["compared_in_another_way"].items() if x != "no other"}
    others = ", ".join(f"{name} {number}" for name, number in sorted(ways.items()))
    return (
        f"{found['cases']:,} cases ({found['steps']:,} steps, {found['decisions']:,} "
        f"decisions) from seeds {found['seeds'][0]} to {found['seeds'][1]} without a "
        f"difference. Compared in another way, bit for bit: {others}.\n\n"
        f"{pages.measured_on(found)}."
    )


def long_runs_section(found: dict[str, Any]) -> str:
    rows = []
    for name, norms in found["error_norms"].items():
        kept, still = found["conservation"][name], found["untouched"][name]
        rows.append(
            [
                name,
                f"{norms['largest_of_first_half']:.2f}",
                f"{norms['largest_of_last_half']:.2f}",
                f"{100 * kept['largest_gap_over_bound']:.1f} %",
                str(still["moved"]),
                str(still["padding"]),
            ]
        )
    header = ["(window, density)", "error, first half", "error, last half"]
    header += ["gap over its bound", "untouched that moved", "padding not zero"]
    return (
        f"{found['steps']:,} steps:\n\n{pages.table(header, rows)}\n\n"
        f"{pages.measured_on(found)}."
    )


def rates_section(found: dict[str, Any]) -> str:
    draw_rates(found["rates"])
    lengths = next(iter(found["rates"].values()))["mean_square"]
    rows = [
        [name, *(f"{x:.4f}" for x in one["mean_square"].values()), f"{one['slope']:.3f}"]
        for name, one in found["rates"].items()
    ]
    header = ["mean square of the gradient", *(f"{int(n):,} steps" for n in lengths)]
    return (
        f"![Mean square of the gradient by steps](images/{PICTURE.name})\n\n"
        f"{pages.table([*header, 'slope'], rows)}\n\n{pages.measured_on(found)}."
    )


LINES = {  # the default as a wide line, on which others can be seen
    "Adam": {"color": "black", "marker": "o"},
    "MicroAdam (10, 1 %)": {"color": "tab:red", "marker": "o"},
    "MicroAdam (2, 6 %)": {"color": "tab:blue", "marker": "o", "linewidth": 4},
    "MicroAdam (2, 6 %), stochastic": {"color": "tab:orange", "linestyle": "--"},
}


def draw_rates(found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 5), layout="constrained")
    for name, one in found.items():
        lengths = [int(n) for n in one["mean_square"]]
        label = f"{name}, slope {one['slope']:.2f}"
        squares = list(one["mean_square"].values())
        axes.loglog(lengths, squares, label=label, **LINES[name])
    first = max(next(iter(one["mean_square"].values())) for one in found.values())
    guide = [1.6 * first * (n / lengths[0]) ** -0.5 for n in lengths]
    axes.loglog(lengths, guide, "k:", label="slope -0.5")
    axes.set_xlabel("steps")
    axes.set_ylabel("mean square of the true gradient")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=150, metadata={"Software": None})
    plt.close(figure)


def crash_section(found: dict[str, Any]) -> str:
    steps = ", ".join(map(str, found["went_on_from_step"]))
    said = "\n".join(f"{line[:230]}" for line in found["refused"].values())
    return (
        f"{found['kills']} kills, {found['amid_a_write']} of them while a checkpoint was "
        f"being written. The restarts went on from steps {steps} and ended with the same "
        f"bits. What is said of a truncated and of a foreign checkpoint:\n\n"
        f"```text\n{said}\n```\n\n{pages.measured_on(found)}."
    )


def modes_section(found: dict[str, Any]) -> str:
    versions = list(found)
    pairs = dict.fromkeys(
        (name, part)
        for one in found.values()
        for name, parts in one["modes"].items()
        for part in parts
    )
    rows = [
        [f"`{name}`", part, *(_passed(found[x]["modes"], name, part) for x in versions)]
        for name, part in pairs
    ]
    header = ["mode", "tests of", *(f"passed, jax {x}" for x in versions)]
    measured = "; ".join(pages.measured_on(one) for one in found.values())
    return f"{pages.table(header, rows)}\n\n{measured}."


def _passed(modes: dict[str, Any], name: str, part: str) -> str:
    one = modes.get(name, {}).get(part)
    if not one:
        return "not run"
    alone = len(one.get("alone", ()))
    return f"{one['passed']:,}" + (f", {alone} of them alone" if alone else "")


def installed_section(found: dict[str, Any]) -> str:
    rows = [
        [
            kind,
            ", ".join(found[kind]["installed_alone"]),
            found[kind]["tests"].strip("= "),
        ]
        for kind in ("sdist", "wheel")
    ]
    header = ["from the", "installed", "tests"]
    return f"{pages.table(header, rows)}\n\n{pages.measured_on(found)}."


SECTIONS = {
    "fuzz": ("fuzz", fuzz_section),
    "long runs": ("long_runs", long_runs_section),
    "rates": ("long_runs", rates_section),
    "crash": ("crash", crash_section),
    "modes": ("modes", modes_section),
    "installed": ("installed", installed_section),
}


def main() -> None:
    text = PAGE.read_text()
    for section, (name, write) in SECTIONS.items():
        found = load(name)
        text = pages.fill(text, section, write(found) if found else "Not run yet.")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
