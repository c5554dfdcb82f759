"""Which elements of a row are selected, in operations that both backends have.

Magnitudes are compared by the bits of the float, an order that the hardware reduces
in one instruction: the k largest are found one by one if they are few, else by
bisection, counting how many reach a threshold until exactly k do.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from microadam_optax._kernels._rows import bits_of, each, float_of, magnitude, reduce

ONE_BY_ONE = 4  # up to here the k largest are found so
NOWHERE = 1 << 20  # a position that no row has
_OCTAVES = 2 << 23  # what a first step of the bisection spans, in bits of a float32


class Chosen(NamedTuple):
    """Which elements of the rows are selected."""

    masks: list[jax.Array]  # bool (rows, lanes) for each part
    kth: jax.Array  # (rows, 1): keys above are selected, equals up to a position
    last: jax.Array
    found: list[tuple[jax.Array, jax.Array]]  # positions, values, if one by one


def largest(
    accumulated: list[jax.Array],
    positions: list[jax.Array],
    real: list[jax.Array],
    k: int,
) -> Chosen:
    """Marks the k largest magnitudes of each row among its real elements."""
    keys = each(lambda x, mask: jnp.where(mask, magnitude(x), -1), accumulated, real)
    if k == 0:
        none = reduce(jnp.maximum, jnp.max, keys) + 1
        return Chosen([key >= none for key in keys], none, none, [])
    if k > ONE_BY_ONE:
        return _bisect(keys, positions, k)
    # Position and sign in one number, so that one reduction finds both.
    signed = each(lambda x, i: 2 * i + _negative(bits_of(x)), accumulated, positions)
    found = []
    for _ in range(k):
        kth = reduce(jnp.maximum, jnp.max, keys)
        ties = [
            jnp.where(key == kth, i, 2 * NOWHERE)
            for key, i in zip(keys, signed, strict=True)
        ]
        lowest = reduce(jnp.minimum, jnp.min, ties)
        last = lowest >> 1
        keys = [
            jnp.where(i == last, -1, key) for key, i in zip(keys, positions, strict=True)
        ]
        found.append((last, float_of(kth | (lowest << 31))))
    return Chosen(each(lambda m, key: m & (key < 0), real, keys), kth, last, found)


class _Search(NamedTuple):
    """A bisection under way; numbers of rows."""

    low: jax.Array  # more than k keys reach it
    high: jax.Array  # so many do
    reached: jax.Array
    leap: jax.Array  # at most so far is the next threshold from `high`


def _bisect(keys: list[jax.Array], positions: list[jax.Array], k: int) -> Chosen:
    """Selects all keys from `high` on, which `reached` do, and breaks ties below."""
    top = reduce(jnp.maximum, jnp.max, keys) + 1
    none = jnp.zeros_like(top)
    search = _Search(none, top, none, jnp.int32(_OCTAVES))
    unfinished = functools.partial(_unfinished, k)
    _, high, reached, _ = lax.while_loop(
        unfinished, functools.partial(_halve, keys, k), search
    )
    missing = k - reached
    keys, last = lax.cond(
        jnp.max(missing) > 0,
        functools.partial(_break_ties, positions, high, missing),
        lambda keys: (keys, none - 1),
        keys,
    )
    return Chosen([key >= high for key in keys], high - 1, last, [])


def _unfinished(k: int, search: _Search) -> jax.Array:
    left = jnp.where(search.reached < k, search.high - search.low, 0)
    return jnp.max(left) > 1


def _halve(keys: list[jax.Array], k: int, search: _Search) -> _Search:
    low, high, reached, leap = search
    middle = jnp.maximum(low + ((high - low) >> 1), high - leap)
    count = _count([middle - 1 - key for key in keys])
    open_ = (reached < k) & (high - low > 1)
    up, down = open_ & (count > k), open_ & (count <= k)
    low, high = jnp.where(up, middle, low), jnp.where(down, middle, high)
    leap = jnp.minimum(leap, 1 << 29) * 2
    return _Search(low, high, jnp.where(down, count, reached), leap)


def _break_ties(
    positions: list[jax.Array], high: jax.Array, missing: jax.Array, keys: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """Lifts the first of the keys just below `high`, until none is missing."""
    last = _last_tie(keys, positions, high - 1, missing)
    taken = each(lambda key, i: (key == high - 1) & (i <= last), keys, positions)
    return each(lambda key, tie: jnp.where(tie, high, key), keys, taken), last


def _last_tie(
    keys: list[jax.Array], positions: list[jax.Array], kth: jax.Array, missing: jax.Array
) -> jax.Array:
    """Where the `missing`-th of the keys that equal `kth` is; -1 if none is missing."""
    ties = each(lambda key, i: jnp.where(key == kth, i, NOWHERE), keys, positions)
    bits = (len(positions) * positions[0].shape[1] - 1).bit_length()

    def next_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        bit = jnp.left_shift(jnp.int32(1), bits - 1 - i)
        before = _count([tie - (last + bit) for tie in ties])
        return jnp.where(before < missing, last + bit, last)

    last = lax.fori_loop(jnp.int32(0), jnp.int32(bits), next_bit, jnp.zeros_like(kth))
    return jnp.where(missing > 0, last, -1)


def _count(differences: list[jax.Array]) -> jax.Array:
    """How many are negative."""
    total = functools.reduce(operator.add, each(_negative, differences))
    return jnp.sum(total, axis=1, keepdims=True, dtype=jnp.int32)


def _negative(x: jax.Array) -> jax.Array:
    """The sign bit: unlike a comparison, it is shifted and added in one instruction."""
    return lax.shift_right_logical(x, jnp.full_like(x, 31))
