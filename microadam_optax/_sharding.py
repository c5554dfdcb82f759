"""Shardings and grids for a whole tree, from those of the parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from microadam_optax import _specs, _state
from microadam_optax._paths import shown


def state_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any = None
) -> Any:
    """Shardings for the state of any optax transformation that may contain MicroAdam.

    An array of the state whose axes lead with the parameter's, as Adam's moments and
    all of MicroAdam's arrays do, is sharded like the parameter, less the mesh axes
    that do not divide it; every other one is replicated.

    Args:
      tx: the transformation. Only shapes are computed, nothing is allocated.
      params: the parameters or their shapes, anything with ``shape`` and ``dtype``.
      shardings: a tree of `jax.sharding.Sharding` like `params`, or a prefix of it
        as in `jax.jit`; PartitionSpecs stand for the mesh of `jax.set_mesh`. None for
        those of `params` themselves. Others than the parameters' own are as good: to
        shard the state of replicated parameters, for example.

    Returns:
      A tree of shardings like ``tx.init(params)``, for ``out_shardings`` of its jit,
      and to restore a checkpoint.

    Raises:
      ValueError: no sharding is known for a parameter, or `shardings` is not a
        prefix of `params`.
      TypeError: a leaf of `shardings` is not a sharding.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from microadam_optax import microadam, state_shardings
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
      >>> tx = microadam(1e-3)
      >>> places = state_shardings(tx, params, NamedSharding(mesh, P("fsdp")))
      >>> places[0].codes["w"].spec, places[0].count.spec
      (P('fsdp',), P())
    """
    leaves = _placed(params, shardings)
    first = next(iter(jax.tree.leaves(leaves)), None)
    if first is None:
        raise ValueError("`params` has no arrays, so there is nothing to shard.")

    replicated = _specs.follow(first.sharding, ())
    return optax.tree.map_params(
        tx,
        functools.partial(_like_param, replicated),
        jax.eval_shape(tx.init, params),
        leaves,
        transform_non_params=lambda _: replicated,
        is_leaf=_state.is_masked,
    )


def shard_grid(params: Any, shardings: Any = None) -> Any:
    """A ``grid`` for `microadam` whose cells are the shards of the parameters.

    For leaves that the default grid does not fit, such as a last axis sharded over 16
    devices or tensor parallelism of 3. The blocks, and with them a checkpoint, then
    depend on these shardings.

    Args:
      params: see `state_shardings`.
      shardings: see `state_shardings`.

    Returns:
      A tree like `params` with a tuple for each leaf.

    Raises:
      ValueError: see `state_shardings`; or a leaf does not divide into equal shards.
      TypeError: see `state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from microadam_optax import microadam, shard_grid
      >>> mesh = jax.make_mesh((1,), ("tp",))
      >>> params = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
      >>> places = {"w": NamedSharding(mesh, P(None, "tp"))}
      >>> tx = microadam(1e-3, grid=shard_grid(params, places))
      >>> shard_grid(params, places)
      {'w': (1, 1)}
    """
    return jax.tree.map(_shards, _placed(params, shardings))


def _like_param(replicated: Sharding, array: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    """The leaf's sharding for an array of the state whose axes lead with the leaf's."""
    if _state.is_masked(array):
        return array
    leads = len(array.shape) >= len(leaf.shape) and all(
        n == size or (n and size % n == 0)
        for size, n in zip(leaf.shape, array.shape, strict=False)
    )
    return _specs.follow(leaf.sharding, array.shape) if leads else replicated


def _shards(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Over how many devices each axis is cut."""
    sizes = leaf.sharding.shard_shape(leaf.shape)
    return tuple(n // max(1, m) for n, m in zip(leaf.shape, sizes, strict=True))


def _placed(params: Any, shardings: Any) -> Any:
    """The shapes of the parameters with their shardings."""
    tree: Any
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    if shardings is None:
        found = [getattr(leaf, "sharding", None) for _, leaf in leaves]
    else:
        try:
            found = tree.flatten_up_to(jax.tree.broadcast(shardings, params))
        except ValueError as error:
            raise ValueError(
                f"`shardings` must be a tree like `params`, or a prefix of it: {error}"
            ) from error
    placed = []
    for (path, leaf), sharding in zip(leaves, found, strict=True):
        sharding = _check_sharding(path, _on_mesh(sharding))
        shape = jnp.shape(leaf)
        placed.append(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding))
    return tree.unflatten(placed)


def _check_sharding(path: Any, sharding: Any) -> Sharding:
    """A parameter's sharding; an error if it is none."""
    if sharding is None:
        raise ValueError(
            f"`shardings` has none for {shown(path)}, nor has the parameter itself."
        )
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"`shardings` of {shown(path)} must be a jax.sharding.Sharding, or a "
            f"PartitionSpec under jax.set_mesh, got {sharding!r}."
        )
    return sharding


def _on_mesh(sharding: Any) -> Any:
    """A PartitionSpec on the mesh of `jax.set_mesh`, if there is one."""
    mesh = jax.sharding.get_mesh()
    if isinstance(sharding, PartitionSpec) and not mesh.empty:
        return NamedSharding(mesh, sharding)
    return sharding
