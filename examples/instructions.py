"""Rows to fine-tune a language model on: prompts with completions, or any text.

By default the docstrings of installed packages: the first line is what a model shall say
of the others. Modules are divided, so that no file is on both sides.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

import docstrings
from command_line import counted
from llama_step import Batch

TRAINED, HELD_OUT = 120, 10  # docstrings of a package
SUMMARY, BODY = (20, 100), (120, 280)  # characters, at least and at most
SHARE, MOST = 0.05, 32  # of the data that is held out; rows at most
LINES = {".json", ".jsonl", ".ndjson"}
PAIRS, TEXT = "pairs", "text"  # kinds of data


class Pair(NamedTuple):
    """What is given, and what shall follow."""

    prompt: str
    completion: str


class Data(NamedTuple):
    """Rows to train on, rows that are only evaluated, and what they are.

    Attributes:
      cut: how many of them lost some tokens.
      kind: `PAIRS` or `TEXT`.
    """

    train: Batch
    held_out: Batch
    cut: int
    kind: str


class Encoder(NamedTuple):
    """Texts to token numbers.

    Attributes:
      tokenizer: of the model.
      begin: tokens before every row, such as the one that begins a text.
      end: tokens after a completion.
      length: tokens that go into the model; a row has one more.
    """

    tokenizer: Tokenizer
    begin: list[int]
    end: list[int]
    length: int

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def make_encoder(
    tokenizer: Tokenizer, bos: int | None, eos: int | None, length: int
) -> Encoder:
    """With a token at the beginning if the tokenizer puts one there."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begins = bos is not None and tokenizer.encode("").ids[:1] == [bos]
    return Encoder(
        tokenizer, [bos] if begins else [], [] if eos is None else [eos], length
    )


def load(file: pathlib.Path | None, encoder: Encoder, seed: int, show: bool) -> Data:
    """The file's rows, or the docstrings'; some are held out, drawn by the seed.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is neither text nor JSON lines, or too little.
    """
    rng = np.random.default_rng(seed)
    if file is None:
        train, kept_out = (encode_pairs(x, encoder) for x in summaries(show))
        chosen = rng.permutation(len(kept_out[0].tokens))[:MOST]
        cut = train[1].sum() + kept_out[1][chosen].sum()
        return Data(train[0], take(kept_out[0], chosen), int(cut), PAIRS)
    rows, cut = _rows(file, encoder)
    kind = PAIRS if file.suffix.lower() in LINES else TEXT
    counts = np.flatnonzero(rows.weights.any(axis=1))  # rows where something counts
    rows, number = take(rows, counts), len(counts)
    if number < 2:
        less = " or a smaller --length" * (kind == TEXT)
        made = f"{file} makes {counted(number, 'row')} of {encoder.length} tokens"
        raise ValueError(
            f"{made}, and 2 are the least: one to train on and one to hold out; give "
            f"more {kind}{less}"
        )
    order = rng.permutation(number)
    held_out = min(MOST, max(1, round(SHARE * number)))
    parts = take(rows, order[held_out:]), take(rows, order[:held_out])
    return Data(*parts, int(cut[counts].sum()), kind)


def _rows(file: pathlib.Path, encoder: Encoder) -> tuple[Batch, np.ndarray]:
    """All rows, and which of them were cut."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    if file.suffix.lower() in LINES:
        return encode_pairs(read_pairs(file, text), encoder)
    rows = encode_text(text, encoder)
    return rows, np.zeros(len(rows.tokens), bool)


def read_pairs(file: pathlib.Path, text: str) -> list[Pair]:
    """Of JSON lines, each with a prompt and a completion; blank lines are passed over."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                pairs.append(_pair_of(json.loads(line)))
            except (ValueError, RecursionError) as error:
                said = str(error)
                if not isinstance(error, _PairError):
                    several = " (one object a line is expected)" * _is_json(text)
                    said = f"no JSON: {getattr(error, 'msg', error)}{several}"
                raise ValueError(f"{file}, line {number}: {said}") from None
    return pairs


class _PairError(ValueError):
    """JSON that is no pair."""


def _pair_of(found: Any) -> Pair:
    """Of an object with two texts; _PairError says what is wrong with it."""
    expected = 'expected an object with the texts "prompt" and "completion"'
    if not isinstance(found, dict):
        raise _PairError(f"{expected}, got a {type(found).__name__}")
    for key in Pair._fields:
        if key not in found:
            there = ", ".join(json.dumps(x) for x in found) or "nothing"
            raise _PairError(f'{expected}; there is no "{key}", but {there}')
        if not isinstance(found[key], str):
            raise _PairError(f'{expected}; "{key}" is no text')
        if any("\ud800" <= x <= "\udfff" for x in found[key]):
            raise _PairError(f'half a character, a surrogate, in "{key}"')
    pair = Pair(*(found[key] for key in Pair._fields))
    if not pair.completion:
        raise _PairError(f'{expected}; "completion" is empty')
    return pair


def _is_json(text: str) -> bool:
    """Whether it is so as a whole, such as an array over several lines."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def summaries(show: bool = False) -> tuple[list[Pair], list[Pair]]:
    """Docstrings without their first lines, and these; to train on, and held out."""
    parts: tuple[list[Pair], list[Pair]] = [], []
    seen: set[str] = set()
    for label, folder in docstrings.places(show):
        left = [TRAINED, HELD_OUT]
        for side, file in docstrings.modules(label, folder):
            if not any(left):
                break
            for pair in _pairs_of(file) if left[side] else ():
                if left[side] and pair.completion not in seen:
                    seen.add(pair.completion)
                    parts[side].append(pair)
                    left[side] -= 1
    return parts


def _pairs_of(file: pathlib.Path) -> Iterator[Pair]:
    for text in docstrings.docstrings(file):
        first, body = (" ".join(x.split()) for x in text.partition("\n\n")[::2])
        if SUMMARY[0] <= len(first) <= SUMMARY[1] and len(body) >= BODY[0]:
            cut = body if len(body) <= BODY[1] else f"{body[: BODY[1]]} ..."
            yield Pair(f"{cut}\n\nIn one line:", f" {first}")


def encode_pairs(pairs: list[Pair], encoder: Encoder) -> tuple[Batch, np.ndarray]:
    """Rows in which completions count, and which of them were too long.

    A prompt that does not fit loses its beginning, a completion its end.
    """
    size = encoder.length + 1 - len(encoder.begin)
    rows, cut = [], []
    for pair in pairs:
        prompt, completion = encoder(pair.prompt), encoder(pair.completion) + encoder.end
        cut.append(len(prompt) + len(completion) > size)
        least = min(len(prompt), 1 - len(encoder.begin))  # something must come before
        completion = completion[: size - least]
        prompt = prompt[max(0, len(prompt) + len(completion) - size) :]
        prompt = encoder.begin + prompt
        rows.append((prompt + completion, max(1, len(prompt))))
    return _stacked(rows, encoder.length), np.array(cut, bool)


def encode_text(text: str, encoder: Encoder) -> Batch:
    """Rows in which all tokens count, each token of the text once, but for the first."""
    tokens, begin = encoder(text), encoder.begin
    before = 0 if begin else 1  # tokens that a row shares with the one before it
    size = encoder.length + 1 - len(begin)
    starts = range(0, max(0, len(tokens) - before), size - before)
    rows = [(begin + tokens[start : start + size], 1) for start in starts]
    return _stacked(rows, encoder.length)


def _stacked(rows: list[tuple[list[int], int]], length: int) -> Batch:
    """Of tokens and the first of them that counts; zeros at the ends, which do not."""
    tokens = np.zeros((len(rows), length + 1), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (row, first) in enumerate(rows):
        tokens[i, : len(row)] = row
        weights[i, first - 1 : len(row) - 1] = 1
    return Batch(tokens, weights)


def take(rows: Batch, chosen: np.ndarray) -> Batch:
    """Some of the rows."""
    return Batch(*(x[chosen] for x in rows))


def used(rows: Batch) -> int:
    """Tokens that go into the model and are no filling at a row's end."""
    last = rows.weights.shape[1] - np.argmax(rows.weights[:, ::-1], axis=1)
    return int(last.sum())


def batch_at(rows: Batch, number: int, size: int, seed: int) -> Batch:
    """The same rows at a number in every run: all in random order, and again."""
    count = len(rows.tokens)
    places = np.arange(number * size, (number + 1) * size)
    epochs = {x: np.random.default_rng((seed, x)) for x in set(places // count)}
    orders = {x: rng.permutation(count) for x, rng in epochs.items()}
    return take(rows, np.array([orders[x // count][x % count] for x in places]))


def fingerprint(data: Data) -> str:
    """Tells whether a run goes on with the same rows."""
    digest = hashlib.sha256()
    for x in (*data.train, *data.held_out):
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()[:16]
