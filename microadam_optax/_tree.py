"""MicroAdam over a tree of leaves: each is compressed, or dense as Adam keeps it."""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_optax import (
    _blocks,
    _dense,
    _dispatch,
    _fit,
    _leaf,
    _micro,
    _moments,
    _paths,
    _specs,
    _state,
    _step,
)
from microadam_optax._blocks import Layout
from microadam_optax._paths import shown
from microadam_optax._state import LeafState, MicroAdamState, Moments, Settings

States = list[LeafState | Moments]


class Options(NamedTuple):
    """What a transformation was made with."""

    settings: Settings
    decays: tuple[Any, Any, Any, Any]  # b1, b2, eps, eps_root; may be traced
    shards: int
    grid: Any
    dense: Any | Callable[[Any, Any], bool] | None
    stochastic_rounding: bool
    seed: int


def init(options: Options, params: optax.Params) -> MicroAdamState:
    """The state before the first step."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    choices = _dense.choose(options.dense, params)
    layouts = []
    for (path, leaf), is_dense, grid in zip(
        leaves, choices, _grids(options.grid, params), strict=True
    ):
        _check_leaf("Parameters", path, leaf, is_dense)
        layouts.append(_layout(options, path, leaf, is_dense, grid))
    prng = None
    if options.stochastic_rounding:
        prng = jax.random.key_data(jax.random.key(options.seed, impl=_step.PRNG))
    own = [x for (_, x), is_dense in zip(leaves, choices, strict=True) if is_dense]
    adam = optax.scale_by_adam(*options.decays).init(own)
    moments = map(Moments, adam.mu, adam.nu)
    states = [
        next(moments) if is_dense else _zeros(layout, options.settings, leaf)
        for (_, leaf), is_dense, layout in zip(leaves, choices, layouts, strict=True)
    ]
    slots = options.settings.window - 1
    ages = _moments.first_ages(slots) if slots else None
    shared = adam.count, ages, prng
    place = _specs.of_scalars([leaf for _, leaf in leaves])
    if place is not None:  # else the second step finds them elsewhere than the first
        shared = jax.device_put(shared, place)
    return _state.pack(*shared, states, tree, options.dense is not None)


def update(
    options: Options,
    gradients: optax.Updates,
    state: MicroAdamState,
    params: optax.Params | None,
) -> tuple[optax.Updates, MicroAdamState]:
    """One step of all leaves."""
    _state.check_structure(gradients, state)
    _state.check_key(state.key, bool(options.stochastic_rounding))
    if params is not None:
        _check_shapes(gradients, params)
    tree: Any
    leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
    old = _state.unpack(state, tree)
    layouts = _layouts(options, gradients, old, state.ages)
    count, micro = _micro.of(state)
    step = _first_step(options, state, count)._replace(micro=micro)
    new = _update_dense(options, [x for _, x in leaves], old, count)
    token = count
    for number, (gradient, kept, layout) in enumerate(
        zip(jax.tree.leaves(_promoted(gradients, params)), old, layouts, strict=True)
    ):
        if layout is None or isinstance(kept, Moments):
            continue
        own = step
        if step.prng is not None:
            own = step._replace(prng=jax.random.fold_in(step.prng, number))
        gradient = jnp.asarray(gradient)
        *new[number], token = _leaf.update(
            gradient, kept, own, token, layout=layout, settings=options.settings
        )
    ages = None if step.ages is None else _moments.older_ages(step.ages)
    results = [new[number] for number in range(len(leaves))]
    shared = _micro.counted(step.count, micro), ages, state.key
    packed = _state.pack(*shared, [x for _, x in results], tree, state.mu is not None)
    return tree.unflatten(x for x, _ in results), packed


def _layout(options: Options, path: Any, leaf: Any, is_dense: bool, grid: Any) -> Layout:
    """How a parameter lies in blocks, if a kernel that is named can update it."""
    shape, settings = jnp.shape(leaf), options.settings
    grid = _blocks.check_grid(path, shape, grid)
    layout = _blocks.layout_of(shape, settings.block_size, options.shards, grid)
    if not is_dense:
        _dispatch.check_kernel(path, jnp.result_type(leaf), layout, settings)
    return layout


def _zeros(layout: Layout, settings: Settings, leaf: Any) -> LeafState:
    zeros = _state.zeros(layout, settings, _specs.of(leaf))
    return _specs.vary(zeros, _specs.varying(leaf))


def _layouts(
    options: Options, gradients: Any, old: States, ages: Any
) -> list[Layout | None]:
    """How leaves lie in blocks, None if dense; ValueError if not as the state says."""
    choices = [isinstance(x, Moments) for x in old]
    if not _specs.are_parts():  # else what `dense` sees need not be a whole leaf
        choices = _dense.choose(options.dense, gradients)
    layouts = []
    for (path, gradient), state, is_dense in zip(
        jax.tree_util.tree_leaves_with_path(gradients), old, choices, strict=True
    ):
        _check_leaf("Gradients", path, gradient, is_dense)
        shape = jnp.shape(gradient)
        layout = _fit.check_state(path, shape, state, ages, options.settings, is_dense)
        if layout is not None:
            dtype = jnp.result_type(gradient)
            _dispatch.check_kernel(path, dtype, layout, options.settings)
        layouts.append(layout)
    return layouts


def _first_step(options: Options, state: MicroAdamState, count: Any) -> _step.Step:
    """The scalars of a step that all leaves share."""
    b1, b2, eps, eps_root = (jnp.asarray(x, jnp.float32) for x in options.decays)
    ages = None if state.ages is None else _moments.valid_ages(state.ages)
    prng = layer = None
    if state.key is not None:
        prng = jax.random.wrap_key_data(state.key, impl=_step.PRNG)
        prng, layer = jax.random.fold_in(prng, count), _specs.layer()
    scalars = optax.safe_increment(count), ages, b1, b2, eps, eps_root, prng
    return _step.Step(*scalars, layer=layer)


def _update_dense(
    options: Options, gradients: list[Any], old: States, count: jax.Array
) -> dict[int, Any]:
    """Update and state of each dense leaf, by its number."""
    dense = {i: x for i, x in enumerate(old) if isinstance(x, Moments)}
    if not dense:
        return {}
    mu, nu = ([getattr(x, name) for x in dense.values()] for name in ("mu", "nu"))
    before = optax.ScaleByAdamState(count, mu, nu)
    adam = optax.scale_by_adam(*options.decays)
    updates, after = adam.update([gradients[i] for i in dense], before)
    # optax lets them take the dtype of a wider gradient, and a scan then fails.
    after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, before)
    moments = map(Moments, after.mu, after.nu)
    return dict(zip(dense, zip(updates, moments, strict=True), strict=True))


def _promoted(gradients: Any, params: Any) -> Any:
    """Gradients in the dtype that holds a gradient and its parameter."""
    structures: list[Any] = [jax.tree.structure(x) for x in (gradients, params)]
    if structures[0] != structures[1]:
        return gradients  # no parameters, or not those of the gradients
    return jax.tree.map(_promote, gradients, params)


def _promote(gradient: Any, param: Any) -> Any:
    own, other = (getattr(x, "dtype", None) for x in (gradient, param))
    if own is None or other is None or own == other:
        return gradient
    floats = (jnp.issubdtype(x, jnp.floating) for x in (own, other))
    if not all(floats) or other.itemsize < own.itemsize:
        return gradient
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(gradient, jnp.promote_types(own, other))


def _grids(grid: Any, params: Any) -> list[Any]:
    """The grid asked for each leaf that is not masked; None for the default."""
    leaves = jax.tree.leaves(params, is_leaf=_state.is_masked)
    asked: list[Any] = [None] * len(leaves)
    if grid is not None and leaves:
        asked = _per_leaf(grid, params)
    pairs = zip(asked, leaves, strict=True)
    return [x for x, leaf in pairs if not _state.is_masked(leaf)]


def _per_leaf(grid: Any, params: Any) -> list[Any]:
    """What `grid` has for each leaf; ValueError if it is not a tree like `params`."""
    tree: Any = jax.tree.structure(params, is_leaf=_state.is_masked)
    try:
        return tree.flatten_up_to(grid)
    except ValueError as error:
        known = _paths.of(params, _state.is_masked)
        given = _paths.of(grid, lambda x: x is None or _blocks.is_grid(x))
        missing = [shown(path) for path in known if path not in given]
        extra = [shown(path) for path in given if path not in known]
        difference = "the containers differ in type"
        if missing:
            difference = f"it has nothing for {missing[0]}"
        elif extra:
            difference = f"the parameters have no {extra[0]}"
        raise ValueError(
            f"`grid` must be a tree like the parameters, but {difference}."
        ) from error


def _check_leaf(what: str, path: Any, leaf: Any, is_dense: bool) -> None:
    """Raises TypeError if a leaf is no real floating-point array; a dense one any."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
        kind = type(leaf).__name__
    else:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact if is_dense else jnp.floating):
            return
        kind = dtype.name
    raise TypeError(
        f"{what} must be real floating-point arrays, but {shown(path)} is {kind}; "
        "leave such leaves to another transformation with optax.masked."
    )


def _check_shapes(gradients: Any, params: Any) -> None:
    """Raises ValueError if a gradient is transposed or so: it may fit the state, too."""
    shapes = {p: jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        given = jnp.shape(gradient)
        known = shapes.get(path, given)
        if given != known and math.prod(given) == math.prod(known):
            raise ValueError(
                f"The gradient of {shown(path)} has the shape {given}, but its "
                f"parameter {known}."
            )
