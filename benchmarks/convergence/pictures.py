"""The pictures of the studies, for docs/convergence.md and docs/index.md.

All are as wide as a page, in letters that can be read there and on a phone.
"""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, PercentFormatter

from runs import Outcome, deciding

WIDTH = 6.4  # inches
RECOMMENDED = ("MicroAdam (2, 6 %)", "MicroAdam (1, 4 %)")
COLORS = {
    "Adam": "black",
    "AdamW, mu in bfloat16": "0.6",
    "Adafactor": "tab:brown",
    "Lion": "tab:olive",
    "GaLore, rank 32": "tab:cyan",
    "MicroAdam (10, 1 %), all compressed": "tab:red",
    "MicroAdam (2, 6 %)": "tab:blue",
    "MicroAdam (1, 4 %)": "tab:orange",
}
OF_MECHANISM = {  # where (1, 25 %) did not run; the emphasized ones are drawn last
    "(10, 1 %)": "tab:red",
    "(5, 2 %)": "tab:purple",
    "(3, 4 %)": "tab:pink",
    "(2, 12 %)": "tab:cyan",
    "(1, 4 %)": "tab:green",
    "(1, 12 %)": "tab:orange",
    "(2, 6 %)": "tab:blue",
}
EMPHASIZED = ("(2, 6 %)", "(1, 12 %)")

plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})


def save(figure: Any, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and versions that would make each file new.
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def drawn(name: str) -> dict[str, Any]:
    """How the line of a method looks: Adam and what is recommended stand out."""
    if name in RECOMMENDED:
        return {"color": COLORS[name], "linewidth": 2.6, "zorder": 5}
    if name == "Adam":
        return {"color": COLORS[name], "linewidth": 2.2, "zorder": 4}
    return {"color": COLORS.get(name), "linewidth": 1.1, "zorder": 3}


def legend_below(figure: Any) -> None:
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")


def label_quality(axes: Any, what: str) -> None:
    axes.set_ylabel(what)
    if not what.endswith("loss"):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))


def curves(outcomes: list[Outcome], file: pathlib.Path) -> None:
    """The deciding figure during training, mean, and range over the seeds of some."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    for one in outcomes:
        look = drawn(one.method)
        steps = [step for step, _ in one.rows[0]["curve"]]
        values = np.array([[value for _, value in row["curve"]] for row in one.rows])
        axes.plot(steps, values.mean(0), label=one.method, **look)
        if look["zorder"] > 3:
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(steps, values.min(0), values.max(0), **band)
    what = deciding(outcomes[0].rows[0])
    last = [value for one in outcomes for value in one.values]
    if what.endswith("loss"):
        axes.set_ylim(min(last) - 0.05, max(last) + 0.5)
    else:  # where they end, rather than where they begin
        axes.set_ylim(min(last) - 0.01, max(last) + 0.002)
    axes.set_xlabel("step")
    label_quality(axes, what)
    legend_below(figure)
    save(figure, file)


def rates(grids: dict[str, list[tuple[float, float]]], what: str, file: pathlib.Path):
    """The deciding figure over the learning rate."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    values = [value for grid in grids.values() for _, value in grid]
    for name, grid in grids.items():
        axes.plot(*zip(*grid, strict=True), "o-", label=name, **drawn(name))
    axes.set(xscale="log", xlabel="peak learning rate")
    low, high = min(values), max(values)
    if what.endswith("loss"):
        axes.set_ylim(low - 0.05, min(high + 0.05, low + 1.2))
    else:
        axes.set_ylim(max(low, high - 0.3) - 0.002, high + 0.02 * (high - low))
    label_quality(axes, what)
    legend_below(figure)
    save(figure, file)


def equal_bytes(
    outcomes: list[Outcome], adam: Outcome | None, title: str, file: pathlib.Path
) -> None:
    """Mean and spread of each (window, density), a row each, the most bytes on top."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    rows = sorted(outcomes, key=lambda x: x.state_bytes)
    for i, one in enumerate(rows):
        color = COLORS["MicroAdam (2, 6 %)"] if one.method in RECOMMENDED else "0.35"
        axes.errorbar(
            one.mean, i, xerr=one.spread, fmt="o", color=color, capsize=3, linewidth=2
        )
    names = [x.method.removeprefix("MicroAdam ") for x in rows]
    axes.set_yticks(
        range(len(rows)),
        [f"{n}, {x.state_bytes:.2f} B" for n, x in zip(names, rows, strict=True)],
    )
    if adam:
        axes.axvline(adam.mean, color="black", linewidth=1.5, label="Adam, 8 B")
        low, high = adam.mean - adam.spread, adam.mean + adam.spread
        axes.axvspan(low, high, color="black", alpha=0.1)
        axes.legend(loc="lower right", fontsize="small")
    what = deciding(outcomes[0].rows[0])
    axes.set(xlabel=what, ylabel="(window, density), bytes a parameter")
    axes.set_title(title, fontsize="small")
    if not what.endswith("loss"):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    save(figure, file)


def rosenbrock(found: dict[str, Any], file: pathlib.Path) -> None:
    """The paths over the contours of the function."""
    figure, all_axes = plt.subplots(
        2, 2, figsize=(WIDTH, 6.6), sharex=True, sharey=True, layout="constrained"
    )
    x, y = np.meshgrid(np.linspace(-1.1, 1.2, 300), np.linspace(-0.3, 1.3, 300))
    heights = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    for axes, (name, one) in zip(all_axes.flat, found["optimizers"].items(), strict=True):
        axes.grid(False)
        axes.contour(
            x, y, np.log10(heights + 1e-3), levels=14, cmap="Greys", linewidths=0.6
        )
        path = np.array(one["path"])
        axes.plot(*path.T, ".-", color="tab:blue", markersize=4, linewidth=1.5)
        axes.plot(*path[0], "o", color="tab:orange", markersize=8, label="start")
        axes.plot(1, 1, "*", color="tab:red", markersize=14, label="minimum")
        title = name.replace(", ", ",\n", 1)
        axes.set_title(f"{title}\nlearning rate {one['rate']:g}", fontsize="small")
    for axes in all_axes[-1]:
        axes.set_xlabel("first parameter, x")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("second parameter, y")
    all_axes[0, 0].legend(fontsize="small", loc="lower left")
    save(figure, file)


def mechanism(found: dict[str, Any], file: pathlib.Path) -> None:
    """What becomes of a selected entry, and how well updates agree with Adam's."""
    figure, (upper, lower) = plt.subplots(2, figsize=(WIDTH, 8.4), layout="constrained")
    moves, cosines = found["after_selection"], found["along_adam"]
    path = np.cumsum(moves["Adam"])
    upper.plot(path, color="0.75", linewidth=7, label="Adam", solid_capstyle="round")
    alike: dict[tuple, list[str]] = {}  # settings of a window move alike
    for name in OF_MECHANISM:
        alike.setdefault(tuple(moves[name]), []).append(name)
    for seen, names in alike.items():
        emphasized = any(name in EMPHASIZED for name in names)
        look = {"linewidth": 3 if emphasized else 1.2, "markersize": 4}
        color = OF_MECHANISM[next((x for x in names if x in EMPHASIZED), names[0])]
        upper.plot(np.cumsum(seen), "o-", label=", ".join(names), color=color, **look)
    upper.set(
        xlabel="steps since the coordinate was selected",
        ylabel="distance moved (learning rates)",
    )
    upper.legend(fontsize="small", title="(window, density)")
    for name, color in OF_MECHANISM.items():
        horizons = [int(x) for x in cosines[name]["cosine"]]
        bold = name in EMPHASIZED
        look = {"linewidth": 3 if bold else 1.2, "markersize": 5, "zorder": 3 + bold}
        values = cosines[name]["cosine"].values()
        lower.plot(horizons, values, "o-", label=name, color=color, **look)
    lower.set(
        xscale="log",
        xticks=horizons,
        xlabel="steps over which the updates are summed",
        ylabel="cosine with the sum of Adam's",
    )
    lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    lower.minorticks_off()
    lower.legend(fontsize="small", title="(window, density)", ncols=2)
    save(figure, file)


def state_bytes(held: dict[str, float], file: pathlib.Path) -> None:
    """Bytes of state a parameter by optimizer."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    axes.grid(False, axis="y")
    colors = ["tab:blue" if "MicroAdam" in name else "0.6" for name in held]
    bars = axes.barh(list(held), list(held.values()), color=colors)
    axes.bar_label(bars, fmt="{:.3f}", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(held.values()))
    axes.set(xlabel="bytes of state a parameter, Llama-2-7B")
    save(figure, file)


def speed(found: dict[str, dict[str, float]], file: pathlib.Path) -> None:
    """Whole steps in times of optax.adamw's, a bar for each size and setting."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    sizes = list(next(iter(found.values())))
    height = 0.8 / len(found)
    for i, (name, ratios) in enumerate(found.items()):
        at = np.arange(len(sizes)) + height * (i - (len(found) - 1) / 2)
        color = COLORS.get(
            f"MicroAdam {name}", COLORS["MicroAdam (10, 1 %), all compressed"]
        )
        bars = axes.barh(at, list(ratios.values()), height, label=name, color=color)
        labels = axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize="small")
        plt.setp(labels, zorder=3, bbox={"color": "white", "pad": 0.5})
    axes.axvline(1, color="black", linewidth=1.5, zorder=2)
    axes.set_yticks(range(len(sizes)), sizes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(x.values()) for x in found.values()))
    axes.set(xlabel="time of a step over optax.adamw's, on a CPU")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save(figure, file)
