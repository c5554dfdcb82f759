"""The k largest magnitudes of every block, as a mask and as ascending indices.

Selection works on the bits of ``|x|``: for float32 their order as integers is
the order of the magnitudes (NaN above infinity), and equal bits are ties, which
go to the lowest index. That is exactly the set that ``jax.lax.top_k`` picks.

Only the last axis is reduced, by elementwise operations and plain reductions, so
arrays sharded along any other axis need no communication. The exception is
`positions` in rows of `LARGE` and more, which XLA gathers for ``lax.top_k``.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

BY_MAXIMA = 4  # up to here k maxima cost less, to run and to compile, than counting bits
LARGE = 1024  # below it the counts for three thresholds share one int32
_WORD = 32
_sum = functools.partial(jnp.sum, dtype=jnp.int32)  # int64 otherwise, in x64 mode


def largest(x: jax.Array, k: int) -> jax.Array:
    """Marks the k largest ``|x|`` of each row, ties to the lowest index.

    Args:
      x: float32 ``(..., b)``.
      k: how many to mark, ``0 <= k <= b``.

    Returns:
      bool ``(..., b)`` with exactly k True in each row.
    """
    size = x.shape[-1]
    keys = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    if k == 0:
        return keys < 0
    if k == size:
        return keys >= 0  # all, but not a constant for XLA to fold through the leaf
    kth = kth_by_maxima(keys, k) if k <= BY_MAXIMA else kth_by_counting(keys, k, bits=31)
    above = fold(keys, lambda part: (part > kth).astype(jnp.int32), jnp.add, _sum)
    backwards = size - 1 - lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    ties = jnp.where(keys == kth, backwards, -1)
    last = kth_by_counting(ties, k - above, bits=(size - 1).bit_length())
    return (keys > kth) | (ties >= last)


def kth_by_maxima(keys: jax.Array, k: int) -> jax.Array:
    """The k-th largest of each row of int32 keys >= 0: maxima of ever smaller keys."""
    maxima = [fold(keys, lambda part: part, jnp.maximum, jnp.max)]
    for _ in range(k - 1):
        below = functools.partial(_below, maxima[-1])
        maxima.append(fold(keys, below, jnp.maximum, jnp.max))
    kth = maxima.pop()
    for larger in reversed(maxima):  # ties may fill the k places sooner
        (count,) = _count(keys, larger)
        kth = jnp.where(count >= k, larger, kth)
    return kth


def kth_by_counting(keys: jax.Array, k: int | jax.Array, bits: int) -> jax.Array:
    """The k-th largest of each row of int32 keys, at least k of them in [0, 2**bits).

    Finds its bits from the highest down, by counting the keys that reach it.
    """
    digit = 2 if keys.shape[-1] < LARGE else 1  # bits found in one pass
    passes = -(-bits // digit)

    def one_digit(i: jax.Array, kth: jax.Array) -> jax.Array:
        shift = jnp.maximum(bits - digit * (i + 1), 0)
        steps = [jnp.left_shift(jnp.int32(n), shift) for n in range(1, 2**digit)]
        counts = _count(keys, *(kth + step for step in steps))
        return kth + (sum((count >= k).astype(jnp.int32) for count in counts) << shift)

    return lax.fori_loop(0, passes, one_digit, jnp.zeros_like(keys[..., :1]))


def positions(mask: jax.Array, k: int) -> jax.Array:
    """Indices of the True elements of each row, ascending.

    Args:
      mask: bool ``(..., b)`` with exactly k True in each row.
      k: the number of indices.

    Returns:
      int32 ``(..., k)``.
    """
    size = mask.shape[-1]
    if size >= LARGE:
        backwards = size - lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
        return size - lax.top_k(jnp.where(mask, backwards, 0), k)[0]
    words = _pack_words(mask)[..., None, :]
    counts = lax.population_count(words).astype(jnp.int32)
    rank = jnp.arange(k, dtype=jnp.int32)[:, None]
    passed = jnp.cumsum(counts, axis=-1, dtype=jnp.int32) <= rank
    index = _sum(passed, axis=-1, keepdims=True)
    rank -= _sum(jnp.where(passed, counts, 0), axis=-1, keepdims=True)
    here = jnp.arange(words.shape[-1], dtype=jnp.int32) == index
    word = jnp.sum(jnp.where(here, words, 0), axis=-1, keepdims=True, dtype=words.dtype)
    up_to = jnp.left_shift(jnp.uint32(2), jnp.arange(_WORD, dtype=jnp.uint32)) - 1
    before = lax.population_count(word & up_to).astype(jnp.int32) <= rank
    return _WORD * index[..., 0] + _sum(before, axis=-1)


def _below(limit: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.where(keys < limit, keys, -1)


def _count(keys: jax.Array, *thresholds: jax.Array) -> list[jax.Array]:
    """How many keys of each row reach each threshold; three at most in one pass."""
    bits = 31 // len(thresholds)

    def reached(keys: jax.Array) -> jax.Array:
        flags = [(keys >= threshold).astype(jnp.int32) for threshold in thresholds]
        shifted = [flag << (bits * i) for i, flag in enumerate(flags)]
        return functools.reduce(jnp.add, shifted)

    total = fold(keys, reached, jnp.add, _sum)
    return [(total >> (bits * i)) & (2**bits - 1) for i in range(len(thresholds))]


def fold(
    keys: jax.Array, each: Callable, combine: Callable, reduce: Callable
) -> jax.Array:
    """``reduce(each(keys))`` over the last axis, a multiple of 8, kept with size 1.

    Pieces of whole CPU vectors are combined elementwise first: eighths of as much of
    the row as divides by 64, and eights of the rest.
    """
    cut = keys.shape[-1] // 64 * 64
    totals = []
    for part, pieces in ((keys[..., :cut], 8), (keys[..., cut:], -1)):
        if part.shape[-1]:
            number = pieces if pieces > 0 else part.shape[-1] // 8
            split = [each(piece) for piece in jnp.split(part, number, axis=-1)]
            total = functools.reduce(combine, split)
            totals.append(reduce(total, axis=-1, keepdims=True))
    return functools.reduce(combine, totals)


def _pack_words(mask: jax.Array) -> jax.Array:
    """bool ``(..., b)`` to uint32 ``(..., ceil(b / 32))``, element 0 in bit 0."""
    cut = mask.shape[-1] // _WORD * _WORD
    bits = mask.astype(jnp.uint32)
    words = []
    if cut:
        whole = bits[..., :cut].reshape(*bits.shape[:-1], -1, _WORD)
        while (half := whole.shape[-1] // 2) > 1:
            whole = whole[..., :half] | (whole[..., half:] << half)
        words.append(_one_word(whole))
    if cut < mask.shape[-1]:
        words.append(_one_word(bits[..., None, cut:]))
    return jnp.concatenate(words, axis=-1)


def _one_word(bits: jax.Array) -> jax.Array:
    """The last axis as one number. A reduction: XLA does not repeat it for readers."""
    shifts = jnp.arange(bits.shape[-1], dtype=jnp.uint32)
    return jnp.sum(bits << shifts, axis=-1, dtype=jnp.uint32)
