"""float32 rows <-> b-bit codes with a bfloat16 range per row.

A row is stored as codes on the even grid of ``2**bits`` points from its low to
its high end. The step between points is rounded to 16 significant bits, which
makes ``code * step`` exact in float32: a fused multiply-add cannot change a bit.
"""

import jax
import jax.numpy as jnp
from jax import lax


def quantize(
    x: jax.Array, bits: int, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds each row to points of the grid between its extremes.

    Args:
      x: float32 ``(..., b)``.
      bits: 2, 4 or 8.
      noise: float32 ``(..., b)`` in [0, 1) to round stochastically, unbiased;
        None rounds to nearest.

    Returns:
      Packed codes uint8 ``(..., b * bits / 8)`` and ranges bfloat16 ``(..., 2)``,
      the low and the high end of each row.
    """
    # reduce_precision, because XLA may drop a float32 -> bfloat16 -> float32 pair.
    low = lax.reduce_precision(jnp.min(x, axis=-1, keepdims=True), 8, 7)
    high = lax.reduce_precision(jnp.max(x, axis=-1, keepdims=True), 8, 7)
    step = _step(low, high, bits)
    code = jnp.floor((x - low) / step + (jnp.float32(0.5) if noise is None else noise))
    code = jnp.where(step > 0, jnp.clip(code, 0, 2**bits - 1), 0)
    ranges = jnp.concatenate([low, high], axis=-1).astype(jnp.bfloat16)
    return pack(code.astype(jnp.uint8), bits), ranges


def dequantize(codes: jax.Array, ranges: jax.Array, bits: int) -> jax.Array:
    """The inverse of `quantize` up to its rounding: float32 ``(..., b)``."""
    low, high = (ranges[..., end : end + 1].astype(jnp.float32) for end in (0, 1))
    return unpack(codes, bits).astype(jnp.float32) * _step(low, high, bits) + low


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


def _step(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    return lax.reduce_precision((high - low) / (2**bits - 1), 8, 15)
