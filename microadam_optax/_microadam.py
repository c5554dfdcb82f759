"""START HERE: MicroAdam as an optax gradient transformation.

`scale_by_microadam` walks the tree of gradients; what happens to one leaf is in
`_leaf.py`, in the order of the paper's Algorithm 1; what is kept, in `_state.py`.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from microadam_optax import _blocks, _checks, _dense, _leaf, _specs, _window
from microadam_optax import _state as _states
from microadam_optax._state import MicroAdamState

PAPER: Mapping[str, Any] = MappingProxyType({"window": 10, "density": 0.01})


def scale_by_microadam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    window: int = 2,
    density: float = 0.06,
    block_size: int = 256,
    error_bits: int = 4,
    shards: int = 8,
    grid: Any = None,
    dense: Any | Callable[[Any, Any], bool] | None = None,
    alpha: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """Rescales updates by Adam's moments, rebuilt from a few sparse gradients.

    See `microadam` for the method.

    Args:
      b1: Decay of the first moment; may be traced.
      b2: Decay of the second moment; may be traced.
      eps: Added to the root of the second moment; may be traced.
      eps_root: Added to the second moment inside the root; may be traced.
      window: How many sparse gradients the moments are made of, the newest
        included. The state holds ``window - 1``.
      density: Share of the entries of each block that is selected, in (0, 1]:
        ``k = max(1, ceil(density * block))``.
      block_size: Largest block, a multiple of 8 up to 65536. Up to 256 an index
        takes one byte, above two.
      error_bits: Bits of an error code: 2, 4 or 8.
      shards: The default grid cuts a leaf so that it can be sharded over any
        divisor of this number without communication.
      grid: None for the default grids, or a tree like the parameters that has for
        every leaf a tuple of divisors of its shape, or None.
      dense: Leaves that are not compressed but scaled by `optax.scale_by_adam` with
        the same decays, two moments in the parameter's dtype: a function of a leaf's
        path and the leaf, as for `jax.tree_util.tree_map_with_path`, that looks at
        nothing but path and shape (`smaller_than`, `matching`); a tree of bools like
        the parameters, or a prefix of it; or None for no leaves.
      alpha: Share of the error, in [0, 1), that goes into the update at once
        instead of being carried on: for training from scratch. 0 is the paper's
        method.
      stochastic_rounding: Rounds the error's codes up or down at random, unbiased.
      seed: Seed of that randomness.
      implementation: ``"xla"``, ``"pallas"`` for the fused kernel of a GPU or TPU, or
        None to choose what is known to be faster.

    Returns:
      A transformation whose state is a `MicroAdamState`, or with `dense` that of an
      `optax.partition` of the ``"compressed"`` and the ``"dense"`` leaves. Updates have
      the shapes and dtypes of the gradients (float16, bfloat16, float32 or float64);
      if `update` gets the parameters too, the dtype that holds both, as from
      `optax.adam`: float32 where gradients are bfloat16 and parameters float32. The
      arithmetic is float32.

    Raises:
      TypeError: an argument of the wrong type, or an integer or complex leaf.
      ValueError: an argument out of range, or gradients that do not fit the state.
      NotImplementedError: an implementation that cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> import microadam_optax
      >>> tx = microadam_optax.scale_by_microadam(window=2, density=0.25)
      >>> params = {"w": jnp.zeros((4, 64))}
      >>> state = tx.init(params)
      >>> state.codes["w"].shape, state.indices["w"].shape
      ((4, 1, 1, 32), (4, 1, 1, 16))
      >>> updates, state = tx.update({"w": jnp.ones((4, 64))}, state)
      >>> int((updates["w"] != 0).sum())
      64

    References:
      Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space
      Overhead and Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024
    """
    _checks.check_arguments(
        window=window,
        density=density,
        block_size=block_size,
        error_bits=error_bits,
        shards=shards,
        alpha=alpha,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        implementation=implementation,
    )
    _checks.check_decays(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    settings = _states.Settings(
        window, density, block_size, error_bits, alpha, implementation
    )

    def init_fn(params: optax.Params) -> MicroAdamState:
        leaves, tree = _flatten(params)
        grids = _grids(grid, params)
        layouts = []
        for (path, leaf), cut in zip(leaves, grids, strict=True):
            _checks.check_leaf("Parameters", path, leaf)
            cut = _checks.check_grid(path, jnp.shape(leaf), cut)
            at = _blocks.layout(jnp.shape(leaf), block_size, shards, cut)
            _checks.check_kernel(path, jnp.result_type(leaf), at, settings)
            layouts.append(at)
        key = None
        if stochastic_rounding:
            key = jax.random.key_data(jax.random.key(seed, impl=_leaf.PRNG))
        states = [
            _specs.vary(
                _states.zeros(at, settings, _specs.of(leaf)), _specs.varying(leaf)
            )
            for (_, leaf), at in zip(leaves, layouts, strict=True)
        ]
        ages = _window.first(window - 1) if window > 1 else None
        return _pack(jnp.zeros([], jnp.int32), ages, states, tree, key)

    def update_fn(
        updates: optax.Updates,
        state: MicroAdamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, MicroAdamState]:
        _checks.check_structure(updates, state.codes)
        leaves, tree = _flatten(_promoted(updates, params))
        states = _unpack(state, tree)
        layouts = []
        for (path, gradient), old in zip(leaves, states, strict=True):
            _checks.check_leaf("Gradients", path, gradient)
            shape = jnp.shape(gradient)
            at = _checks.check_state(path, shape, old, state.ages, settings)
            _checks.check_kernel(path, jnp.result_type(gradient), at, settings)
            layouts.append(at)
        float32 = functools.partial(jnp.asarray, dtype=jnp.float32)
        count = optax.safe_increment(state.count)
        old_ages = None if state.ages is None else _window.valid(state.ages)
        numbers = float32(b1), float32(b2), float32(eps), float32(eps_root)
        step = _leaf.Step(count, old_ages, *numbers, None)
        if state.key is not None:
            key = jax.random.wrap_key_data(state.key, impl=_leaf.PRNG)
            step = step._replace(key=jax.random.fold_in(key, state.count))
        new, after = [], state.count  # a number that is never negative
        for number, ((_, gradient), old, at) in enumerate(
            zip(leaves, states, layouts, strict=True)
        ):
            leaf = _leaf.Leaf(jnp.asarray(gradient), *old, None)
            own = _leaf.for_leaf(step, number)
            leaf, after = _leaf.update_leaf(leaf, own, after, at=at, settings=settings)
            new.append(leaf)
        ages = None if old_ages is None else _window.older(old_ages)
        new_states = [leaf.state for leaf in new]
        new_state = _pack(count, ages, new_states, tree, state.key)
        return tree.unflatten(leaf.gradient for leaf in new), new_state

    tx = optax.GradientTransformation(init_fn, update_fn)
    if dense is None:
        return tx
    return _dense.partition(tx, optax.scale_by_adam(b1, b2, eps, eps_root), dense)


def microadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    window: int = 2,
    density: float = 0.06,
    block_size: int = 256,
    error_bits: int = 4,
    shards: int = 8,
    grid: Any = None,
    dense: Any | Callable[[Any, Any], bool] | None = None,
    alpha: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MicroAdam: Adam in less than a byte of state for each parameter.

    Each block of a gradient, with what was left over before added, is reduced to
    its `density` largest entries. Adam's moments are rebuilt at every step from
    the last `window` of these sparse gradients; all that was not selected is kept
    in `error_bits` bits an entry and added to the next gradient.

    State in bytes for each parameter, with k entries selected in blocks of b:
    ``error_bits / 8 + (window - 1) * k * 3 / b + 4 / b``, 0.70 by default, where
    Adam has 8. The default `window` and `density` trained as well as Adam in every
    study of docs/convergence.md; the paper's are `PAPER`.

    Args:
      learning_rate: A number or a schedule; may be traced.
      b1: As in `scale_by_microadam`, like all that is not named here.
      b2: See `scale_by_microadam`.
      eps: See `scale_by_microadam`.
      eps_root: See `scale_by_microadam`.
      window: See `scale_by_microadam`.
      density: See `scale_by_microadam`.
      block_size: See `scale_by_microadam`.
      error_bits: See `scale_by_microadam`.
      shards: See `scale_by_microadam`.
      grid: See `scale_by_microadam`.
      dense: See `scale_by_microadam`.
      alpha: See `scale_by_microadam`.
      stochastic_rounding: See `scale_by_microadam`.
      seed: See `scale_by_microadam`.
      weight_decay: Decoupled weight decay, times the learning rate as in
        `optax.adamw`; may be traced. `update` needs the parameters unless it is 0.
      mask: Which leaves decay: a tree of bools, or a function that returns one.
      implementation: See `scale_by_microadam`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: See `scale_by_microadam`, as for the other errors.
      ValueError: See `scale_by_microadam`.
      NotImplementedError: See `scale_by_microadam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from microadam_optax import microadam
      >>> def loss(x): return jnp.sum(x**2)
      >>> tx = microadam(learning_rate=optax.linear_schedule(0.1, 0.0, 200))
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True

    References:
      Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space
      Overhead and Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024
    """
    decays = mask is not None or not isinstance(weight_decay, int | float)
    if decays or weight_decay != 0:
        decay = optax.add_decayed_weights(weight_decay, mask)
    else:
        decay = optax.identity()  # the same empty state, and needs no parameters
    return optax.chain(
        scale_by_microadam(
            b1,
            b2,
            eps,
            eps_root,
            window=window,
            density=density,
            block_size=block_size,
            error_bits=error_bits,
            shards=shards,
            grid=grid,
            dense=dense,
            alpha=alpha,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            implementation=implementation,
        ),
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )


def _flatten(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Leaves with their paths, and the structure."""
    return jax.tree_util.tree_flatten_with_path(tree)


def _promoted(updates: Any, params: Any) -> Any:
    """Gradients in the dtype that holds a gradient and its parameter."""
    structures: list[Any] = [jax.tree.structure(x) for x in (updates, params)]
    if structures[0] != structures[1]:
        return updates  # no parameters, or not those of the gradients

    def promote(gradient: Any, param: Any) -> Any:
        own, other = (getattr(x, "dtype", None) for x in (gradient, param))
        if own is None or other is None or own == other:
            return gradient
        floats = (jnp.issubdtype(x, jnp.floating) for x in (own, other))
        if not all(floats) or other.itemsize < own.itemsize:
            return gradient
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(gradient, jnp.promote_types(own, other))

    return jax.tree.map(promote, updates, params)


def _grids(grid: Any, params: Any) -> list[Any]:
    """The grid asked for each leaf that is not masked; None for the default."""

    def masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    tree: Any
    leaves, tree = jax.tree.flatten(params, is_leaf=masked)
    asked = [None] * len(leaves)
    if grid is not None and leaves:
        asked = tree.flatten_up_to(grid)
    return [x for x, leaf in zip(asked, leaves, strict=True) if not masked(leaf)]


def _pack(count, ages, states, tree, key) -> MicroAdamState:
    """States of the leaves as one, each field a tree like the parameters."""

    def field(name: str) -> Any:
        return tree.unflatten(getattr(state, name) for state in states)

    kept = ages is not None
    return MicroAdamState(
        count=count,
        ages=ages,
        codes=field("codes"),
        ranges=field("ranges"),
        indices=field("indices") if kept else None,
        values=field("values") if kept else None,
        key=key,
    )


def _unpack(state: MicroAdamState, tree: Any) -> list[_states.LeafState]:
    """The inverse of `_pack`."""
    fields = (getattr(state, name) for name in _states.LeafState._fields)
    absent = [None] * tree.num_leaves
    columns = [absent if x is None else tree.flatten_up_to(x) for x in fields]
    return [_states.LeafState(*row) for row in zip(*columns, strict=True)]
