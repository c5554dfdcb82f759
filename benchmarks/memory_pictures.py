"""The pictures of whole training steps on a GPU, from results/gpu_memory.json.

python benchmarks/memory_pictures.py
"""

import argparse
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gpu_memory_tables import (
    CARDS_GB,
    LAYER_BY_LAYER,
    PARTS,
    Peak,
    llama_peaks,
    parts,
    shown_rows,
)
from pages import ROOT, load

IMAGES = ROOT / "docs" / "images"
WIDTH = 6.4  # inches: letters of 11 points can be read at 400 pixels
COLORS = dict(zip(PARTS, ("0.7", "tab:orange", "tab:blue", "tab:green"), strict=True))


def save(figure: Any, file: pathlib.Path) -> None:
    """Without the date and versions that would make each file new."""
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def wrapped(name: str) -> str:
    """In two lines, but for a setting in brackets."""
    short = name.removeprefix("optax.").removeprefix("contrib.")
    return short if "(" in short else short.replace(", ", ",\n", 1)


def cards(axes: Any) -> None:
    """A line for each card's memory, its size above."""
    for size in CARDS_GB:
        axes.axvline(size, color="0.35", linewidth=1, linestyle="--", zorder=1)
        axes.text(
            size, 1.01, f"{size}", transform=axes.get_xaxis_transform(), ha="center"
        )


def llama(peaks: list[Peak], file: pathlib.Path) -> None:
    """The peak of each optimizer's step, beside what cards hold."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    names = [wrapped(x.name) for x in peaks]
    emphasis = ["tab:blue" if x.name == LAYER_BY_LAYER else "0.65" for x in peaks]
    values = [x.gigabytes for x in peaks]
    bars = axes.barh(names, values, 0.62, color=emphasis, zorder=2)
    labels = [
        f"{x.gigabytes:.1f} GB, {x.bytes_a_parameter:.1f} bytes a parameter"
        for x in peaks
    ]
    texts = axes.bar_label(bars, labels, padding=5)
    plt.setp(texts, zorder=3, bbox={"color": "white", "pad": 1})
    cards(axes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.06 * max(CARDS_GB))
    axes.set_title("memory of a card, GB", fontsize="medium", pad=18)
    axes.set_xlabel("GB at the peak of a training step, Llama-2-7B")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def step_parts(rows: list[dict], file: pathlib.Path) -> None:
    """What is held at the peak, one part after the other."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5.6), layout="constrained")
    names = [wrapped(row["optimizer"]) for row in rows]
    ends = [0.0] * len(rows)
    for part, color in COLORS.items():
        values = [parts(row)[part] for row in rows]
        bars = axes.barh(names, values, 0.7, left=ends, color=color, label=part)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.bar_label(bars, [f"{end:.1f}" for end in ends], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(ends))
    axes.set_xlabel(f"bytes a parameter, {rows[0]['number'] / 1e9:.2f} billion, bfloat16")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, file)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plt.rcParams.update({"font.size": 11})
    results = load("gpu_memory")
    llama(llama_peaks(results), IMAGES / "llama7b.png")
    step_parts(shown_rows(results), IMAGES / "step_parts.png")


if __name__ == "__main__":
    main()
