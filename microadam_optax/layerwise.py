"""Training layer by layer: the gradients of stacked layers never exist together.

A model's layers are stacked on axis 0 of their arrays. In the backward pass each layer is
updated as soon as its gradient is known, in place of the old one, from the last layer to
the first. Beside parameters and state there are the inputs of the layers, and gradients
and activations of one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from microadam_optax import _chunks, _specs, _state
from microadam_optax._paths import shown

Block = Callable[..., Any]


def vjp(block: Block, layers: Any, x: Any, *shared: Any) -> tuple[Any, "Backward"]:
    """Applies a block once for each of its stacked parameters.

    Args:
      block: a function ``(parameters of a layer, x, *shared)`` that returns an array, or
        a tree of arrays, like `x`.
      layers: a tree of arrays whose axis 0 counts the layers.
      x: what goes into the first layer.
      *shared: further arguments of all layers, such as positions or masks. They get no
        gradient.

    Returns:
      What comes out of the last layer, and the `Backward` pass, to be called in the same
      function that is jitted.

    Raises:
      ValueError: leaves of `layers` differ in axis 0, or have none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from microadam_optax import layerwise, microadam
      >>> def block(layer, x):
      ...     return x + jnp.tanh(x @ layer["w"])
      >>> @jax.jit
      ... def step(layers, state, x, target):
      ...     y, backward = layerwise.vjp(block, layers, x)
      ...     loss, dy = jax.value_and_grad(lambda y: jnp.mean((y - target) ** 2))(y)
      ...     _, layers, state = backward(dy, state, tx)
      ...     return layers, state, loss
      >>> tx = microadam(1e-2)
      >>> layers = {"w": jnp.zeros((4, 64, 64))}
      >>> state, x = tx.init(layers), jax.random.normal(jax.random.key(0), (32, 64))
      >>> losses = []
      >>> for _ in range(30):
      ...     layers, state, loss = step(layers, state, x, -x)
      ...     losses.append(float(loss))
      >>> losses[-1] < 0.5 * losses[0]
      True
    """
    _number(layers)

    def forward(x: Any, layer: Any) -> tuple[Any, Any]:
        return block(layer, x, *shared), x

    y, inputs = lax.scan(forward, x, layers)
    return y, Backward(block, layers, inputs, shared)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The way back through the layers, of `vjp`."""

    block: Block
    layers: Any
    inputs: Any  # of all layers, stacked
    shared: tuple[Any, ...]

    def __call__(
        self,
        dy: Any,
        state: optax.OptState,
        tx: optax.GradientTransformation,
        apply: Callable[..., Any] = optax.apply_updates,
    ) -> tuple[Any, Any, optax.OptState]:
        """Updates all layers, each in the moment in which its gradient is known.

        Args:
          dy: the gradient of what came out of the last layer.
          state: of ``tx.init(layers)``, as in ordinary training.
          tx: a transformation that treats every element, or every block of MicroAdam's,
            by itself. One that needs all gradients at once, such as
            `optax.clip_by_global_norm`, sees those of one layer; see `global_norm`.
          apply: ``(layer, updates)`` to the new layer, arrays with an axis 0 of size 1;
            a third argument gets the number of the layer, to make a key of.

        Returns:
          The gradient of what went into the first layer, the new layers, the new state.

        Raises:
          ValueError: an array of the state that belongs to a parameter is not cut by
            layers.
        """
        count = _number(self.layers)
        by_layer = _by_layer(tx, state, count)
        numbered = len(inspect.signature(apply).parameters) > 2

        def update(i: jax.Array, carry: Any) -> Any:
            number = count - 1 - i
            dy, layers, now = carry
            layer = _take(layers, number)
            gradients, dx = lax.optimization_barrier(self._pull(number, layer, dy))
            # What layers share steps once.
            old = jax.tree.map(
                lambda own, x, first: _part(x, number) if own else first,
                by_layer,
                now,
                state,
            )
            with _specs.of_layer(number):
                updates, new = tx.update(gradients, old, layer)
            layer = apply(layer, updates, number) if numbered else apply(layer, updates)
            # Else XLA keeps a copy of the whole state, to read from what is written over.
            layer, new = _chunks.fence((layer, new), always=number >= 0)
            now = jax.tree.map(
                lambda own, x, part: _put_part(x, number, part) if own else part,
                by_layer,
                now,
                new,
            )
            return dx, _put(layers, number, layer), now

        return lax.fori_loop(0, count, update, (dy, self.layers, state))

    def _pull(self, number: jax.Array, layer: Any, dy: Any) -> tuple[Any, Any]:
        """The gradients of a layer, with an axis 0, and of its input."""

        def block(layer: Any, x: Any) -> Any:
            return self.block(jax.tree.map(lambda p: p[0], layer), x, *self.shared)

        x = jax.tree.map(lambda a: a[0], _take(self.inputs, number))
        return jax.vjp(block, layer, x)[1](dy)


def global_norm(backward: Backward, dy: Any, *gradients: Any) -> jax.Array:
    """The norm of all gradients, by a backward pass that updates nothing.

    Gradients are linear in `dy`, so to clip by the norm, scale that: with
    ``scale = jnp.minimum(1, limit / layerwise.global_norm(backward, dy, others))`` call
    ``backward(scale * dy, state, tx)``, and scale the other gradients as well.

    Args:
      backward: of `vjp`.
      dy: the gradient of what came out of the last layer.
      *gradients: trees of further gradients, such as the head's.

    Returns:
      A float32 scalar.
    """
    count = _number(backward.layers)

    def add(i: jax.Array, carry: Any) -> Any:
        dy, total = carry
        number = count - 1 - i
        own, dx = backward._pull(number, _take(backward.layers, number), dy)
        return dx, total + _squares(own)

    dx, total = lax.fori_loop(0, count, add, (dy, jnp.float32(0)))
    del dx
    return jnp.sqrt(total + _squares(gradients))


def _squares(tree: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, jnp.float32(0))


def _number(layers: Any) -> int:
    """How many layers there are."""
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    if not leaves:
        raise ValueError("`layers` has no arrays.")
    first = next((jnp.shape(x)[0] for _, x in leaves if jnp.ndim(x)), 0)
    for path, x in leaves:
        if jnp.shape(x)[:1] != (first,):
            raise ValueError(
                f"Axis 0 of every leaf of `layers` must count the layers, {first} as in "
                f"the first leaf, but {shown(path)} has the shape {jnp.shape(x)}."
            )
    return first


def _by_layer(tx: optax.GradientTransformation, state: Any, count: int) -> Any:
    """For each array of the state, whether it belongs to a parameter."""
    kept = optax.tree.map_params(
        tx,
        lambda x: x if _state.is_masked(x) else True,
        state,
        transform_non_params=lambda x: jax.tree.map(lambda _: False, x),
        is_leaf=_state.is_masked,
    )
    arrays = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), own in zip(arrays, jax.tree.leaves(kept), strict=True):
        if own and jnp.shape(x)[:1] != (count,):
            raise ValueError(
                f"The optimizer state at {shown(path)} has the shape {jnp.shape(x)}, not "
                f"cut into {count} layers. Where a layer of a leaf is smaller than a "
                "block, name the leaf in `dense`, or give it a `grid` that begins with "
                "the number of layers."
            )
    return kept


def _take(tree: Any, number: jax.Array) -> Any:
    """One layer of every array, as an axis 0 of size 1."""
    return jax.tree.map(functools.partial(_part, number=number), tree)


def _put(tree: Any, number: jax.Array, layer: Any) -> Any:
    return jax.tree.map(lambda x, part: _put_part(x, number, part), tree, layer)


def _part(x: jax.Array, number: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, number, 1)


def _put_part(x: jax.Array, number: jax.Array, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, number, 0)
