"""START HERE: MicroAdam as an optax gradient transformation.

The way of a gradient: `_tree.py` walks the leaves, `_leaf.py` updates one of them,
`_dispatch.py` says who computes it, `_step.py` is Algorithm 1 on its blocks, and what is
kept is in `_state.py`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from microadam_optax import _checks, _decay, _dense, _tree
from microadam_optax._state import MicroAdamState, Settings

PAPER: dict[str, Any] = {
    "window": 10,
    "density": 0.01,
    "dense": None,
    "match_adam": False,
}
TRACED = {"weight_decay"}  # of the arguments that are given by name
_SMALL = _dense.smaller_than(4096)


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
    dense: Any | Callable[[Any, Any], bool] | None = _SMALL,
    match_adam: bool = True,
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
        nothing but path and shape (`smaller_than`, the default, or `matching`); a tree
        of bools like the parameters, or a prefix of it; or None for no leaves.
      match_adam: Whether parameters move about as fast as with Adam at the same rate.
        The moments are then divided by the weights of the steps that the window holds,
        where False divides by Adam's as the paper does, and the root of the second, to
        which `eps` is added, by a number that the window and the density determine: a
        coordinate has its turn once in ``1 / density`` steps. The state is the same.
      alpha: Share of the error, in [0, 1), that goes into the update at once
        instead of being carried on: for training from scratch. 0 is the paper's
        method.
      stochastic_rounding: Rounds the error's codes up or down at random, unbiased.
      seed: Seed of that randomness.
      implementation: ``"xla"``; ``"numba"`` or ``"pallas"``, the fused kernel of a CPU,
        or of a GPU or TPU; or None to choose: the kernel of a CPU where numba is
        installed, or of an NVIDIA GPU, else XLA, which never makes a program fail. All
        give the same state.

    Returns:
      A transformation whose state is a `MicroAdamState`. Updates have the shapes and
      dtypes of the gradients (float16, bfloat16, float32 or float64); if `update` gets
      the parameters too, the dtype that holds both, as from `optax.adam`: float32 where
      gradients are bfloat16 and parameters float32. The arithmetic is float32. Updates of
      dense leaves are optax's, in its arithmetic.

    Raises:
      TypeError: an argument of the wrong type, or an integer or complex leaf.
      ValueError: an argument out of range, or gradients that do not fit the state.
      NotImplementedError: an implementation that cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> import microadam_optax
      >>> tx = microadam_optax.scale_by_microadam(window=2, density=0.25)
      >>> params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
      >>> state = tx.init(params)
      >>> state.codes["w"].shape, state.indices["w"].shape, state.mu["b"].shape
      ((8, 1, 2, 128), (8, 1, 2, 64), (64,))
      >>> updates, state = tx.update({"w": jnp.ones((64, 64)), "b": jnp.ones(64)}, state)
      >>> int((updates["w"] != 0).sum()), int((updates["b"] != 0).sum())
      (1024, 64)

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
        match_adam=match_adam,
        implementation=implementation,
    )
    _checks.check_decays(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    _dense.check_function(dense)
    settings = Settings(
        window, density, block_size, error_bits, alpha, implementation, match_adam
    )
    decays = b1, b2, eps, eps_root
    options = _tree.Options(
        settings, decays, shards, grid, dense, stochastic_rounding, seed
    )

    def update_fn(
        updates: optax.Updates,
        state: MicroAdamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, MicroAdamState]:
        return _tree.update(options, updates, state, params)

    return optax.GradientTransformation(functools.partial(_tree.init, options), update_fn)


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
    dense: Any | Callable[[Any, Any], bool] | None = _SMALL,
    match_adam: bool = True,
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
    Adam has 8. Leaves of fewer than 4,096 elements keep Adam's own moments. The
    published setting is ``microadam(learning_rate, **PAPER)``.

    Args:
      learning_rate: A number or a schedule; may be traced.
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
        nothing but path and shape (`smaller_than`, the default, or `matching`); a tree
        of bools like the parameters, or a prefix of it; or None for no leaves.
      match_adam: Whether parameters move about as fast as with Adam at the same rate.
        The moments are then divided by the weights of the steps that the window holds,
        where False divides by Adam's as the paper does, and the root of the second, to
        which `eps` is added, by a number that the window and the density determine: a
        coordinate has its turn once in ``1 / density`` steps. The state is the same.
      alpha: Share of the error, in [0, 1), that goes into the update at once
        instead of being carried on: for training from scratch. 0 is the paper's
        method.
      stochastic_rounding: Rounds the error's codes up or down at random, unbiased.
      seed: Seed of that randomness.
      weight_decay: Decoupled weight decay, times the learning rate as in
        `optax.adamw`, whose default is 1e-4; may be traced. `update` needs the parameters
        unless it is 0.
      mask: Which leaves decay: a tree of bools, or a function that returns one.
      implementation: ``"xla"``; ``"numba"`` or ``"pallas"``, the fused kernel of a CPU,
        or of a GPU or TPU; or None to choose: the kernel of a CPU where numba is
        installed, or of an NVIDIA GPU, else XLA, which never makes a program fail. All
        give the same state.

    Returns:
      A chain of `scale_by_microadam`, weight decay and the learning rate; the
      `MicroAdamState` is the first part of its state. Updates have the shapes of the
      gradients, in the dtype that holds gradient and parameter, as from `optax.adam`.

    Raises:
      TypeError: an argument of the wrong type, or an integer or complex leaf.
      ValueError: an argument out of range, or gradients that do not fit the state.
      NotImplementedError: an implementation that cannot run.

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
    if not callable(learning_rate):
        expected = "a finite number or a schedule"
        _checks.check_scalar("learning_rate", learning_rate, expected)
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
            match_adam=match_adam,
            alpha=alpha,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            implementation=implementation,
        ),
        _decay.decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def static_args(make: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a transformation of this package that are not traced.

    For `optax.inject_hyperparams`, which takes all numbers for hyperparameters and all
    functions for schedules unless it is told otherwise.

    Args:
      make: `microadam` or `scale_by_microadam`, or a function with arguments of the
        same names.

    Returns:
      Names of arguments.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from microadam_optax import microadam, static_args
      >>> make = optax.inject_hyperparams(microadam, static_args=static_args(microadam))
      >>> state = make(learning_rate=0.1, window=1).init(jnp.zeros(3))
      >>> sorted(state.hyperparams)
      ['b1', 'b2', 'eps', 'eps_root', 'learning_rate', 'weight_decay']
    """
    ours = inspect.signature(microadam).parameters.values()
    static = {x.name for x in ours if x.kind == x.KEYWORD_ONLY} - TRACED
    return tuple(name for name in inspect.signature(make).parameters if name in static)
