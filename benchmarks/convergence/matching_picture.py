"""The picture of Adam's own learning rate, for docs/tuning.md."""

import pathlib
from typing import Any

import pictures
from pictures import plt

SHOWN = {"literal": "match_adam=False", "exponent 0.5": "match_adam=True"}
FLATTENS = "(10, 1 %)"  # by its scores all others, so the axes need not hold them


def draw(found: dict[str, dict[str, Any]], file: pathlib.Path) -> None:
    """Above Adam's best figure by the rate over Adam's: a row a task, a column a way."""
    figure, all_axes = plt.subplots(
        len(found),
        len(SHOWN),
        figsize=(pictures.WIDTH, 1.6 + 2.5 * len(found)),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for row, (task, by_title) in zip(all_axes, found.items(), strict=True):
        row[0].set_ylim(*_limits(by_title))
        row[0].set_ylabel(task)
        for axes, way in zip(row, SHOWN, strict=True):
            _curves(axes, {x: y for x, y in by_title.items() if x.endswith(f", {way}")})
    for axes, title in zip(all_axes[0], SHOWN.values(), strict=True):
        axes.set_title(title, fontsize="medium")
    for axes in all_axes[-1]:
        axes.set_xlabel("learning rate over Adam's best")
    figure.supylabel("loss (or error rate) above Adam's best", fontsize="medium")
    entries = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2)
    pictures.save(figure, file)


def _curves(axes: Any, by_title: dict[str, dict[float, float]]) -> None:
    """A line for each setting."""
    for title, scores in by_title.items():
        name = title.rpartition(", ")[0]
        axes.plot(list(scores), list(scores.values()), "o-", label=name)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xscale="log")
    axes.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
    axes.minorticks_off()


def _limits(by_title: dict[str, Any]) -> tuple[float, float]:
    """What is shown of a task."""
    shown = [
        y
        for title, scores in by_title.items()
        if FLATTENS not in title and title.rpartition(", ")[2] in SHOWN
        for y in scores.values()
    ]
    room = 0.05 * (max(shown) - min(shown))
    return min(*shown, 0) - room, max(shown) + room
