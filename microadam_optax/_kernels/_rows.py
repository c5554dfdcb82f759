"""What the kernels compute on rows, in operations that both backends have.

A row is a block of a leaf, as a list of parts: arrays ``(rows, lanes)`` whose lanes
hold neighbours. Elements whose codes share a byte are at the same lane of different
parts. Numbers of a row are arrays ``(rows, 1)``.

Magnitudes are compared by the bits of the float, an order that the hardware reduces
in one instruction: the k largest are found one by one if they are few, else by
bisection, counting how many reach a threshold until exactly k do.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax import _moments, _quantize
from microadam_optax._blocks import Layout
from microadam_optax._state import Settings

_BLOCK, _SELECTED, _ENTRIES = 256, 64, 128  # the largest that a kernel takes
_DTYPES = ("float32", "bfloat16", "float16")
FEW = 4  # up to here the k largest are found one by one
NOWHERE = 1 << 20  # a position that no row has
_INFINITY = 0x7F800000
_OCTAVES = 2 << 23  # what a first step of the bisection spans, in bits of a float32
_MAGIC = 1 << 23  # added to a small whole number, shows it in the float's last bits


class Rows(NamedTuple):
    """A leaf in rows: arrays, or references to them."""

    gradient: Any  # (cells, cell); the update takes its place
    codes: Any  # uint8 (rows, block * bits / 8)
    ranges: Any  # bfloat16 (rows, 2)
    indices: Any  # unsigned (rows, (window - 1) * k)
    values: Any  # bfloat16, like indices; both None at window 1


def like(rows: Rows) -> Rows:
    """Shapes and dtypes, with what `jax.shard_map` knows of them."""

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        known = jax.typeof(x)
        return jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=known.sharding,
            manual_axis_type=known.manual_axis_type,
        )

    return jax.tree.map(shape, rows)


class Scalars(NamedTuple):
    """What all rows share."""

    # float32 (4,): the debiasing of mu and nu, eps, and eps_root before the debiasing
    factors: Any
    start: Any  # int32 (1,), where the oldest slot begins; None at window 1
    weights: Any  # float32 (2, window - 1), of the slots in mu and nu; or None


class Launch(NamedTuple):
    """The Python numbers of a launch."""

    cell: int  # elements in a cell
    blocks: int  # in a cell
    block: int
    bits: int
    k: int
    interpret: bool = False
    alpha: float = 0.0


def nothing() -> str | None:
    """What is missing where a kernel needs no more than Pallas."""
    return None


def reason_against(at: Layout, dtype: Any, settings: Settings) -> str | None:
    """Why a kernel of Pallas cannot update a leaf; None if it can."""
    k = settings.k(at.block)
    rows = math.prod(at.grid) * at.blocks
    widest = max(at.block, (settings.window - 1) * k)
    name = str(jnp.dtype(dtype))
    limits = {
        f"gradients of {name}": name not in _DTYPES,
        "`alpha` other than 0": settings.alpha,
        f"blocks of more than {_BLOCK} elements": at.block > _BLOCK,
        f"more than {_SELECTED} selected entries in a block": k > _SELECTED,
        f"more than {_ENTRIES} entries in the window of a block": (
            settings.window * k > _ENTRIES
        ),
        "leaves of 2**31 elements, or entries in the window, and more": (
            rows * widest >= 2**31
        ),
    }
    return next((text for text, exceeded in limits.items() if exceeded), None)


class Chosen(NamedTuple):
    """Which elements of the rows are selected."""

    masks: list[jax.Array]  # bool (rows, lanes) for each part
    kth: jax.Array  # (rows, 1): keys above are selected, equals up to a position
    last: jax.Array
    found: list[tuple[jax.Array, jax.Array]]  # positions, values, if one by one


def largest(
    accumulated: list[jax.Array], at: list[jax.Array], real: list[jax.Array], k: int
) -> Chosen:
    keys = each(lambda x, mask: jnp.where(mask, magnitude(x), -1), accumulated, real)
    if k > FEW:
        return _bisect(keys, at, k)
    # Position and sign in one number, so that one reduction finds both.
    signed = each(lambda x, i: 2 * i + _negative(_bits(x)), accumulated, at)
    found = []
    for _ in range(k):
        kth = reduce(jnp.maximum, jnp.max, keys)
        ties = [
            jnp.where(key == kth, i, 2 * NOWHERE)
            for key, i in zip(keys, signed, strict=True)
        ]
        lowest = reduce(jnp.minimum, jnp.min, ties)
        last = lowest >> 1
        keys = [jnp.where(i == last, -1, key) for key, i in zip(keys, at, strict=True)]
        found.append((last, _float(kth | (lowest << 31))))
    return Chosen(each(lambda m, key: m & (key < 0), real, keys), kth, last, found)


def _bisect(keys: list[jax.Array], at: list[jax.Array], k: int) -> Chosen:
    """Selects all keys from `high` on, which `reached` do, and breaks ties below."""
    top = reduce(jnp.maximum, jnp.max, keys) + 1

    def unfinished(state: Any) -> jax.Array:
        low, high, reached, _ = state
        return jnp.max(jnp.where(reached < k, high - low, 0)) > 1

    def halve(state: Any) -> Any:
        low, high, reached, leap = state
        middle = jnp.maximum(low + ((high - low) >> 1), high - leap)
        count = _count([middle - 1 - key for key in keys])
        open_ = (reached < k) & (high - low > 1)
        up, down = open_ & (count > k), open_ & (count <= k)
        low, high = jnp.where(up, middle, low), jnp.where(down, middle, high)
        leap = jnp.minimum(leap, 1 << 29) * 2
        return low, high, jnp.where(down, count, reached), leap

    none = jnp.zeros_like(top)
    state = (none, top, none, jnp.int32(_OCTAVES))
    _, high, reached, _ = lax.while_loop(unfinished, halve, state)
    missing = k - reached

    def break_ties(keys: list[jax.Array]) -> Any:
        last = _last_tie(keys, at, high - 1, missing)
        taken = each(lambda key, i: (key == high - 1) & (i <= last), keys, at)
        return each(lambda key, tie: jnp.where(tie, high, key), keys, taken), last

    keys, last = lax.cond(
        jnp.max(missing) > 0, break_ties, lambda keys: (keys, none - 1), keys
    )
    return Chosen([key >= high for key in keys], high - 1, last, [])


def _last_tie(
    keys: list[jax.Array], at: list[jax.Array], kth: jax.Array, missing: jax.Array
) -> jax.Array:
    """Where the `missing`-th of the keys that equal `kth` is; -1 if none is missing."""
    ties = each(lambda key, i: jnp.where(key == kth, i, NOWHERE), keys, at)
    bits = (len(at) * at[0].shape[1] - 1).bit_length()

    def next_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        bit = jnp.left_shift(jnp.int32(1), bits - 1 - i)
        before = _count([tie - (last + bit) for tie in ties])
        return jnp.where(before < missing, last + bit, last)

    last = lax.fori_loop(jnp.int32(0), jnp.int32(bits), next_bit, jnp.zeros_like(kth))
    return jnp.where(missing > 0, last, -1)


def quantize(
    rest: list[jax.Array], bits: int
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Bytes, and the step and the code of zero.

    The selected elements are 0 here, so the ends are not above and not below 0, where
    the bits of a float are in order as integers.
    """
    highest = reduce(jnp.maximum, jnp.max, [_bits(x) for x in rest])
    lowest = reduce(jnp.maximum, jnp.max, [_bits(-x) for x in rest])
    nan = jnp.maximum(highest, lowest) > _INFINITY
    high, below = (
        jnp.where(nan, jnp.nan, _float(jnp.maximum(end, 0))) for end in (highest, lowest)
    )
    top = 2**bits - 1
    step = rounded((high + below) * jnp.float32(_quantize.ABOVE / top), 16)
    step = jnp.where(step < _quantize.SMALLEST, 0, step)
    finite = (step > 0) & (step < jnp.inf)
    zero = 0 - jnp.where(finite, _quantize.multiple(0 - below, step, 0.5)[0], 0)
    kept = jnp.where(finite, top, 0)  # of the bits of a code
    shown = []
    for x in rest:
        code = _quantize.multiple(x, step, 0.5)[0] + zero
        shown.append(_bits(code + _MAGIC) & kept)
    number = len(rest) * bits // 8  # of bytes that a row has at one lane
    bytes_ = shown[:number]
    for part, code in enumerate(shown[number:], number):
        bytes_[part % number] |= code << (bits * (part // number))
    step, zero = step.astype(jnp.bfloat16), zero.astype(jnp.bfloat16)
    return [byte.astype(jnp.uint8) for byte in bytes_], (step, zero)


def dequantize(
    byte: jax.Array, part: int | jax.Array, step: jax.Array, zero: jax.Array, bits: int
) -> jax.Array:
    code = (byte.astype(jnp.int32) >> (bits * part)) & (2**bits - 1)
    return (code.astype(jnp.float32) - zero) * step


def moments(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return value, value * value


def rescale(
    debias_mu: jax.Array,
    debias_nu: jax.Array,
    eps: jax.Array,
    eps_root: jax.Array,
    dtype: Any,
    mu: jax.Array,
    nu: jax.Array,
) -> jax.Array:
    """The update."""
    update = debias_mu * mu / (jnp.sqrt(debias_nu * (nu + eps_root)) + eps)
    return _moments.cast(update, dtype)


def each(f: Callable, *parts: list[jax.Array]) -> list[jax.Array]:
    return [f(*args) for args in zip(*parts, strict=True)]


def reduce(combine: Callable, along: Callable, parts: list[jax.Array]) -> jax.Array:
    """One number of each row, of all parts."""
    return along(functools.reduce(combine, parts), axis=1, keepdims=True)


def _count(differences: list[jax.Array]) -> jax.Array:
    """How many are negative."""
    total = functools.reduce(operator.add, each(_negative, differences))
    return jnp.sum(total, axis=1, keepdims=True, dtype=jnp.int32)


def _negative(x: jax.Array) -> jax.Array:
    """The sign bit: unlike a comparison, it is shifted and added in one instruction."""
    return lax.shift_right_logical(x, jnp.full_like(x, 31))


def rounded(x: jax.Array, dropped: int) -> jax.Array:
    """float32 without its last bits: to nearest, ties to even."""
    bits = _bits(x)
    odd = (bits >> dropped) & 1
    nearest = (bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)
    return jnp.where(x == x, _float(nearest), x)


def magnitude(x: jax.Array) -> jax.Array:
    """int32 in the order of ``|x|``, NaN highest; one more is still an int32."""
    return jnp.minimum(_bits(x) & 0x7FFFFFFF, 0x7FFFFFFE)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
