"""The optimizer state: what is kept of a leaf, and in which shapes."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from microadam_optax import _paths, _specs
from microadam_optax._blocks import Layout


class MicroAdamState(NamedTuple):
    """State of `scale_by_microadam`.

    Every field but `count`, `ages` and `key` is a tree like the parameters. A leaf is
    either compressed or dense, and where a field has nothing of it stands an
    `optax.MaskedNode`, so `optax.tree.map_params` with further trees needs
    ``is_leaf=lambda x: isinstance(x, optax.MaskedNode)``, as after `optax.masked`.
    With ``dense=None`` there are none, and `mu` and `nu` are None.
    The arrays of a compressed leaf lead with its grid, so its PartitionSpec is valid for
    each of them.

    Attributes:
      count: int32 scalar, steps done.
      ages: int32 ``(window - 1,)``, steps since each slot of the window was written.
        None at window 1.
      codes: uint8 ``(*grid, blocks, block * error_bits / 8)``, the error feedback.
      ranges: bfloat16 ``(*grid, blocks, 2)``, of each block the step between
        its codes and the code of zero.
      indices: uint8, or uint16 where blocks are larger than 256,
        ``(*grid, blocks, (window - 1) * k)``: positions of the window's entries in
        their block. None at window 1.
      values: bfloat16, those entries, like `indices`.
      mu: a dense leaf's first moment, as `optax.scale_by_adam` keeps it: in the shape and
        dtype of the leaf.
      nu: its second moment, like `mu`.
      key: raw PRNG key (uint32) for stochastic rounding, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    ages: jax.Array | None
    codes: Any
    ranges: Any
    indices: Any
    values: Any
    mu: Any
    nu: Any
    key: jax.Array | None


class Settings(NamedTuple):
    """The Python numbers that shape a leaf's state and update."""

    window: int
    density: float
    block_size: int
    bits: int  # of an error code
    alpha: float
    implementation: str | None = None
    match_adam: bool = False

    def k(self, block: int) -> int:
        """Entries selected in a block."""
        if not self.density:  # of a micro-batch, which the error takes up
            return 0
        # Rounded, so that 7 % of 100 is 7 although 0.07 * 100 > 7 in binary.
        return max(1, math.ceil(round(self.density * block, 6)))

    def of_micro_batch(self) -> "Settings":
        """Those of a step that selects nothing."""
        return self._replace(window=1, density=0.0, alpha=0.0, match_adam=False)


class LeafState(NamedTuple):
    """The fields of `MicroAdamState` for a compressed leaf: arrays, or their shapes."""

    codes: Any
    ranges: Any
    indices: Any
    values: Any


class Moments(NamedTuple):
    """The fields of `MicroAdamState` for a dense leaf."""

    mu: Any
    nu: Any


def pack(
    count: jax.Array,
    ages: Any,
    key: Any,
    leaves: Sequence[LeafState | Moments],
    tree: Any,
    mixed: bool,
) -> MicroAdamState:
    """The states of all leaves as one, each field a tree like the parameters.

    There are no fields for dense leaves unless it is `mixed`.
    """

    def field(name: str) -> Any:
        return tree.unflatten(getattr(x, name, optax.MaskedNode()) for x in leaves)

    names = [*LeafState._fields, *Moments._fields]
    fields = {name: field(name) for name in names}
    if ages is None:
        fields |= {"indices": None, "values": None}
    if not mixed:
        fields |= {"mu": None, "nu": None}
    return MicroAdamState(count=count, ages=ages, key=key, **fields)


def unpack(state: MicroAdamState, tree: Any) -> list[LeafState | Moments]:
    """The inverse of `pack`."""

    def columns(names: tuple[str, ...]) -> Any:
        fields = (getattr(state, name) for name in names)
        absent = [None] * tree.num_leaves
        found = [absent if x is None else tree.flatten_up_to(x) for x in fields]
        return zip(*found, strict=True)

    compressed, dense = columns(LeafState._fields), columns(Moments._fields)
    return [
        Moments(*moments) if hasattr(moments[0], "shape") else LeafState(*blocks)
        for blocks, moments in zip(compressed, dense, strict=True)
    ]


def is_masked(x: Any) -> bool:
    """Whether it stands where a field of the state has nothing of a leaf."""
    return isinstance(x, optax.MaskedNode)


def check_structure(updates: Any, state: Any) -> None:
    """Raises an error if the gradients are not a tree like the state's."""
    if not isinstance(state, MicroAdamState):
        raise TypeError(
            "The optimizer state must be a MicroAdamState, got a "
            f"{type(state).__name__}: it was made by another transformation or by an "
            "earlier version, or restored without its structure."
        )

    state_tree = state.codes
    if state.mu is not None:
        state_tree = jax.tree.map(_kept, state.codes, state.mu, is_leaf=is_masked)
    structures: list[Any] = [jax.tree.structure(x) for x in (updates, state_tree)]
    if structures[0] == structures[1]:
        return
    raise ValueError(
        "The gradient tree does not match the optimizer state: "
        f"{_paths.difference(updates, state_tree)}."
    )


def _kept(codes: Any, mu: Any) -> Any:
    return mu if is_masked(codes) else codes


def check_key(key: Any, stochastic_rounding: bool) -> None:
    """Raises ValueError if a state was made for the other way of rounding."""
    if (key is not None) != stochastic_rounding:
        raise ValueError(
            "The optimizer state was made with `stochastic_rounding` "
            f"{key is not None}, but this transformation has {stochastic_rounding}."
        )


def shapes(layout: Layout, window: int, bits: int, k: int) -> LeafState:
    """Shapes of the state of a leaf; None for what window 1 does not keep."""
    lead = (*layout.grid, layout.blocks)
    entries = (*lead, (window - 1) * k) if window > 1 else None
    codes = (*lead, layout.block * bits // 8)
    return LeafState(codes, (*lead, 2), entries, entries)


def zeros(layout: Layout, settings: Settings, sharding: Any = None) -> LeafState:
    """The state of a leaf before the first step, sharded like the leaf."""
    window, k = settings.window, settings.k(layout.block)
    of = shapes(layout, window, settings.bits, k)
    array = functools.partial(_zeros, sharding)
    codes, ranges = array(of.codes, jnp.uint8), array(of.ranges, jnp.bfloat16)
    if of.indices is None:
        return LeafState(codes, ranges, None, None)
    # The entries are zeros, but no position may stand twice in a slot.
    dtype = index_dtype(layout.block)
    slots = np.tile(np.arange(k, dtype=dtype), window - 1)
    indices = _zeros(_specs.on_device(sharding), of.indices, dtype) + slots
    if _specs.is_offloaded(sharding):
        indices = jax.device_put(indices, _specs.follow(sharding, of.indices))
    return LeafState(codes, ranges, indices, array(of.values, jnp.bfloat16))


def _zeros(sharding: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    device = None if sharding is None else _specs.follow(sharding, shape)
    return jnp.zeros(shape, dtype, device=device)


def index_dtype(block: int) -> Any:
    """The smallest unsigned type that holds every position in a block."""
    return jnp.uint8 if block <= 2**8 else jnp.uint16
