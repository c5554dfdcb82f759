"""What a Llama says: the likeliest token after each prompt, and again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import llama
from instructions import Encoder
from llama_config import Config
from llama_step import Batch, Params, hidden

NUMBER, NEW = 2, 24  # prompts, tokens after each


class Prompts(NamedTuple):
    """Beginnings of rows.

    Attributes:
      tokens: int32 ``(prompts, length + NEW)``, with room for new ones.
      lengths: int32 ``(prompts,)``, of the beginnings.
      expected: what followed in each row.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    expected: list[list[int]]


def prompts_of(rows: Batch) -> Prompts:
    """What comes before a row's completion; of plain text, a quarter."""
    chosen = rows.tokens[:NUMBER]
    width = chosen.shape[1] - 1
    tokens = np.zeros((len(chosen), width + NEW), np.int32)
    lengths, expected = [], []
    for i, (row, weights) in enumerate(zip(chosen, rows.weights, strict=False)):
        counted = np.flatnonzero(weights)
        first, end = int(counted[0]) + 1, int(counted[-1]) + 2
        length = first if first > 1 else max(1, end // 4)
        tokens[i, :length] = row[:length]
        lengths.append(length)
        expected.append(row[length:end].tolist())
    return Prompts(tokens, np.array(lengths, np.int32), expected)


def continued(
    config: Config, params: Params, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """The tokens with `NEW` more after each prompt."""
    rows = jnp.arange(tokens.shape[0])

    def add(i: Any, tokens: jax.Array) -> jax.Array:
        at = lengths + i
        last = hidden(config, params, tokens)[rows, at - 1]
        logits = llama.head_logits(config, params, last[:, None])[:, 0]
        return tokens.at[rows, at].set(jnp.argmax(logits, -1).astype(tokens.dtype))

    return jax.lax.fori_loop(0, NEW, add, tokens)


def shown(tokens: jax.Array, prompts: Prompts, encoder: Encoder) -> str:
    """Each prompt's end, what was said and what was expected."""
    lines: list[str] = []
    for row, length, expected in zip(
        np.asarray(tokens), prompts.lengths, prompts.expected, strict=True
    ):
        said = row[length : length + NEW].tolist()
        stops = [i for i, x in enumerate(said) if x in encoder.end]
        texts = [row[:length].tolist(), said[: stops[0] if stops else NEW], expected]
        prompt, *others = (" ".join(encoder.tokenizer.decode(x).split()) for x in texts)
        lines.append(f"  ... {prompt[-72:]}")
        lines += [f"    {x}: {y}" for x, y in zip(("model", "data"), others, strict=True)]
    return "\n".join(lines)
