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

from microadam_optax import _moments, _quantize
from microadam_optax._kernels import _rows
from microadam_optax._kernels._rows import Launch

_ROUND = 1.5 * 2.0**23  # added to a number below 2**22, leaves a whole number
_LESS = 2.0**-10  # of a step; more than a quotient is in error
_EPS = 2.0**-38  # added to the root of a denormal number, is what it was

Moments = list[tuple[jax.Array, jax.Array]]  # mu and nu


def rounded(x: jax.Array, launch: Launch) -> jax.Array:
    """float32 with the digits of bfloat16."""
    if launch.interpret:
        return _rows.round_to(x, 7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def whole(x: jax.Array, step: jax.Array, launch: Launch) -> jax.Array:
    """``floor(x / step + 1 / 2)``, as exact as `_quantize.multiple` is.

    The approximate quotient is made a little smaller, so that the whole number next to
    it is right or one too low, which is seen by what is left of x.
    """
    if launch.interpret:
        return _quantize.multiple(x, step, 0.5)[0]
    inverse = _approximate("rcp", jnp.where(step > 0, step, 1))
    point = ((x * inverse - _LESS) + _ROUND) - _ROUND
    above = x - point * step
    return jnp.where(above >= 0.5 * step, point + 1, point)


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
    (result,) = triton.elementwise_inline_asm(
        f"{function}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
