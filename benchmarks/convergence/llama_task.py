"""SmolLM2-135M, fine-tuned in full on docstrings and their first lines."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from tasks import Task  # and the examples can be imported

import instructions  # isort: skip
import llama_files  # isort: skip
import llama_step  # isort: skip

LENGTH, BATCH = 96, 3


def llama() -> Task:
    """The data of examples/finetune_llama.py, in shorter rows, so that a step takes less.

    The seed decides the order of the rows; all begin from the same parameters.
    """
    loaded = llama_files.load(llama_files.default_model())
    config = loaded.config
    encoder = instructions.make_encoder(
        loaded.tokenizer, config.bos_id, config.eos_id, LENGTH
    )
    data = instructions.load(None, encoder, 0, False)
    summed = jax.jit(functools.partial(llama_step.whole_loss, config))

    def loss(params: Any, batch: Any) -> jax.Array:
        return llama_step.mean_loss(config, params, batch)

    def batches(seed: int) -> Iterator[Any]:
        number = 0
        while True:
            yield instructions.batch_at(data.train, number, BATCH, seed)
            number += 1

    def evaluate(params: Any) -> dict[str, float]:
        rows = data.held_out
        places = range(0, len(rows.tokens), 8)
        parts = (instructions.take(rows, slice(i, i + 8)) for i in places)
        total = sum(float(summed(params, part)) for part in parts)
        return {"held-out loss": total / float(rows.weights.sum())}

    return Task(lambda _: loaded.params, loss, batches, evaluate)
