"""What the kernels compute on rows, in operations that both backends have.

A row is a block of a leaf, as a list of parts: arrays ``(rows, lanes)`` whose lanes
hold neighbours. Elements whose codes share a byte are at the same lane of different
parts. Numbers of a row are arrays ``(rows, 1)``.

Which elements are selected is in `_select.py`.
"""

import functools
import math
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
_INFINITY = 0x7F800000
_BITS_OF_MAGIC = 0x4B000000
_MAGIC = float(1 << 23)  # added to a small whole number, shows it in the last bits
SHOWN = 1.5 * _MAGIC  # the same for numbers below 0, and what is not whole is rounded


class Rows(NamedTuple):
    """A leaf in rows before a step: arrays, or references to them."""

    gradient: Any  # (cells, cell)
    codes: Any  # uint8 (rows, block * bits / 8)
    ranges: Any  # bfloat16 (rows, 2)
    indices: Any  # unsigned (rows, (window - 1) * k)
    values: Any  # bfloat16, like indices; both None at window 1


class Updated(NamedTuple):
    """The same after the step, array by array in the place of `Rows`."""

    update: Any
    codes: Any
    ranges: Any
    indices: Any
    values: Any


def updated_like(rows: Rows) -> Updated:
    """Shapes and dtypes, with what `jax.shard_map` knows of them."""
    return Updated(*jax.tree.map(_like, rows))


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    known = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=known.sharding,
        manual_axis_type=known.manual_axis_type,
    )


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


def reason_against(layout: Layout, dtype: Any, settings: Settings) -> str | None:
    """Why a kernel of Pallas cannot update a leaf; None if it can."""
    k = settings.k(layout.block)
    rows = math.prod(layout.grid) * layout.blocks
    widest = max(layout.block, (settings.window - 1) * k)
    name = str(jnp.dtype(dtype))
    limits = {
        f"gradients of {name}": name not in _DTYPES,
        "`alpha` other than 0": settings.alpha,
        f"blocks of more than {_BLOCK} elements": layout.block > _BLOCK,
        f"more than {_SELECTED} selected entries in a block": k > _SELECTED,
        f"more than {_ENTRIES} entries in the window of a block": (
            settings.window * k > _ENTRIES
        ),
        "leaves of 2**31 elements, or entries in the window, and more": (
            rows * widest >= 2**31
        ),
    }
    return next((text for text, exceeded in limits.items() if exceeded), None)


def nearest(x: jax.Array, step: jax.Array) -> jax.Array:
    """``floor(x / step + 1 / 2)``, plus `SHOWN`."""
    return _quantize.multiple(x, step, 0.5)[0] + SHOWN


def quantize(
    rest: list[jax.Array], bits: int, whole: Callable = nearest
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Bytes, and the step and the code of zero.

    The selected elements are 0 here, so the ends are not above and not below 0, where
    the bits of a float are in order as integers.
    """
    highest = reduce(jnp.maximum, jnp.max, [bits_of(x) for x in rest])
    lowest = reduce(jnp.maximum, jnp.max, [bits_of(-x) for x in rest])
    nan = jnp.maximum(highest, lowest) > _INFINITY
    ends = (float_of(jnp.maximum(end, 0)) for end in (highest, lowest))
    high, below = (jnp.where(nan, jnp.nan, end) for end in ends)
    top = 2**bits - 1
    step = round_to((high + below) * jnp.float32(_quantize.ABOVE / top), 7)
    step = jnp.where(step < _quantize.SMALLEST, 0, step)
    finite = (step > 0) & (step < jnp.inf)
    zero = SHOWN - jnp.where(finite, whole(0 - below, step), SHOWN)
    kept = jnp.where(finite, top, 0)  # of the bits of a code
    shown = [bits_of(whole(x, step) + zero) & kept for x in rest]
    number = len(rest) * bits // 8  # of bytes that a row has at one lane
    bytes_ = shown[:number]
    for part, code in enumerate(shown[number:], number):
        bytes_[part % number] |= code << (bits * (part // number))
    step, zero = step.astype(jnp.bfloat16), zero.astype(jnp.bfloat16)
    return [byte.astype(jnp.uint8) for byte in bytes_], (step, zero)


def dequantize(
    byte: jax.Array, part: int | jax.Array, step: jax.Array, zero: jax.Array, bits: int
) -> jax.Array:
    if isinstance(part, int):
        multiple, unit = unpack(byte, part, step, zero, bits)
        return multiple * unit
    code = (byte.astype(jnp.int32) >> (bits * part)) & (2**bits - 1)
    return (code.astype(jnp.float32) - zero) * step


def unpack(
    byte: jax.Array, part: int, step: jax.Array, zero: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """Two factors whose product is ``(code - zero) * step``, for no shift of the code."""
    lowest = 1 << (bits * part)
    code = byte.astype(jnp.int32) & ((2**bits - 1) * lowest)
    shown = float_of(code | _BITS_OF_MAGIC)
    return shown - (_MAGIC + zero * lowest), step * (1 / lowest)


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


def round_to(x: jax.Array, mantissa: int) -> jax.Array:
    """float32 rounded to so many bits of mantissa: to nearest, ties to even."""
    bits, dropped = bits_of(x), 23 - mantissa
    odd = (bits >> dropped) & 1
    nearest = (bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)
    return jnp.where(x == x, float_of(nearest), x)


def magnitude(x: jax.Array) -> jax.Array:
    """int32 in the order of ``|x|``, NaN highest."""
    return bits_of(x) & 0x7FFFFFFF


def tame(x: jax.Array) -> jax.Array:
    """Bounded as in `_step`; of NaN all but the one above whose magnitude is none."""
    x = _moments.bounded(x)
    return jnp.where(magnitude(x) == 0x7FFFFFFF, float_of(bits_of(x) - 1), x)


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of a float32, int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 with these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)
