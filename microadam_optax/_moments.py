"""Adam's moments, rebuilt from the window's sparse gradients.

The window is a ring of ``window - 1`` slots in every row, one after another,
``(window - 1) * k`` entries. The newest gradient is not among them until its step is
over: the slot that a step will overwrite is never read by it, so one slot fewer is
stored. The ages of the slots, a permutation of 1 to ``window - 1``, are kept in the
state, so its shapes alone tell its window.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

COMPARED = 4  # entries up to which comparing with every lane costs less than scattering
EXPONENT = 0.5  # of the share of selected entries, in the factor that matches Adam
LARGEST = 2.0**60  # of a gradient: float32 holds the sum of 255 of its squares


def first_ages(slots: int) -> jax.Array:
    """The ages before the first step, int32 ``(slots,)``: slot 0 is the oldest.

    Slots not yet written hold zeros; their age is meaningless and harmless.
    """
    return jnp.arange(slots, 0, -1, dtype=jnp.int32)


def valid_ages(ages: jax.Array) -> jax.Array:
    """The ages; those before the first step if all are 0, as in a state of zeros."""
    return jnp.where(jnp.any(ages > 0), ages, first_ages(ages.size))


def older_ages(ages: jax.Array) -> jax.Array:
    """The ages one step later: the oldest slot has been written and is the newest."""
    return ages % ages.size + 1


def oldest_start(ages: jax.Array, k: int) -> jax.Array:
    """Where the oldest slot, of ``k`` entries, begins in a row: int32 scalar."""
    return jnp.argmax(ages).astype(jnp.int32) * k


def bounded(x: jax.Array, largest: float = LARGEST) -> jax.Array:
    """Finite numbers between ``-largest`` and ``largest``; others stay as they are."""
    return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, -largest, largest), x)


def cast(update: jax.Array, dtype: Any) -> jax.Array:
    """The update in a gradient's dtype; float16 ends where a step without nu may not."""
    largest = float(jnp.finfo(dtype).max)
    return (bounded(update, largest) if largest < LARGEST else update).astype(dtype)


def moments(
    newest: jax.Array, indices: Any, values: Any, ages: Any, b1: jax.Array, b2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decayed sums of the window's gradients and of their squares.

    Args:
      newest: float32 ``(..., b)``, this step's sparse gradient, zeros elsewhere.
      indices: unsigned ``(..., slots * k)``, positions in the row; none twice in
        a slot. None at window 1, like values and ages.
      values: bfloat16 ``(..., slots * k)``.
      ages: int32 ``(slots,)``, steps since each slot was written.
      b1: float32, decay of the first moment.
      b2: float32, decay of the second moment.

    Returns:
      ``sum b1**age * value`` and ``sum b2**age * value**2``, float32 ``(..., b)``.
      A product is rounded before it is added, see `round_product`.
    """
    if indices is None:
        return newest, newest**2
    sums = _compare if indices.shape[-1] <= COMPARED else _scatter
    return sums(
        newest,
        indices.astype(jnp.int32),
        values.astype(jnp.float32),
        jnp.power(b1, ages.astype(jnp.float32)),
        jnp.power(b2, ages.astype(jnp.float32)),
    )


def round_product(product: jax.Array) -> jax.Array:
    """A product as it is before it is added to something: with 23 bits.

    Else XLA may add it with all its bits, in a fused multiply-add, in one program
    and not in another.
    """
    return round_to(product, 22)


def apart(product: jax.Array, factor: jax.Array) -> jax.Array:
    """A product with a number of at most 1, rounded to float32 before it is added.

    It is the product itself: what is not finite was so before. But XLA cannot know that,
    and so cannot fuse product and sum, as `round_product` prevents at the cost of a bit.
    """
    return jnp.where(jnp.abs(product) < jnp.inf, product, factor)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_to(x: jax.Array, mantissa: int) -> jax.Array:
    """float32 rounded to so many bits of mantissa; its derivative is 1, unrounded."""
    return lax.reduce_precision(x, 8, mantissa)


@round_to.defjvp
def _round_to_jvp(mantissa: int, primals: Any, tangents: Any) -> Any:
    return round_to(*primals, mantissa), *tangents


@jax.custom_jvp
def debias(decay: jax.Array, count: jax.Array) -> jax.Array:
    """``(1 - decay) / (1 - decay**count)`` without cancellation, float32."""
    return (1 - decay) / _one_minus_power(decay, count)


def normalizers(
    b1: jax.Array, b2: jax.Array, count: jax.Array, window: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """What the sums mu and nu are multiplied by at Adam's own learning rate.

    Both are divided by the weights of the steps that the window holds. nu is divided by
    the square of the factor besides by which an update is to be longer because a
    coordinate is selected once in 1 / share steps; so `eps` stands beside Adam's root.
    """
    # What b1 and b2 are is so not known to XLA, which computes powers of constants with
    # other last bits than of arguments.
    unknown = 0 * count.astype(jnp.float32)
    b1, b2 = b1 + unknown, b2 + unknown
    steps = jnp.minimum(count, window)
    slower = _speed(b1, b2, window, share) ** 2
    return debias(b1, steps), debias(b2, steps) * slower


def _speed(b1: jax.Array, b2: jax.Array, window: int, share: float) -> jax.Array:
    """How fast a coordinate moves in steps of Adam's, without the factor.

    A coordinate that is selected once moves by a learning rate times the sum, at small
    shares; see docs/algorithm.md.
    """

    def add_age(_: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        speed, mu, nu = sums
        speed += mu / jnp.sqrt(share + round_product((1 - share) * nu))
        return speed, mu * b1, nu * b2

    mu, nu = (debias(b, jnp.int32(window)) for b in (b1, b2))
    sums = (0 * (mu + nu), mu, nu)  # in the order of ages, in every program
    speed = lax.fori_loop(0, window, add_age, sums, unroll=min(window, 16))[0]
    # Rounded, or XLA squares the constant by itself, in one program and not in another.
    return round_to(share**EXPONENT * speed, 22)


def _one_minus_power(decay: jax.Array, count: jax.Array) -> jax.Array:
    return -jnp.expm1(count.astype(jnp.float32) * jnp.log1p(-(1 - decay)))


@debias.defjvp
def _debias_jvp(primals: Any, tangents: Any) -> Any:
    """Also at a decay of 0, whose logarithm has no derivative."""
    decay, count = primals
    steps, below = count.astype(jnp.float32), _one_minus_power(decay, count)
    slope = ((1 - decay) * steps * jnp.power(decay, steps - 1) - below) / below**2
    return debias(decay, count), slope * tangents[0]


@jax.custom_jvp
def ratio(mu: jax.Array, nu: jax.Array, eps: jax.Array) -> jax.Array:
    """``mu / (sqrt(nu) + eps)``."""
    return mu / (jnp.sqrt(nu) + eps)


@ratio.defjvp
def _ratio_jvp(primals: Any, tangents: Any) -> Any:
    """At a nu of 0 the root has the derivative 0, as Adam's has with an eps_root."""
    mu, nu, eps = primals
    root = jnp.sqrt(nu)
    slope = jnp.where(root > 0, 0.5 / jnp.where(root > 0, root, 1), 0)
    update = ratio(mu, nu, eps)
    below = slope * tangents[1] + tangents[2]
    return update, (tangents[0] - update * below) / (root + eps)


def inside_root(eps_root: jax.Array, debias_nu: jax.Array) -> jax.Array:
    """What is added to nu before it is debiased, to add `eps_root` to it.

    Added to the product, XLA might do both in a fused multiply-add.
    """
    return eps_root / debias_nu


def _compare(
    newest: jax.Array,
    indices: jax.Array,
    values: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Every entry against every lane: fuses into one pass, for few entries."""
    lane = lax.broadcasted_iota(jnp.int32, newest.shape, newest.ndim - 1)
    mu, nu = newest, newest**2
    entries = indices.shape[-1]
    for entry in range(entries):
        slot = entry * mu_weights.size // entries
        here = lane == indices[..., entry : entry + 1]
        value = values[..., entry : entry + 1]
        mu += jnp.where(here, round_product(mu_weights[slot] * value), 0)
        nu += jnp.where(here, round_product(nu_weights[slot] * value**2), 0)
    return mu, nu


def _scatter(
    newest: jax.Array,
    indices: jax.Array,
    values: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds slot after slot through its indices: the cost is that of the entries."""
    slots = mu_weights.size
    k = indices.shape[-1] // slots

    def add_slot(slot: Any, sums: tuple[jax.Array, jax.Array]) -> Any:
        index = lax.dynamic_slice_in_dim(indices, slot * k, k, indices.ndim - 1)
        value = lax.dynamic_slice_in_dim(values, slot * k, k, values.ndim - 1)
        mu, nu = sums
        mu = _add_at(mu, index, round_product(mu_weights[slot] * value))
        nu = _add_at(nu, index, round_product(nu_weights[slot] * value**2))
        return mu, nu

    return lax.fori_loop(0, slots, add_slot, (newest, newest**2), unroll=slots < 3)


def _add_at(rows: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    add = _add_in_row
    for _ in range(rows.ndim - 1):
        add = jax.vmap(add)
    return add(rows, indices, values)


def _add_in_row(row: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return row.at[index].add(value, mode="promise_in_bounds", unique_indices=True)
