"""Algorithm 1 on rows of blocks, a call to a line of the paper: the specification.

Kernels compute the same in other ways and give the same bits of the state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax import _moments, _quantize, _topk
from microadam_optax._blocks import Layout
from microadam_optax._state import LeafState, Settings

PRNG = "threefry2x32"  # of stochastic rounding, whatever JAX's default is


class Step(NamedTuple):
    """The scalars that all blocks of a leaf share at one step."""

    count: jax.Array  # type: ignore[assignment]  # int32, 1 at the first step
    ages: Any  # int32 (window - 1,), None at window 1
    b1: jax.Array  # float32, like b2, eps and eps_root
    b2: jax.Array
    eps: jax.Array
    eps_root: jax.Array
    prng: jax.Array | None  # a PRNG key for stochastic rounding
    debias_mu: Any = None  # float32, what the sums of a leaf are multiplied by
    debias_nu: Any = None
    micro: Any = None  # a MicroBatch, if it is one of several that make a step
    layer: Any = None  # int32, if leaves are one of stacked layers and rounded at random


def update_blocks(
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    settings: Settings,
    numbers: jax.Array | None = None,
) -> tuple[jax.Array, LeafState]:
    """One step of any number of blocks, each a row.

    Args:
      gradient: ``(..., block)`` of a float dtype; 0 where a block is padded, and so
        there is no error either.
      old: the state of these blocks.
      step: scalars of the step.
      settings: static numbers.
      numbers: uint32 ``(..., 1)``, which tell blocks apart to random rounding, or None.

    Returns:
      The update in the gradient's dtype, and the new state: codes and ranges, and as
      indices and values the ``k`` new entries of each row, not the whole window.
    """
    bits, block = settings.bits, gradient.shape[-1]
    k = settings.k(block)
    noise = functools.partial(_noise, step.prng, numbers, block)

    accumulated = accumulate(share(gradient, step), old, bits)
    selected = _topk.largest(accumulated, k)
    newest, rest = take(accumulated, selected)
    codes, ranges = _quantize.quantize(rest, bits, noise(0))
    indices, values = entries(newest, selected, old, k)
    window = old.indices, old.values, step.ages
    mu, nu = _moments.moments(newest, *window, step.b1, step.b2)
    update = rescale(mu, nu, step)
    if settings.alpha:
        error = _quantize.dequantize(codes, ranges, bits)
        update, rest = give_back(update, error, settings.alpha)
        codes, ranges = _quantize.quantize(rest, bits, noise(1))
    update = _moments.cast(update, gradient.dtype)
    return update, LeafState(codes, ranges, indices, values)


def share(gradient: jax.Array, step: Step) -> jax.Array:
    """A micro-batch's part of the mean gradient, rounded to the gradient's dtype."""
    if step.micro is None:
        return gradient
    # Not in 16 bits, where XLA may leave out the rounding of the product; and XLA for
    # GPUs leaves out a pair of conversions, but not `reduce_precision`.
    wide = gradient.astype(gradient.dtype if gradient.dtype.itemsize > 4 else jnp.float32)
    part = step.micro.share.astype(wide.dtype)
    part = lax.expand_dims(part, range(part.ndim, wide.ndim))
    product = _moments.apart(wide * part, wide)
    if gradient.dtype == jnp.bfloat16:
        product = lax.reduce_precision(product, 8, 7)
    return product.astype(gradient.dtype)


def accumulate(gradient: jax.Array, old: LeafState, bits: int) -> jax.Array:
    """The gradient and what earlier steps left of theirs, float32."""
    if gradient.dtype == jnp.float64:  # holds finite numbers that float32 does not
        gradient = _moments.bounded(gradient)
    error = _quantize.dequantize(old.codes, old.ranges, bits)
    return _moments.bounded(gradient.astype(jnp.float32) + error)


def take(accumulated: jax.Array, selected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The selected elements as bfloat16 keeps them, and the others; zeros elsewhere."""
    newest = jnp.where(selected, _moments.round_to(accumulated, 7), 0)
    # What is stored as codes has no derivative, nor do the steps between them.
    return newest, jnp.where(selected, 0, lax.stop_gradient(accumulated))


def entries(
    newest: jax.Array, selected: jax.Array, old: LeafState, k: int
) -> tuple[Any, Any]:
    """Indices and values as a slot of the window holds them; None at window 1."""
    if old.indices is None:
        return None, None
    indices = _topk.positions(selected, k)
    values = jnp.take_along_axis(newest, indices, -1, mode="promise_in_bounds")
    return indices.astype(old.indices.dtype), values.astype(old.values.dtype)


def rescale(mu: jax.Array, nu: jax.Array, step: Step) -> jax.Array:
    """Adam's update of the sums `mu` and `nu`."""
    mu *= step.debias_mu
    inside = _moments.inside_root(step.eps_root, step.debias_nu)
    return _moments.ratio(mu, (nu + inside) * step.debias_nu, step.eps)


def give_back(
    update: jax.Array, error: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """The update with its share of the error, and the rest of the error."""
    update += _moments.round_product(alpha * error)
    return update, lax.reduce_precision((1 - alpha) * error, 8, 15)


def of_leaf(step: Step, layout: Layout, settings: Settings) -> Step:
    """The step with what a leaf's sums are multiplied by."""
    b1, b2, count = step.b1, step.b2, step.count
    if settings.match_adam:
        share = layout.share(settings.k(layout.block))
        both = _moments.normalizers(b1, b2, count, settings.window, share)
    else:
        both = _moments.debias(b1, count), _moments.debias(b2, count)
    return step._replace(debias_mu=both[0], debias_nu=both[1])


def _noise(
    prng: jax.Array | None, numbers: jax.Array | None, block: int, draw: int
) -> jax.Array | None:
    """Uniform float32 in [0, 1) for each element; the same however rows are cut."""
    if prng is None or numbers is None:
        return None
    uniform = functools.partial(_uniform, jax.random.fold_in(prng, draw), block)
    return jnp.vectorize(uniform, signature="()->(b)")(numbers[..., 0])


def _uniform(prng: jax.Array, block: int, number: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(prng, number), (block,), jnp.float32)
