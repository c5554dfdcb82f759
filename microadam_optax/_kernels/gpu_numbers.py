"""Arithmetic of the kernel for GPUs in the fewest of its instructions.

XLA, which computes in Pallas's interpreter, would simplify it into other results: there
the same numbers are found in the way of `_step`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

from microadam_optax import _moments
from microadam_optax._kernels import _rows
from microadam_optax._kernels._rows import Launch

_LESS = 2.0**-10  # of a step; more than a quotient is in error
_EPS = 2.0**-38  # added to the root of a denormal number, is what it was

Moments = list[tuple[jax.Array, jax.Array]]  # mu and nu


def rounded(x: jax.Array, launch: Launch) -> jax.Array:
    """float32 with the digits of bfloat16."""
    if launch.interpret:
        return _rows.round_to(x, 7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def whole(x: jax.Array, step: jax.Array, launch: Launch) -> jax.Array:
    """``floor(x / step + 1 / 2)`` plus `SHOWN`, as exact as `_quantize.multiple` is.

    The approximate quotient is made a little smaller, so that the whole number next to
    it is right or one too low, which is seen by what is left of x.
    """
    if launch.interpret:
        return _rows.nearest(x, step)
    inverse = _approximate("rcp", jnp.where(step > 0, step, 1))
    point = fused(x, inverse, jnp.float32(-_LESS), launch) + _rows.SHOWN
    above = fused(_rows.SHOWN - point, step, x, launch)
    return jnp.where(above >= 0.5 * step, point + 1, point)


def fused(x: jax.Array, y: jax.Array, z: jax.Array, launch: Launch) -> jax.Array:
    """``x * y + z``, rounded once."""
    if launch.interpret:
        return x * y + z
    return _elementwise("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def rescale(
    factors: Any, moments: Moments, dtype: Any, launch: Launch
) -> list[jax.Array]:
    """The updates; the factors are those of `Scalars`."""
    scalars = [factors[i] for i in range(4)]
    careful, quick = (
        functools.partial(_each, f, scalars, dtype) for f in (_rows.rescale, _quickly)
    )
    if launch.interpret:
        return careful(moments)
    return lax.cond(scalars[2] >= _EPS, quick, careful, moments)


def _each(f: Any, scalars: list[jax.Array], dtype: Any, moments: Moments) -> Any:
    return [f(*scalars, dtype, mu, nu) for mu, nu in moments]


def _quickly(
    debias_mu: jax.Array,
    debias_nu: jax.Array,
    eps: jax.Array,
    eps_root: jax.Array,
    dtype: Any,
    mu: jax.Array,
    nu: jax.Array,
) -> jax.Array:
    """`_rows.rescale` where nothing that divides is denormal."""
    root = _approximate("sqrt", debias_nu * (nu + eps_root))
    return _moments.cast(debias_mu * mu * _approximate("rcp", root + eps), dtype)


def _approximate(function: str, x: jax.Array) -> jax.Array:
    """To a unit in the last place; denormal numbers are 0."""
    return _elementwise(f"{function}.approx.ftz.f32 $0, $1;", x)


def _elementwise(instruction: str, *args: jax.Array) -> jax.Array:
    same = jnp.broadcast_arrays(*args)
    (result,) = triton.elementwise_inline_asm(
        instruction,
        args=same,
        constraints=",".join(["=f", *["f"] * len(same)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(same[0].shape, jnp.float32)],
    )
    return result
