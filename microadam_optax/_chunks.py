"""Running a function over a leaf piece by piece, in place.

XLA holds intermediates of a whole leaf at once, many times the leaf itself. A loop over
pieces bounds that memory. On CPUs they fit a core's cache, which is faster too; on GPUs
they are large, for each takes some ten launches and more.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ELEMENTS = 2**18  # a piece of float32 is then 1 MiB
ELEMENTS_ON_GPUS = 2**23  # there pieces are for memory alone
LARGER = 4  # times that, pieces may be, if they are equal


class Cut(NamedTuple):
    """How an axis is cut: seen as ``(kept, pieces * size + rest)``, along the second."""

    axis: int = 0
    kept: int = 1
    size: int = 1  # of a piece
    pieces: int = 1
    rest: int = 0  # the last piece, if there is one that is smaller


def plan(
    shape: tuple[int, ...],
    axes: range,
    devices: int,
    blocks: int | None = None,
    elements: int | None = None,
) -> Cut:
    """Which axis of a leaf to cut, and how; into one piece to leave it whole.

    Each piece keeps as many indices of the axis as it can be sharded into, a divisor
    of the number of devices: then the pieces need no communication. They are equal
    where no axis has such divisors that pieces are `LARGER` than wanted; else a
    smaller one is left over, which XLA compiles once more.

    Args:
      shape: of the cells, or of their blocks.
      axes: those that may be cut.
      devices: how many an axis may be sharded over.
      blocks: in a cell, the last axis, if the last of them is not full. They may be
        cut as well, but for that.
      elements: of a piece, as wanted; `ELEMENTS`, if not given.
    """
    wanted = max(1, math.prod(shape) // (elements or ELEMENTS))
    lengths = [(axis, shape[axis] // math.gcd(shape[axis], devices)) for axis in axes]
    equal = [(axis, _largest_divisor(length, wanted)) for axis, length in lengths]
    axis, pieces = max(equal, key=operator.itemgetter(1), default=(0, 1))
    if pieces * LARGER >= wanted:
        return Cut(axis, shape[axis] // pieces if axes else 1, 1, pieces)
    if blocks is not None:
        lengths.append((len(shape) - 1, blocks - 1))
    axis, length = max(lengths, key=operator.itemgetter(1))
    size = -(-length // min(wanted, max(length, 1)))
    pieces, rest = divmod(length, size)
    if blocks is not None and axis == len(shape) - 1:
        return Cut(axis, 1, size, pieces, rest + 1)
    return Cut(axis, math.gcd(shape[axis], devices), size, pieces, rest)


def _largest_divisor(n: int, most: int) -> int:
    return max(i for i in range(1, min(most, n) + 1) if n % i == 0)


def in_chunks(
    f: Callable[[Any], Any],
    arrays: Any,
    starts: Any,
    units: Any,
    cut: Cut,
    token: jax.Array,
) -> tuple[Any, jax.Array]:
    """``write(arrays, f(arrays), starts)``, computed in pieces of an axis.

    Args:
      f: from a tree of arrays to one of the same structure and dtypes.
      arrays: a tree of arrays that share the leading axes up to and with the one cut.
      starts: as in `write`.
      units: how many indices of that axis each array has where others have one.
      cut: of `plan`; `f` sees pieces of that axis.
      token: int32 >= 0 that another call returned, to run after it and so in the
        same temporary memory.

    Returns:
      Arrays like `arrays`, which XLA writes over the inputs, and the next token.
    """
    views = jax.tree.map(functools.partial(_begin, cut, token), arrays)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    one = functools.partial(_one_piece, f, shapes, starts, units, cut)
    carry = lax.fori_loop(0, cut.pieces, one, (views, token))
    if cut.rest:  # in a loop as well, for XLA to do it before what waits for the token
        once = 1 + jnp.minimum(token, 0)
        carry = lax.fori_loop(0, once, lambda _, x: one(cut.pieces, x), carry)
    views, token = carry
    return jax.tree.map(_end, views, shapes), token


def _one_piece(
    f: Callable[[Any], Any],
    shapes: Any,
    starts: Any,
    units: Any,
    cut: Cut,
    i: Any,
    carry: tuple[Any, jax.Array],
) -> tuple[Any, jax.Array]:
    """Reads piece `i` of all arrays, and writes what `f` makes of it in its place."""
    views, token = carry
    read = functools.partial(_read, cut, i)
    new = f(jax.tree.map(read, views, shapes, units))
    put = functools.partial(_put, cut, i)
    views = jax.tree.map(put, views, new, shapes, starts, units)
    return views, jnp.maximum(token, i)


def _begin(cut: Cut, token: jax.Array, x: jax.Array) -> jax.Array:
    """An array to be cut; one that is copied as bits waits for the token."""
    bits = _view(cut, x)
    return bits | (token < 0).astype(bits.dtype) if bits.dtype != x.dtype else bits


def _end(view: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_begin`."""
    return _from_bits(view, like.dtype).reshape(like.shape)


def _view(cut: Cut, x: jax.Array) -> jax.Array:
    """``(*lead, kept, length, *rest)`` without axes of size 1.

    XLA would lay those out anew, and copy the array.
    """
    axis = cut.axis
    lead = [n for n in (*x.shape[:axis], cut.kept) if n > 1]
    length = x.shape[axis] // cut.kept
    inner = [n for n in x.shape[axis + 1 : -1] if n > 1]
    last = x.shape[axis + 1 :][-1:]
    return _as_bits(x.reshape((*lead, length, *inner, *last)))


def _cut_axis(cut: Cut, like: Any) -> int:
    """The axis of a view that is cut."""
    return sum(n > 1 for n in (*like.shape[: cut.axis], cut.kept))


def _read(cut: Cut, i: Any, view: jax.Array, like: Any, unit: int) -> jax.Array:
    axis = _cut_axis(cut, like)
    begin, length = i * (cut.size * unit), cut.size * unit
    if isinstance(i, int):  # the last one, whose last block may not be full
        length = view.shape[axis] - begin
    piece = lax.dynamic_slice_in_dim(view, begin, length, axis)
    shape = (*like.shape[: cut.axis], cut.kept * length, *like.shape[cut.axis + 1 :])
    return _from_bits(piece, like.dtype).reshape(shape)


def _put(
    cut: Cut, i: Any, view: jax.Array, part: jax.Array, like: Any, start: Any, unit: int
) -> jax.Array:
    at: list[Any] = [0] * view.ndim
    at[-1] = start
    at[_cut_axis(cut, like)] = i * (cut.size * unit)
    return lax.dynamic_update_slice(view, _view(cut, part), at)


def write(arrays: Any, parts: Any, starts: Any) -> Any:
    """Replaces a part of the last axis of each array, from its start on."""
    return jax.tree.map(_write, arrays, parts, starts)


def _write(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, x.ndim - 1)


def fence(tree: Any, always: jax.Array) -> Any:
    """The tree itself, all of it made before any of it is used.

    If a part of an array is written and another part read for something else, XLA
    copies the whole array to be safe. Behind a fence it sees that the reading comes
    first. (XLA removes optimization_barrier too early; a conditional stays, if it
    cannot know that `always` is true.)
    """
    return lax.cond(always, lambda t: t, lambda t: jax.tree.map(jnp.zeros_like, t), tree)


def _as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: XLA for CPU rewrites all of them to change a part.

    Not from jax 0.12 on, but there too the copy is what a leaf's token can hold back.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x
