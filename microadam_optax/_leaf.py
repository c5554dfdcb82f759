"""The update of one leaf, on whatever mesh it is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from microadam_optax import _primitive, _specs, _step, _xla
from microadam_optax._blocks import Layout
from microadam_optax._state import LeafState, Settings
from microadam_optax._step import Step


@functools.partial(jax.jit, static_argnames=("layout", "settings"))
def update(
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    token: jax.Array,
    *,
    layout: Layout,
    settings: Settings,
) -> tuple[jax.Array, LeafState, jax.Array]:
    """One step of a leaf in its own shape.

    Jitted by itself, so that leaves of equal shapes are traced once.

    Args:
      gradient: of a float dtype.
      old: the state of the leaf.
      step: scalars of the step.
      token: what the update of another leaf returned, see `_chunks.in_chunks`.
      layout: of the leaf.
      settings: static numbers.

    Returns:
      The update, in the gradient's dtype, the new state, and the next token.
    """
    step = _step.of_leaf(step, layout, settings)
    named_xla = settings.implementation == "xla"
    by_xla = named_xla or 0 in layout.shape or step.prng is not None
    compute = _xla.update if by_xla else _primitive.update
    f = functools.partial(compute, layout=layout, settings=settings)
    if step.micro is not None:
        own = settings.of_micro_batch()
        add = functools.partial(compute, layout=layout, settings=own)
        f = functools.partial(_of_micro_batch, f, add)
    manual = _specs.varying((gradient, old, step))
    gradient, old, step = _specs.vary((gradient, old, step), manual)
    if not _specs.varying(token) <= manual:
        token = step.count  # waiting for it, this leaf would vary as well
    token = _specs.vary(token, manual)
    if _specs.in_types(old.codes):
        return _on_explicit_mesh(f, gradient, old, step, token, len(layout.grid))
    return f(gradient, old, step, token)


def _on_explicit_mesh(
    f: Callable, gradient: jax.Array, old: LeafState, step: Step, token: Any, rank: int
) -> tuple[jax.Array, LeafState, jax.Array]:
    """The types say where each array is, XLA does the rest."""
    own = jax.typeof(gradient).sharding
    cells = _specs.of_cells(old.codes, rank)
    gradient = jax.sharding.reshard(gradient, cells)
    types = jax.tree.map(lambda x: jax.typeof(x).sharding, (gradient, old))
    replicated = jax.sharding.NamedSharding(cells.mesh, jax.P())
    f = jax.sharding.auto_axes(f, out_sharding=(*types, replicated))
    update, new, token = f(gradient, old, step, token)
    if not own.mesh.empty:
        update = jax.sharding.reshard(update, own)
    return update, new, token


def _of_micro_batch(
    f: Callable,
    add: Callable,
    gradient: jax.Array,
    old: LeafState,
    step: Step,
    token: jax.Array,
) -> tuple[jax.Array, LeafState, jax.Array]:
    """A step with the last micro-batch; before it, only the error takes them up."""

    def take_up(gradient: jax.Array, old: LeafState, token: jax.Array) -> Any:
        own = step._replace(ages=None)
        if step.prng is not None:
            own = own._replace(prng=jax.random.fold_in(step.prng, step.micro.number))
        error = old._replace(indices=None, values=None)
        update, new, token = add(gradient, error, own, token)
        return update, old._replace(codes=new.codes, ranges=new.ranges), token

    # Loops of one pass or none, since XLA copies what a conditional writes over.
    carry, last = (gradient, old, token), step.micro.last.astype(int)
    carry = lax.fori_loop(0, last, lambda _, x: f(x[0], x[1], step, x[2]), carry)
    return lax.fori_loop(0, 1 - last, lambda _, x: take_up(*x), carry)
