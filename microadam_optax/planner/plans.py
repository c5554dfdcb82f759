"""Bytes of parameters, gradients and state with each optimizer, from shapes alone."""

import argparse
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from microadam_optax._dense import smaller_than
from microadam_optax._microadam import microadam
from microadam_optax.memory import array_bytes, optimizer_bytes
from microadam_optax.planner.models import Shapes, shapes_of
from microadam_optax.planner.ways import WAYS, together

DEVICES_GB = (16, 24, 40, 80, 141)
GALORE_RANK = 128
DTYPES = ("float32", "bfloat16", "float16")
Shape = tuple[int, ...]
RATE = 1e-3  # plays no part in what is held


class Plan(NamedTuple):
    """Bytes on one device with one optimizer; activations are not among them."""

    optimizer: str
    way: str
    parameters: int
    gradients: int
    state: int

    @property
    def sum(self) -> int:
        """All three together."""
        return self.parameters + self.gradients + self.state

    def fits(self) -> list[int]:
        """The devices, by their GB, that hold that."""
        return [size for size in DEVICES_GB if self.sum <= size * 1e9]


class Candidate(NamedTuple):
    """An optimizer, and the dtype of the parameters that it is initialized with."""

    name: str
    tx: optax.GradientTransformation
    dtype: str


class Leaves(NamedTuple):
    """Parameters of one shape, sharded alike."""

    shape: Shape
    place: NamedSharding
    number: int


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """Those that are compared; optax's moments have the parameters' dtype."""
    dense = smaller_than(args.dense_below) if args.dense_below else None
    ours = microadam(
        RATE,
        window=args.window,
        density=args.density,
        block_size=args.block_size,
        error_bits=args.error_bits,
        dense=dense,
    )
    setting = f"({args.window}, {100 * args.density:g} %), {args.error_bits} bits"
    own, adam = args.params_dtype, optax.adam(RATE)
    rows = [Candidate(f"Adam, {own} moments", adam, own)]
    if own == "float32":
        half = optax.adam(RATE, mu_dtype=jnp.bfloat16)
        rows.append(Candidate("Adam, mu in bfloat16", half, own))
    else:
        rows.append(Candidate("Adam, float32 moments", adam, "float32"))
    galore = optax.contrib.galore(RATE, rank=GALORE_RANK)
    others = {
        "Lion": optax.lion(RATE),
        "Adafactor": optax.adafactor(RATE),
        f"GaLore, rank {GALORE_RANK}": galore,
        f"MicroAdam {setting}": ours,
    }
    return rows + [Candidate(name, tx, own) for name, tx in others.items()]


def plan(config: dict[str, Any], args: argparse.Namespace) -> list[Plan]:
    """For each way and optimizer, all sharded by the first axis that divides."""
    shapes, dtype = shapes_of(config), args.gradients_dtype or args.params_dtype
    leaves = _leaves(shapes, args.devices)
    parameters = _weights(leaves, args.params_dtype)
    gradients = [
        _weights(_leaves(together(shapes, by_layer), args.devices), dtype)
        for by_layer in (False, True)
    ]
    return [
        Plan(
            row.name,
            way.name,
            parameters,
            gradients[way.by_layer],
            _state(leaves, row._replace(tx=way.wrapper(row.tx))),
        )
        for way in WAYS
        for row in candidates(args)
        if row.name.startswith(way.optimizers)
    ]


def _leaves(shapes: Shapes, devices: int) -> list[Leaves]:
    counted = Counter(shapes.values()).items()
    return [Leaves(shape, _place(shape, devices), n) for shape, n in counted]


def _place(shape: Shape, devices: int) -> NamedSharding:
    divided = [n % devices == 0 for n in shape]
    axis = divided.index(True) if any(divided) else None
    spec = () if axis is None else (None,) * axis + ("fsdp",)
    return NamedSharding(AbstractMesh((devices,), ("fsdp",)), PartitionSpec(*spec))


def _weights(leaves: list[Leaves], dtype: str) -> int:
    return sum(
        x.number * array_bytes(jax.ShapeDtypeStruct(x.shape, dtype), x.place)
        for x in leaves
    )


def _state(leaves: list[Leaves], row: Candidate) -> int:
    """Each leaf has its own part beside what is there without any.

    Of equal leaves one is enough, however many layers there are.
    """
    shared = optimizer_bytes(row.tx, ())
    return shared + sum(
        x.number
        * (
            optimizer_bytes(row.tx, jax.ShapeDtypeStruct(x.shape, row.dtype), x.place)
            - shared
        )
        for x in leaves
    )
