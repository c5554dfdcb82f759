"""Labelled texts: read from files, as token numbers, in batches."""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Example = tuple[str, str]  # label and text


class Data(NamedTuple):
    """Token numbers, masks and class numbers."""

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def read_examples(file: pathlib.Path) -> list[Example]:
    """Lines of a label, a tab and a text."""
    examples = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        label, tab, text = line.partition("\t")
        if not tab or not label.strip() or not text.strip():
            raise ValueError(f"{file}, line {number}: expected a label, a tab and a text")
        examples.append((label.strip(), text.strip()))
    if not examples:
        raise ValueError(f"{file} has no lines")
    return examples


def encode(examples: list[Example], labels: list[str], tokens) -> Data:
    numbers = {label: number for number, label in enumerate(labels)}
    found = tokens([text for _, text in examples])
    return Data(*found, np.array([numbers[label] for label, _ in examples], np.int32))


def batches(data: Data, size: int, seed: int) -> Iterator[Data]:
    """Each example once, in random order, and again, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.labels))
        for start in range(0, max(1, len(order) - size + 1), size):
            rows = order[start : start + size]
            yield Data(*(array[rows] for array in data))
