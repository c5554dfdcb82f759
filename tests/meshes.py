"""Meshes of 8 devices, how real models shard over them, and what XLA then sends."""

import collections
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "tp 8": {"tp": 8},
    "fsdp 2, tp 4": {"fsdp": 2, "tp": 4},
    "fsdp 4, tp 2": {"fsdp": 4, "tp": 2},
    "data 2, fsdp 4": {"data": 2, "fsdp": 4},
    "data 2, fsdp 2, tp 2": {"data": 2, "fsdp": 2, "tp": 2},
}


class Case(NamedTuple):
    shape: tuple[int, ...]  # as in models of 7B parameters, or GPT-2
    small: tuple[int, ...]  # less of it with the same layout
    spec: P


ATTENTION, OUTPUT = (4096, 32, 128), (32, 128, 4096)
SMALL_ATTENTION, SMALL_OUTPUT = (16, 32, 128), (8, 2, 4096)
CASES = {
    "rows": Case((4096, 4096), (64, 4096), P("fsdp", None)),
    "columns": Case((4096, 4096), (16, 4096), P(None, "tp")),
    "rows and columns": Case((4096, 4096), (16, 4096), P("fsdp", "tp")),
    "rows over two axes": Case((4096, 4096), (16, 4096), P(("data", "fsdp"), None)),
    "rows over two axes and columns": Case(
        (4096, 4096), (16, 4096), P(("data", "fsdp"), "tp")
    ),
    "replicated": Case((4096, 4096), (16, 4096), P()),
    "stacked layers": Case((32, 4096, 4096), (2, 8, 4096), P(None, "fsdp", "tp")),
    "attention, heads": Case(ATTENTION, SMALL_ATTENTION, P(None, "tp", None)),
    "attention, embed and heads": Case(ATTENTION, SMALL_ATTENTION, P("fsdp", "tp")),
    "grouped query": Case((4096, 8, 128), (16, 8, 128), P(None, "tp", None)),
    "grouped query, embed and heads": Case(
        (4096, 8, 128), (16, 8, 128), P("fsdp", "tp", None)
    ),
    "attention output, heads": Case(OUTPUT, SMALL_OUTPUT, P("tp", None, None)),
    "attention output, heads and embed": Case(
        OUTPUT, SMALL_OUTPUT, P("tp", None, "fsdp")
    ),
    "MLP up": Case((4096, 11008), (8, 11008), P(None, "tp")),
    "MLP up, both": Case((4096, 11008), (8, 11008), P("fsdp", "tp")),
    "MLP down": Case((11008, 4096), (16, 4096), P("tp", None)),
    "MLP down, both": Case((11008, 4096), (16, 4096), P("tp", "fsdp")),
    "vocabulary": Case((32000, 4096), (32, 4096), P("tp", None)),
    "vocabulary, embed": Case((32000, 4096), (32, 4096), P(None, "fsdp")),
    "vocabulary, both": Case((32000, 4096), (32, 4096), P("tp", "fsdp")),
    "GPT-2 vocabulary, embed": Case((50257, 768), (101, 768), P(None, "tp")),
    "GPT-2 vocabulary, embed over fsdp": Case((50257, 768), (101, 768), P(None, "fsdp")),
    "bias or norm": Case((4096,), (4096,), P()),
    "bias, sharded": Case((4096,), (4096,), P("tp")),
    "norm, sharded": Case((768,), (768,), P("fsdp")),
    "convolution": Case((3, 3, 256, 512), (3, 3, 16, 512), P(None, None, None, "tp")),
    "convolution, both": Case(
        (3, 3, 256, 512), (3, 3, 16, 512), P(None, None, "fsdp", "tp")
    ),
}


# Every case on at least one mesh, those of several axes on those that have them.
BOTH = (
    "rows and columns",
    "stacked layers",
    "attention, embed and heads",
    "grouped query, embed and heads",
    "attention output, heads and embed",
    "MLP up, both",
    "MLP down, both",
    "vocabulary, both",
    "convolution, both",
)
CASES_ON = {
    "fsdp 8": (
        "rows",
        "vocabulary, embed",
        "GPT-2 vocabulary, embed over fsdp",
        "norm, sharded",
        "bias or norm",
    ),
    "tp 8": (
        "columns",
        "attention, heads",
        "grouped query",
        "attention output, heads",
        "MLP up",
        "MLP down",
        "vocabulary",
        "GPT-2 vocabulary, embed",
        "bias, sharded",
        "convolution",
    ),
    "fsdp 2, tp 4": BOTH,
    "fsdp 4, tp 2": (*BOTH[:4], "replicated"),
    "data 2, fsdp 4": ("rows", "rows over two axes", "replicated", "norm, sharded"),
    "data 2, fsdp 2, tp 2": (
        "rows over two axes and columns",
        "columns",
        "stacked layers",
        "norm, sharded",
    ),
}


def make_mesh(name: str, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    axes = MESHES[name]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes))


def cases_on(name: str) -> dict[str, Case]:
    return {case: CASES[case] for case in CASES_ON[name]}


def zeros(shapes):
    """Arrays as the shapes say, where they say."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_placed(tree, shardings) -> None:
    def check(path, x, sharding):
        same = x.sharding.is_equivalent_to(sharding, x.ndim)
        assert same, (jax.tree_util.keystr(path), x.sharding, sharding)

    jax.tree_util.tree_map_with_path(check, tree, shardings)


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How often each kind of communication stands in a compiled program."""
    names = "|".join(COLLECTIVES)
    found = re.findall(rf"\s({names})(?:-start)?\(", compiled.as_text())
    return dict(collections.Counter(found))
