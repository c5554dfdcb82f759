"""What is timed on a GPU: optimizers, and the shapes of their leaves."""

import functools
import itertools
from typing import NamedTuple

import optax

from common import SETTINGS, with_float32_state
from gpu_check import kernel_here
from microadam_optax import microadam

WIDTHS = {"1e9": (4096, 11008, 5), "1e8": (2048, 5504, 2)}  # embed, MLP, layers
DECAY = 1e-4  # optax.adamw's default
FIRST = "optax.adamw, float32 state"
KERNELS = tuple(f"MicroAdam {name}, kernel" for name in SETTINGS)
XLA = tuple(f"MicroAdam {name}, XLA" for name in SETTINGS)
BLOCKS_64 = "MicroAdam (1, 4 %), blocks of 64, kernel"
OTHERS = ("optax.adafactor", "optax.lion")
GALORE = ("optax.contrib.galore", "optax.contrib.galore, projecting")
ADAMW = (FIRST, "optax.adamw")


class Case(NamedTuple):
    """What is timed."""

    size: str
    dtype: str
    stacked: bool
    apply: bool
    name: str


def cases(tiny: bool = False) -> list[Case]:
    """The most wanted first."""
    if tiny:
        return [
            Case("tiny", "bfloat16", *x)
            for x in itertools.product((True, False), (True, False), (FIRST, *KERNELS))
        ]
    groups = [
        ("1e9", "bfloat16", True, True, (*ADAMW, *KERNELS, BLOCKS_64, *OTHERS, *XLA)),
        ("1e9", "bfloat16", True, False, (*ADAMW, *KERNELS)),
        ("1e9", "float32", True, True, (*ADAMW, *KERNELS, XLA[0])),
        ("1e9", "bfloat16", False, True, (FIRST, *KERNELS)),
        ("1e8", "bfloat16", True, False, (*ADAMW, *KERNELS, *GALORE)),
        ("1e8", "float32", True, False, (FIRST, *KERNELS)),
    ]
    return [Case(*g[:4], name) for g in groups for name in g[4]]


def llama_like(
    embed: int, mlp: int, layers: int, stacked: bool = True
) -> list[tuple[int, ...]]:
    """Layers stacked, as they are for a scan over them, nine leaves; or one by one."""
    layer = [(embed, embed)] * 4 + [(embed, mlp)] * 2 + [(mlp, embed)] + [(embed,)] * 2
    if stacked:
        return [(layers, *shape) for shape in layer]
    return [tuple(shape) for shape in layer] * layers


def peers() -> dict[str, optax.GradientTransformation]:
    own = functools.partial(microadam, 1e-3, weight_decay=DECAY)
    table = {
        FIRST: with_float32_state(optax.adamw(1e-3)),
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "optax.lion": optax.lion(1e-3),
    }
    for names, implementation in ((KERNELS, kernel_here()), (XLA, "xla")):
        for name, settings in zip(names, SETTINGS.values(), strict=True):
            table[name] = own(**settings, implementation=implementation)
    small = {"window": 1, "density": 0.04, "block_size": 64}
    table[BLOCKS_64] = own(**small, implementation=kernel_here())
    # Its projections are singular value decompositions: never after the first, or always.
    for name, gap in zip(GALORE, (10**9, 1), strict=True):
        table[name] = optax.contrib.galore(1e-3, update_proj_gap=gap)
    return table
