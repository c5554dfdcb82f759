"""The pictures of the studies, for docs/convergence.md and docs/tuning.md."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from runs import Outcome, deciding

COLORS = {
    "Adam": "black",
    "AdamW, mu in bfloat16": "0.6",
    "Adafactor": "tab:brown",
    "Lion": "tab:olive",
    "GaLore, rank 32": "tab:cyan",
    "MicroAdam (10, 1 %), all compressed": "tab:red",
    "MicroAdam (2, 6 %)": "tab:blue",
    "MicroAdam (1, 25 %)": "tab:orange",
    "MicroAdam (1, 4 %)": "tab:green",
}


def save(figure: Any, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and versions that would make each file new.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curves(outcomes: list[Outcome], file: pathlib.Path) -> None:
    """The deciding figure during training, mean and range over the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for one in outcomes:
        color = COLORS.get(one.method)
        steps = [step for step, _ in one.rows[0]["curve"]]
        values = np.array([[value for _, value in row["curve"]] for row in one.rows])
        axes.plot(steps, values.mean(0), color=color, label=one.method)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15)
    axes.set(xlabel="step", ylabel=deciding(outcomes[0].rows[0]))
    last = [value for one in outcomes for value in one.values]
    if deciding(outcomes[0].rows[0]).endswith("loss"):
        axes.set_ylim(min(last) - 0.05, max(last) + 0.8)
    axes.legend(fontsize="small")
    save(figure, file)


def rates(grids: dict[str, list[tuple[float, float]]], what: str, file: pathlib.Path):
    """The deciding figure over the learning rate."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    values = [value for grid in grids.values() for _, value in grid]
    for name, grid in grids.items():
        axes.plot(*zip(*grid, strict=True), "o-", color=COLORS.get(name), label=name)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel=what)
    if what.endswith("loss"):
        axes.set_ylim(min(values) - 0.05, min(max(values) + 0.05, min(values) + 1.2))
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, file)


def equal_bytes(
    outcomes: list[Outcome], adam: Outcome | None, title: str, file: pathlib.Path
) -> None:
    """Quality over bytes of state, a mark for each (window, density)."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for one in outcomes:
        axes.errorbar(one.state_bytes, one.mean, one.spread, fmt="o", color="tab:blue")
    if adam:
        axes.axhline(adam.mean, color="black", linewidth=1, label="Adam, 8 bytes")
        low, high = adam.mean - adam.spread, adam.mean + adam.spread
        axes.axhspan(low, high, color="black", alpha=0.1)
        axes.legend(loc="upper left")
    wide, gap = 0.15 * np.ptp(axes.get_xlim()), 0.045 * np.ptp(axes.get_ylim())
    placed: list[tuple[float, float]] = []  # labels, the lowest first
    for one in sorted(outcomes, key=lambda x: x.mean):
        height = one.mean
        for left, other in placed:
            if abs(left - one.state_bytes) < wide and height < other + gap:
                height = other + gap
        placed.append((one.state_bytes, height))
        axes.annotate(
            one.method.removeprefix("MicroAdam "),
            (one.state_bytes, height),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize="small",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.margins(x=0.15)
    what = deciding(outcomes[0].rows[0])
    axes.set(xlabel="bytes of state a parameter", ylabel=what, title=title)
    save(figure, file)


def rosenbrock(found: dict[str, Any], file: pathlib.Path) -> None:
    """The paths over the contours of the function."""
    names = list(found["optimizers"])
    figure, all_axes = plt.subplots(
        1, len(names), figsize=(11, 4), sharey=True, layout="constrained"
    )
    x, y = np.meshgrid(np.linspace(-1.1, 1.2, 300), np.linspace(-0.3, 1.3, 300))
    heights = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    for axes, name in zip(all_axes, names, strict=True):
        one = found["optimizers"][name]
        axes.contour(
            x, y, np.log10(heights + 1e-3), levels=14, cmap="Greys", linewidths=0.6
        )
        path = np.array(one["path"])
        axes.plot(*path.T, ".-", color="tab:blue", markersize=3, linewidth=1)
        axes.plot(*path[0], "o", color="tab:orange")
        axes.plot(1, 1, "*", color="tab:red", markersize=12)
        axes.set_title(f"{name},\nlearning rate {one['rate']:g}", fontsize="small")
    save(figure, file)


def mechanism(found: dict[str, Any], file: pathlib.Path) -> None:
    """What becomes of a selected entry, and how well updates agree with Adam's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, moves in found["after_selection"].items():
        color = "black" if name == "Adam" else None
        left.plot(np.cumsum(moves), "o-", markersize=3, label=name, color=color)
    left.set(
        xlabel="steps since the coordinate was selected",
        ylabel="how far it has moved (learning rates)",
    )
    left.legend(fontsize="small", title="(window, density)")
    for name, figures in found["along_adam"].items():
        horizons = [int(x) for x in figures["cosine"]]
        right.plot(horizons, figures["cosine"].values(), "o-", markersize=4, label=name)
    right.set(
        xscale="log",
        xticks=horizons,
        xlabel="steps over which the updates are summed",
        ylabel="cosine with Adam's",
    )
    right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    right.minorticks_off()
    right.legend(fontsize="small")
    save(figure, file)


def matching(found: dict[str, dict[str, Any]], file: pathlib.Path) -> None:
    """Above Adam's best figure by the rate over Adam's: a column a task, a row a way."""
    titles = [title.rpartition(", ") for title in next(iter(found.values()))]
    names, ways = (list(dict.fromkeys(x[i] for x in titles)) for i in (0, 2))
    figure, all_axes = plt.subplots(
        len(ways),
        len(found),
        figsize=(2.5 + 3.2 * len(found), 1 + 2.4 * len(ways)),
        squeeze=False,
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    for column, (task, by_title) in zip(all_axes.T, found.items(), strict=True):
        column[0].set_title(task)
        column[-1].set_xlabel("learning rate over Adam's best")
        for axes, way in zip(column, ways, strict=True):
            for i, name in enumerate(names):
                scores = by_title[f"{name}, {way}"]
                axes.plot(
                    list(scores), list(scores.values()), "o-", color=f"C{i}", label=name
                )
            axes.axhline(0, color="black", linewidth=1)
            axes.set(xscale="log")
            axes.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
            axes.minorticks_off()
    for axes, way in zip(all_axes[:, 0], ways, strict=True):
        axes.set_ylabel(f"{way}\nloss (or error rate) above Adam's")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    save(figure, file)


def state_bytes(held: dict[str, float], file: pathlib.Path) -> None:
    """Bytes of state a parameter by optimizer."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    colors = ["tab:blue" if "MicroAdam" in name else "0.6" for name in held]
    bars = axes.barh(list(held), list(held.values()), color=colors)
    axes.bar_label(bars, fmt="{:.3f}", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(held.values()))
    axes.set(xlabel="bytes of state a parameter, Llama-2-7B in float32")
    save(figure, file)
