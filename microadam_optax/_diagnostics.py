"""What the state tells of a run's health: error, window and updates, by leaf."""

import collections
import functools
import math
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_optax import _blocks, _paths, _quantize
from microadam_optax._form import Form, form_of
from microadam_optax._paths import shown
from microadam_optax._state import LeafState, MicroAdamState


class Health(NamedTuple):
    """Figures of one leaf, or of all, as float32 scalars.

    NaN stands for what was not given, or cannot be told: `selected_again` needs a
    window of 3, `window_filled` one of 2.

    Attributes:
      error_norm: Euclidean norm of the error feedback, as it is stored.
      gradient_norm: of the gradient.
      update_norm: of the update.
      error_over_gradient: the first norm over the second.
      quantization_over_error: norm of the error's last rounding over that of the error,
        as expected of an error spread evenly between two codes; the rounding itself is
        not kept. Up to 1, where the error is smaller than its codes can tell.
      nonzero_updates: share of the entries that move.
      window_filled: share of the stored window's entries that are not 0.
      selected_again: share of the newest stored entries that stand in an older slot of
        the window, too.
    """

    error_norm: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    error_over_gradient: jax.Array
    quantization_over_error: jax.Array
    nonzero_updates: jax.Array
    window_filled: jax.Array
    selected_again: jax.Array


class Diagnostics(NamedTuple):
    """What `diagnostics` returns.

    Attributes:
      total: `Health` of all compressed leaves together.
      leaves: `Health` of each, by its path with slashes, ``"layers/0/kernel"``, or,
        where two would read alike, as keys in brackets, ``"['layers/0']['kernel']"``.
    """

    total: Health
    leaves: dict[str, Health]


class _Sums(NamedTuple):
    """What adds up over leaves: squares and numbers of entries, float32."""

    error: Any
    rounding: Any
    gradient: Any
    update: Any
    moving: Any
    entries: Any
    filled: Any
    stored: Any
    again: Any
    newest: Any


def diagnostics(state: Any, gradients: Any = None, updates: Any = None) -> Diagnostics:
    """Norms and shares that tell whether MicroAdam runs as it should; jittable.

    Args:
      state: the state after a step of `microadam`, or of any optax chain that contains
        it. Leaves that others update, dense ones too, are left out.
      gradients: the gradients of that step, as MicroAdam got them.
      updates: the updates of that step. One of the two must be given, as the state
        alone does not tell the shapes of the leaves.

    Returns:
      `Diagnostics`: `Health` in total and of each leaf, NaN and {} if all are dense.

    Raises:
      ValueError: neither gradients nor updates; no MicroAdam in the state; or trees that
        do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from microadam_optax import diagnostics, microadam
      >>> tx = microadam(1e-3, window=3, density=0.25)
      >>> params = {"w": jnp.zeros((64, 64))}
      >>> gradients = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> updates, state = tx.update(gradients, tx.init(params))
      >>> found = diagnostics(state, gradients, updates)
      >>> float(found.total.nonzero_updates), float(found.leaves["w"].window_filled)
      (0.25, 0.5)
    """
    if gradients is None and updates is None:
        raise ValueError(
            "`diagnostics` needs `gradients` or `updates`, to know the shapes of leaves."
        )
    given = [_by_path(tree) for tree in (gradients, updates)]
    sums: dict[Any, _Sums] = {}
    nodes = [x for x in jax.tree.leaves(state, is_leaf=_is_own) if _is_own(x)]
    if not nodes:
        raise ValueError("There is no MicroAdamState in `state`.")
    for node in nodes:
        for path, _ in jax.tree_util.tree_leaves_with_path(node.codes):
            sums[path] = _sums_of(path, node, *(x.get(path) for x in given))
    none = _Sums(*(jnp.float32(0) for _ in _Sums._fields))
    total = functools.reduce(
        lambda a, b: _Sums(*map(operator.add, a, b)), sums.values(), none
    )
    each = zip(_names(sums), map(_health, sums.values()), strict=True)
    return Diagnostics(_health(total), dict(each))


def _is_own(x: Any) -> bool:
    return isinstance(x, MicroAdamState)


def _by_path(tree: Any) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _names(paths: Collection[Any]) -> list[str]:
    """Paths with slashes, but with brackets where two would read alike."""
    short = [_paths.slashed(x) for x in paths]
    times = collections.Counter(short)
    pairs = zip(paths, short, strict=True)
    return [shown(path) if times[x] > 1 else x for path, x in pairs]


def _sums_of(path: Any, node: MicroAdamState, gradient: Any, update: Any) -> _Sums:
    """The sums of one leaf."""
    fields = (getattr(node, x) for x in LeafState._fields)
    leaf = LeafState(*(None if x is None else _by_path(x)[path] for x in fields))
    window = 1 if node.ages is None else node.ages.size + 1
    like = update if gradient is None else gradient
    if like is None:
        raise ValueError(f"Nothing is given for {shown(path)}, which the state knows.")
    shapes = LeafState(*(None if x is None else x.shape for x in leaf))
    form = form_of(like.shape, shapes, window)
    if form is None:
        raise ValueError(
            f"The optimizer state of {shown(path)} is not that of an array of shape "
            f"{like.shape}."
        )
    error, rounding = _error_squares(leaf, like.shape, form)
    filled, stored, again, newest = _window_counts(leaf, node.ages, form)
    moving = jnp.nan if update is None else _count(update != 0)
    return _Sums(
        error,
        rounding,
        _square(gradient),
        _square(update),
        moving,
        jnp.float32(math.prod(like.shape)),
        filled,
        stored,
        again,
        newest,
    )


def _error_squares(
    leaf: LeafState, shape: tuple[int, ...], form: Form
) -> tuple[jax.Array, jax.Array]:
    """Squares of the error, and those expected of its last rounding."""
    blocks = leaf.codes.shape[-2]
    layout = _blocks.Layout(shape, form.grid, blocks, form.block)
    error = _quantize.dequantize(leaf.codes, leaf.ranges, form.bits)
    step = leaf.ranges[..., 0].astype(jnp.float32)
    last = layout.cell - (blocks - 1) * form.block  # the others are full
    sizes = jnp.full(blocks, form.block, jnp.float32).at[-1].set(last)
    return jnp.sum(error**2), jnp.sum(step**2 / 12 * sizes)


def _window_counts(leaf: LeafState, ages: Any, form: Form) -> tuple[Any, ...]:
    """Entries that are not 0, all, those selected again, and those they are among."""
    if form.k is None:
        return (jnp.float32(0),) * 4
    slots, k = form.window - 1, form.k

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape((*x.shape[:-1], slots, k))

    indices, filled = rows(leaf.indices), rows(leaf.values) != 0
    counted = _count(filled), jnp.float32(filled.size)
    if slots == 1:
        return (*counted, jnp.float32(0), jnp.float32(0))
    newest = jnp.argmin(ages)
    own = jnp.take(indices, newest, axis=-2)
    again = jnp.zeros(own.shape, bool)
    for slot in range(slots):
        same = own[..., :, None] == indices[..., slot, None, :]
        older = filled[..., slot, None, :] & (slot != newest)
        again |= jnp.any(same & older, axis=-1)
    real = jnp.take(filled, newest, axis=-2)
    return (*counted, _count(again & real), _count(real))


def _square(x: Any) -> Any:
    return jnp.nan if x is None else jnp.sum(jnp.square(x.astype(jnp.float32)))


def _count(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)


def _health(sums: _Sums) -> Health:
    error, rounding, gradient, update = (jnp.sqrt(x) for x in sums[:4])
    return Health(
        error_norm=error,
        gradient_norm=gradient,
        update_norm=update,
        error_over_gradient=error / gradient,
        quantization_over_error=rounding / error,
        nonzero_updates=sums.moving / sums.entries,
        window_filled=sums.filled / sums.stored,
        selected_again=sums.again / sums.newest,
    )
