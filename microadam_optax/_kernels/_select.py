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

from microadam_optax._kernels._rows import bits_of, each, float_of, reduce

ONE_BY_ONE = 4  # up to here the k largest are found so
NOWHERE = 1 << 20  # a position that no row has
_NEAR = 1 << 13  # so near to the threshold there is hardly more than one key
_TOP = 0x7FFFFFFF
_OCTAVES = 2 << 23  # what a first step of the bisection spans, in bits of a float32


class Chosen(NamedTuple):
    """Which elements of the rows are selected."""

    masks: list[jax.Array]  # bool (rows, lanes) for each part
    kth: jax.Array  # (rows, 1): keys above are selected, equals up to a position
    last: jax.Array
    found: list[tuple[jax.Array, jax.Array]]  # positions, values, if one by one


def largest(
    accumulated: list[jax.Array],
    keys: list[jax.Array],
    top: jax.Array,
    positions: list[jax.Array],
    k: int,
) -> Chosen:
    """Marks the k largest keys of each row, and of equal ones the first.

    A key is the magnitude of an element, or -1 where there is no element; the largest
    of a row is `top`. Each row has k elements, else the search has no end.
    """
    if k == 0:
        none = top + 1
        return Chosen([key >= none for key in keys], none, none, [])
    if k > ONE_BY_ONE:
        return _bisect(keys, top, positions, k)
    # Position and sign in one number, so that one reduction finds both.
    signed = each(lambda x, i: 2 * i + _negative(bits_of(x)), accumulated, positions)
    found, given = [], keys
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
    return Chosen(each(lambda old, key: key < old, given, keys), kth, last, found)


class _Search(NamedTuple):
    """A bisection under way; numbers of rows."""

    low: jax.Array  # a threshold that at least k keys reach
    reached: jax.Array  # how many do
    width: jax.Array  # fewer than k keys reach ``low + 2 * width``


class _Peeled(NamedTuple):
    """Rows whose lowest keys are taken away until k are left, or more that are equal."""

    low: jax.Array
    reached: jax.Array
    missing: jax.Array  # of the keys at `low`, so many are wanted; 0 if not known yet


def _bisect(
    keys: list[jax.Array], top: jax.Array, positions: list[jax.Array], k: int
) -> Chosen:
    """Selects all keys from a threshold on, and breaks ties if that is too many."""
    none = jnp.zeros_like(top)
    below = functools.partial(_below, keys, top, k)
    search = below(_Search(none, none, jnp.full_like(top, _OCTAVES >> 3)))
    search = lax.while_loop(lambda search: jnp.min(search.reached) < k, below, search)
    halve = functools.partial(_halve, keys, k)
    search = lax.while_loop(functools.partial(_too_many, k), halve, search)
    low, _, missing = lax.while_loop(
        lambda rows: jnp.max(jnp.where(_open(k, rows), 1, 0)) > 0,
        functools.partial(_peel, keys, k),
        _Peeled(search.low, search.reached, none),
    )
    keys, high, last = lax.cond(
        jnp.max(missing) > 0,
        functools.partial(_break_ties, positions),
        lambda keys, low, missing: (keys, low, missing - 1),
        keys,
        low,
        missing,
    )
    return Chosen([key >= high for key in keys], high - 1, last, [])


def _below(keys: list[jax.Array], top: jax.Array, k: int, search: _Search) -> _Search:
    """Goes down from the largest key, four times as far as before."""
    width = jnp.minimum(search.width, 1 << 28) * 4
    low = jnp.maximum(top + 1 - width - width, 0)
    count = _count([low - 1 - key for key in keys])
    found = search.reached >= k
    new = _Search(low, count, width)
    return jax.tree.map(lambda old, new: jnp.where(found, old, new), search, new)


def _too_many(k: int, search: _Search) -> jax.Array:
    return jnp.max(jnp.where(search.reached > k, search.width, 0)) > _NEAR


def _halve(keys: list[jax.Array], k: int, search: _Search) -> _Search:
    middle = search.low + search.width
    count = _count([middle - 1 - key for key in keys])
    enough = count >= k
    low = jnp.where(enough, middle, search.low)
    return _Search(low, jnp.where(enough, count, search.reached), search.width >> 1)


def _open(k: int, rows: _Peeled) -> jax.Array:
    return (rows.reached > k) & (rows.missing == 0)


def _peel(keys: list[jax.Array], k: int, rows: _Peeled) -> _Peeled:
    candidates = [jnp.where(key < rows.low, _TOP, key) for key in keys]
    lowest = reduce(jnp.minimum, jnp.min, candidates)
    left = _count([lowest - key for key in keys])
    opened, enough = _open(k, rows), left >= k
    return _Peeled(
        jnp.where(opened, jnp.where(enough, lowest + 1, lowest), rows.low),
        jnp.where(opened & enough, left, rows.reached),
        jnp.where(opened & ~enough, k - left, rows.missing),
    )


def _break_ties(
    positions: list[jax.Array], keys: list[jax.Array], low: jax.Array, missing: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Lifts the first of the keys at the threshold above it, until none is missing."""
    high = jnp.where(missing > 0, low + 1, low)
    last = _last_tie(keys, positions, low, missing)
    taken = each(lambda key, i: (key == low) & (i <= last), keys, positions)
    return each(lambda key, tie: jnp.where(tie, high, key), keys, taken), high, last


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
