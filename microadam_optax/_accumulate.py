"""Micro-batches in the error feedback: gradient accumulation without an accumulator."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_optax import _micro, _paths, _specs, _sums
from microadam_optax._state import MicroAdamState

Tree = Any


class AccumulateState(NamedTuple):
    """State of `accumulate`, with the names that `optax.MultiSteps` has.

    Attributes:
      mini_step: int32 scalar, micro-batches since the last step.
      gradient_step: int32 scalar, steps done.
      inner_opt_state: of the transformation.
      acc_grads: of each leaf that MicroAdam does not compress, in its shape, the sum of
        its gradients since the last step, float32 or wider; an `optax.MaskedNode` for the
        others, whose sums are in the error feedback.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: optax.OptState
    acc_grads: Tree


class Accumulate(optax.GradientTransformationExtraArgs):
    """What `accumulate` returns."""

    @staticmethod
    def has_updated(state: AccumulateState) -> jax.Array:
        """Whether the last call took a step: bool scalar.

        Raises:
          TypeError: the state is not one of `accumulate`.
        """
        _check_state(state)
        return (state.mini_step == 0) & (state.gradient_step > 0)


def accumulate(tx: optax.GradientTransformation, every: int) -> Accumulate:
    """Takes a step with the mean gradient of `every` calls, and keeps no gradient.

    As `optax.MultiSteps` does, but that keeps the mean of the gradients so far, 4 bytes
    a parameter. Here a leaf that MicroAdam compresses adds each micro-batch's share of
    the mean to its error feedback, and selects at the last one. The others, which are
    few and small by default, are summed in float32, to infinity above 3.4e38.

    Between steps the updates are zeros and the state stays, schedules, counts and decay
    too, but for the error. What stands before MicroAdam in a chain, such as
    clipping, sees the gradients of one micro-batch; of dense leaves it sees their mean
    so far.

    Args:
      tx: `microadam`, or anything made of it by `optax.chain`, `optax.partition` and so
        on; any part may be jitted or vmapped by itself.
      every: micro-batches to a step. A run may go on with another number after a step,
        not in between.

    Derivatives through an update are those of the forward mode (`jax.jvp`).

    Returns:
      A transformation whose state is an `AccumulateState`; its `has_updated` tells
      whether the last call took a step.

    Raises:
      TypeError: `tx` is no transformation, or `every` no integer: it cannot change from
        step to step; or, by an update, the state was not made by `accumulate`.
      ValueError: `every` is less than 1; or, by an update, the gradients are no tree like
        the parameters; or, by `init`, a part of `tx` accumulates as well, or flattens.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from microadam_optax import accumulate, microadam
      >>> params = jnp.ones((64, 64))
      >>> tx = accumulate(microadam(0.1), every=2)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones((64, 64)), state, params)
      ...     bool(tx.has_updated(state)), bool(jnp.any(updates != 0))
      (False, False)
      (True, True)
    """
    if not isinstance(every, numbers.Integral) or isinstance(every, bool):
        raise TypeError(
            "`every` must be an integer, for the error feedback holds shares of 1 / "
            f"`every`, got {every!r}."
        )
    if every < 1:
        raise ValueError(f"`every` must be at least 1, got {every}.")
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`tx` must be an optax.GradientTransformation, got {tx!r}; call a function "
            "that makes one."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> AccumulateState:
        state = inner.init(params)
        _check_inner(state, params)
        place = _specs.of_scalars(jax.tree.leaves(params))
        zeros = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if place is not None:
            zeros = jax.device_put(zeros, place)
        return AccumulateState(*zeros, state, _sums.zeros(params, _microadams(state)))

    def update(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        return _update(inner, int(every), updates, state, params, extra_args)

    return Accumulate(init, update)


def _update(
    tx: optax.GradientTransformationExtraArgs,
    every: int,
    gradients: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, AccumulateState]:
    _check_state(state)
    number, old = state.mini_step, state.inner_opt_state
    _sums.check(gradients, state.acc_grads)
    last = number >= every - 1
    sums = _sums.add(state.acc_grads, gradients)
    means = _sums.means(sums, gradients, number + 1)
    told = _micro.tell(old, number, every)
    updates, new = tx.update(means, told, params, **extra_args)
    new = _micro.untell(new)
    updates = jax.tree.map(lambda x: jnp.where(last, x, jnp.zeros_like(x)), updates)
    new = jax.tree.map(
        lambda before, after: _keep(last, before, after),
        old,
        new,
        is_leaf=_micro.is_microadam,
    )
    sums = jax.tree.map(lambda x: jnp.where(last, jnp.zeros_like(x), x), sums)
    following = jnp.where(last, 0, number + 1).astype(number.dtype)
    steps = jnp.where(
        last, optax.safe_increment(state.gradient_step), state.gradient_step
    )
    return updates, AccumulateState(following, steps, new, sums)


def _keep(last: jax.Array, before: Any, after: Any) -> Any:
    """A part of the state: as it was, but after the last micro-batch, and the error."""
    if not _micro.is_microadam(before):
        return jnp.where(last, after, before)
    names = ("count", "ages", "mu", "nu")
    old, new = ([getattr(x, name) for name in names] for x in (before, after))
    kept = jax.tree.map(lambda x, y: jnp.where(last, y, x), old, new)
    return after._replace(**dict(zip(names, kept, strict=True)))


def _microadams(state: optax.OptState) -> list[MicroAdamState]:
    nodes = jax.tree.leaves(state, is_leaf=_micro.is_microadam)
    return [x for x in nodes if _micro.is_microadam(x)]


def _check_inner(state: optax.OptState, params: optax.Params) -> None:
    """Raises ValueError if a part accumulates as well, or sees another tree."""

    def accumulates(x: Any) -> bool:
        return isinstance(x, AccumulateState | optax.MultiStepsState)

    nodes = jax.tree.leaves(state, is_leaf=accumulates)
    if any(map(accumulates, nodes)):
        raise ValueError(
            "`tx` must not accumulate micro-batches itself, as `accumulate` and "
            "optax.MultiSteps do: name the product of both numbers as `every`."
        )
    known = set(_paths.of(params))
    for node in _microadams(state):
        for path in _paths.of(node.codes):
            if path not in known:
                raise ValueError(
                    "`tx` must give MicroAdam a tree like the parameters, but it makes a "
                    f"state of {_paths.shown(path)}, which they have not, as "
                    "optax.flatten does: put that around `accumulate`."
                )


def _check_state(state: Any) -> None:
    """Raises TypeError if it is the state of something else."""
    if not isinstance(state, AccumulateState):
        raise TypeError(
            f"The state must be an AccumulateState, got a {type(state).__name__}: it was "
            "made by another transformation, or restored without its structure."
        )
