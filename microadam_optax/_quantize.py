"""float32 rows <-> b-bit codes, with a step and a zero point per row.

A row is stored as codes of the whole multiples of its step that reach from its lowest
to its highest element, and the code of zero. So zero stays zero: an element that gets
no gradient gathers no error, and padding none either. The step is a bfloat16, so a
multiple of it is exact in float32: a fused multiply-add cannot change a bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax import _topk

ABOVE = 1.004  # rounded to bfloat16, a number times this is not less than it was
INFINITY, NAN, SIGN = 0x7F800000, 0x7FC00000, 0x80000000  # bits of float32
SMALLEST = 2.0**-100  # a step; what arises on the way is far from denormal


def quantize(
    x: jax.Array, bits: int, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds each row to whole multiples of a step, as small as its range allows.

    The range is that of the row and zero.

    Args:
      x: float32 ``(..., b)``.
      bits: 2, 4 or 8.
      noise: float32 ``(..., b)`` in [0, 1) to round stochastically, unbiased, on
        steps that are ``1 / (2**bits - 2)`` wider; None rounds to nearest.

    Returns:
      Packed codes uint8 ``(..., b * bits / 8)`` and ranges bfloat16 ``(..., 2)``,
      the step and the code of zero of each row. A row that is not finite has a step
      that is not.
    """
    low, high = ends(x)
    steps = 2**bits - (1 if noise is None else 2)
    step = lax.reduce_precision((high - low) * jnp.float32(ABOVE / steps), 8, 7)
    step = jnp.where(step < SMALLEST, 0, step)
    half = 0.5 if noise is None else 0.0
    point, above = multiple(x, step, half)
    if noise is not None:
        point += jnp.where(noise * step < above, 1.0, 0.0)
    zero = 0 - multiple(low, step, half)[0]
    finite = (step > 0) & (step < jnp.inf)
    zero, code = (jnp.where(finite, y, 0) for y in (zero, point + zero))
    ranges = jnp.concatenate([step, zero], axis=-1).astype(jnp.bfloat16)
    return pack(code.astype(jnp.uint8), bits), ranges


def ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of each row and zero; NaN where the row has one.

    Bits of floats above zero are in their order as signed integers, of those below in
    the opposite of theirs as unsigned ones, and of NaN beyond either. XLA for CPU loses
    NaN in maxima of floats.
    """
    high = jnp.maximum(_most(x, jnp.int32), 0)
    low = jnp.maximum(_most(x, jnp.uint32), jnp.uint32(SIGN))
    nan = (high > INFINITY) | (low > jnp.uint32(SIGN | INFINITY))
    low, high = (jnp.where(nan, y.dtype.type(NAN), y) for y in (low, high))
    low, high = (lax.bitcast_convert_type(y, jnp.float32) for y in (low, high))
    return low, high


def _most(x: jax.Array, dtype: Any) -> jax.Array:
    """The largest of each row's bits as integers."""
    bits = lax.bitcast_convert_type(x, dtype)
    return _topk.fold(bits, lambda part: part, jnp.maximum, jnp.max)


def multiple(x: jax.Array, step: jax.Array, half: float) -> tuple[jax.Array, jax.Array]:
    """``floor(x / step + half)``, and how far x is above that many steps.

    Exact, however a division is rounded: the multiple is corrected by what is left of
    x, which float32 holds exactly because a step has 8 bits.
    """
    inverse, lowest = 1 / jnp.where(step > 0, step, 1), -half * step
    point = jnp.floor(x * inverse + half)
    above = x - point * step
    less = jnp.where(above < lowest, -1.0, 0.0)
    more = jnp.where(above >= lowest + step, 1.0, less).astype(jnp.float32)
    return point + more, above - more * step


def dequantize(codes: jax.Array, ranges: jax.Array, bits: int) -> jax.Array:
    """The inverse of `quantize` up to its rounding: float32 ``(..., b)``."""
    step, zero = (ranges[..., i : i + 1].astype(jnp.float32) for i in (0, 1))
    return (unpack(codes, bits).astype(jnp.float32) - zero) * step


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes ``(..., b)`` into bytes ``(..., b * bits / 8)``.

    A byte holds the codes of equally spaced elements: with 4 bits the first half
    of the row lies in the low nibbles and the second half in the high ones.
    """
    width = codes.shape[-1] * bits // 8
    packed = codes[..., :width]
    for part in range(1, 8 // bits):
        packed |= codes[..., part * width : (part + 1) * width] << (bits * part)
    return packed


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`."""
    mask = jnp.uint8(2**bits - 1)
    parts = [(packed >> jnp.uint8(shift)) & mask for shift in range(0, 8, bits)]
    return jnp.concatenate(parts, axis=-1)
