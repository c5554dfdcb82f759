"""Leaves that between them take every path through the kernels, and gradients."""

import jax.numpy as jnp
import numpy as np

from microadam_optax import PAPER

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def _whole(**arguments):
    """For cells of whole rows, which the default grid would cut."""
    return {"shards": 1, **arguments}


CASES = {  # shape of a leaf, its dtype, arguments
    "one by one": ((5, 256), F32, _whole(**PAPER)),
    "the most one by one": ((3, 256), F32, _whole(window=4, density=0.0156)),
    "the fewest by bisection": ((3, 256), F32, _whole(window=4, density=0.0157)),
    "window 1": ((9, 256), BF16, _whole(window=1, density=0.12)),
    "window 1, one entry": ((2, 256), F16, _whole(window=1, density=0.001)),
    "window 1, a quarter": ((3, 256), F32, _whole(window=1, density=0.25)),
    "window 2": ((4, 512), BF16, _whole(window=2, density=0.06)),
    "float16": ((3, 256), F16, _whole(window=2, density=0.06)),
    "the most entries": ((3, 256), F32, _whole(window=2, density=0.25)),
    "the most slots": ((3, 256), F32, _whole(window=128, density=0.001)),
    "eight bits": ((3, 256), F32, _whole(window=3, density=0.04, error_bits=8)),
    "two bits": ((3, 256), BF16, _whole(window=3, density=0.04, error_bits=2)),
    "two bits of 200": ((3, 200), BF16, {"window": 3, "density": 0.04, "error_bits": 2}),
    "rows cut into four": ((5, 256), F32, PAPER),
    "padded cells": ((2, 11008), BF16, {"window": 2, "density": 0.06}),
    "lanes left over": ((3, 96), F32, {"window": 2, "density": 0.06, "grid": (3, 1)}),
    "a cell of 5": ((2, 5), F32, {"density": 0.9, "block_size": 8, "grid": (2, 1)}),
    "more selected than there is": ((3, 3), F32, {"window": 3, "density": 1.0}),
}
FORMS = {  # and what comes of them: elements of a block, and how many are selected
    "one by one": (256, 3),
    "the most one by one": (256, 4),
    "the fewest by bisection": (256, 5),
    "window 1": (256, 31),
    "window 1, one entry": (256, 1),
    "window 1, a quarter": (256, 64),
    "window 2": (256, 16),
    "float16": (256, 16),
    "the most entries": (256, 64),
    "the most slots": (256, 1),
    "eight bits": (256, 11),
    "two bits": (256, 11),
    "two bits of 200": (200, 8),
    "rows cut into four": (64, 1),
    "padded cells": (232, 14),
    "lanes left over": (96, 6),
    "a cell of 5": (8, 8),
    "more selected than there is": (16, 16),
}


def gradients(shape, dtype, steps=25):
    """Heavy tails, ties, empty rows, and numbers that nobody wants."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        g = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))
        if step % 4 == 1:
            g = np.round(g)
        rows = g.reshape(-1, shape[-1])
        if step % 5 == 2:
            rows[0] = 0
        if step % 7 == 3:
            rows[-1] = 0.5
        if step == 9:
            rows[0, :2] = 3e4, -3e4
        if step in (20, 21):
            rows[0, : step - 19] = np.nan
        if step == 22:
            rows[-1, :2] = np.inf, -np.inf
        g = np.array(jnp.asarray(g, dtype))
        if step % 2:  # the NaN of a GPU
            bits = g.view(f"u{g.itemsize}")
            bits[np.isnan(g.astype(np.float32))] = np.iinfo(bits.dtype).max // 2
        yield jnp.asarray(g)
