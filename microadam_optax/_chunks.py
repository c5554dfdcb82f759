"""Running a function over a leaf piece by piece, in place.

XLA for CPU and TPU holds every intermediate of a leaf at once, many times the
leaf itself. A loop over pieces that fit a core's cache bounds that memory, and on
CPU it is faster too.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ELEMENTS = 2**18  # a piece of float32 is then 1 MiB


def plan(shape: tuple[int, ...], axes: range, devices: int) -> tuple[int, int]:
    """Which axis of a leaf to cut, and into how many pieces: 1 to leave it whole.

    Each piece keeps as many indices of the axis as it can be sharded into, a divisor
    of the number of devices: then the pieces need no communication.
    """
    wanted = max(1, math.prod(shape) // ELEMENTS)

    def pieces(axis: int) -> int:
        most = shape[axis] // math.gcd(shape[axis], devices)
        return max(n for n in range(1, min(wanted, most) + 1) if most % n == 0)

    chunks = [(axis, pieces(axis)) for axis in axes]
    return max(chunks, key=operator.itemgetter(1), default=(0, 1))


def in_chunks(
    f: Callable[[Any], Any],
    arrays: Any,
    starts: Any,
    axis: int,
    chunks: int,
    after: jax.Array,
) -> tuple[Any, jax.Array]:
    """``write(arrays, f(arrays), starts)``, computed in strided pieces of an axis.

    Args:
      f: from a tree of arrays to one of the same structure and dtypes.
      arrays: a tree of arrays that share the leading axes up to and with `axis`.
      starts: as in `write`.
      axis: the axis to cut; `f` sees it shorter by the factor `chunks`.
      chunks: a divisor of the size of `axis`.
      after: int32 >= 0 that another call returned, to run after it and so in the
        same temporary memory.

    Returns:
      Arrays like `arrays`, which XLA writes over the inputs, and the next `after`.
    """

    def cut(x: jax.Array, pieces: int = chunks) -> jax.Array:
        """``(*lead, kept, pieces, *rest)`` without axes of size 1.

        XLA would lay those out anew, and copy the array.
        """
        lead = [n for n in (*x.shape[:axis], x.shape[axis] // pieces) if n > 1]
        rest = [n for n in x.shape[axis + 1 : -1] if n > 1]
        return _as_bits(x.reshape((*lead, pieces, *rest, x.shape[-1])))

    def whole(x: jax.Array, like: jax.Array) -> jax.Array:
        return _from_bits(x, like.dtype).reshape(like.shape)

    def cut_axis(like: jax.Array) -> int:
        return sum(n > 1 for n in (*like.shape[:axis], like.shape[axis] // chunks))

    def one(i: jax.Array, carry: Any) -> Any:
        arrays_now, after = carry

        def read(x: jax.Array, like: jax.Array) -> jax.Array:
            piece = lax.dynamic_index_in_dim(x, i, cut_axis(like), keepdims=False)
            kept = like.shape[axis] // chunks
            shape = (*like.shape[:axis], kept, *like.shape[axis + 1 :])
            return _from_bits(piece, like.dtype).reshape(shape)

        def put(x: jax.Array, part: jax.Array, like: jax.Array, start: Any) -> jax.Array:
            at: list[Any] = [0] * x.ndim
            at[cut_axis(like)], at[-1] = i, start
            return lax.dynamic_update_slice(x, cut(part, 1), at)

        new = f(jax.tree.map(read, arrays_now, arrays))
        return jax.tree.map(put, arrays_now, new, arrays, starts), jnp.maximum(after, i)

    def begin(x: jax.Array) -> jax.Array:
        """Cut; arrays that `_as_bits` copies wait for `after`, to share memory."""
        bits = cut(x)
        return bits | (after < 0).astype(bits.dtype) if bits.dtype != x.dtype else bits

    result, after = lax.fori_loop(0, chunks, one, (jax.tree.map(begin, arrays), after))
    return jax.tree.map(whole, result, arrays), after


def write(arrays: Any, parts: Any, starts: Any) -> Any:
    """Replaces a part of the last axis of each array, from its start on."""

    def put(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part, start, x.ndim - 1)

    return jax.tree.map(put, arrays, parts, starts)


def fence(tree: Any, always: jax.Array) -> Any:
    """The tree itself, all of it made before any of it is used.

    If a part of an array is written and another part read for something else, XLA
    copies the whole array to be safe. Behind a fence it sees that the reading comes
    first. (XLA removes optimization_barrier too early; a conditional stays, if it
    cannot know that `always` is true.)
    """
    return lax.cond(always, lambda t: t, lambda t: jax.tree.map(jnp.zeros_like, t), tree)


def _as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: XLA for CPU rewrites all of them to change a part."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x
