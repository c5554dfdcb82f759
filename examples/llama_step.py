"""A training step of a Llama: the ordinary one, and one that goes layer by layer.

Parameters are a dict whose ``layers`` are stacked on axis 0; the optimizer's state is
kept for ``layers`` and for ``rest``, the others. Both steps give the same bits on a CPU,
compiled with `EXACT` in bfloat16, too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import llama
from llama_config import Config
from microadam_optax import apply_updates_stochastic, layerwise

Params = dict[str, Any]
EXACT = {"xla_allow_excess_precision": False}  # no rounding to bfloat16 is skipped


class Batch(NamedTuple):
    """Rows of tokens, and which of them count.

    Attributes:
      tokens: int32 ``(batch, length + 1)``; all but the last go in, all but the first are
        predicted.
      weights: float32 ``(batch, length)``, 1 where a prediction counts, else 0.
    """

    tokens: Any
    weights: Any


def parts(params: Params) -> dict[str, Params]:
    """The stacked layers, and the rest."""
    rest = {name: x for name, x in params.items() if name != "layers"}
    return {"layers": params["layers"], "rest": rest}


def init(tx: optax.GradientTransformation, params: Params) -> dict[str, Any]:
    """The optimizer's state."""
    return {part: tx.init(own) for part, own in parts(params).items()}


def hidden(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """What comes out of the last layer, ``(batch, length, hidden_size)``.

    Each layer is computed once more in a backward pass.
    """
    shared = of_positions(config, tokens.shape[1])
    one = jax.checkpoint(functools.partial(llama.block, config))
    x = llama.embed(params, tokens)
    x, _ = lax.scan(lambda x, layer: (one(layer, x, *shared), None), x, params["layers"])
    return x


def of_positions(config: Config, length: int) -> tuple[jax.Array, ...]:
    """What all layers share: the rotation's cosines and sines, and who sees whom."""
    return *llama.rotary(config, length), llama.causal_mask(config, length)


def summed_loss(config: Config, params: Params, x: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy in nats, summed over the tokens that count, from the last layer."""
    logits = llama.head_logits(config, params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return jnp.sum(losses * batch.weights)


def head_loss(config: Config, params: Params, x: jax.Array, batch: Batch) -> jax.Array:
    """Its mean."""
    total = summed_loss(config, params, x, batch)
    return total / jnp.maximum(jnp.sum(batch.weights), 1)


def mean_loss(config: Config, params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy in nats of a batch."""
    x = hidden(config, params, batch.tokens[:, :-1])
    return head_loss(config, params, x, batch)


def whole_loss(config: Config, params: Params, batch: Batch) -> jax.Array:
    """Cross-entropy in nats of a batch, summed over the tokens that count."""
    return summed_loss(
        config, params, hidden(config, params, batch.tokens[:, :-1]), batch
    )


def ordinary(
    config: Config,
    tx: optax.GradientTransformation,
    params: Params,
    state: dict[str, Any],
    batch: Batch,
    key: jax.Array,
) -> tuple[Params, dict[str, Any], jax.Array]:
    """All gradients, then all updates: new parameters, new state, and the loss before.

    bfloat16 parameters are rounded at random, by the key.
    """
    loss, gradients = jax.value_and_grad(mean_loss, 1)(config, params, batch)
    old, found = parts(params), parts(gradients)
    updates, state = _updates(tx, found, state, old)
    layers = _apply_layers(key, old["layers"], updates["layers"])
    rest = _apply_rest(key, old, updates["rest"])
    return {**rest, "layers": layers}, state, loss


def by_layer(
    config: Config,
    tx: optax.GradientTransformation,
    params: Params,
    state: dict[str, Any],
    batch: Batch,
    key: jax.Array,
) -> tuple[Params, dict[str, Any], jax.Array]:
    """The same, each layer updated as soon as its gradient is known."""
    old, inputs = parts(params), batch.tokens[:, :-1]
    rest = old["rest"]
    x, pull = jax.vjp(lambda table: llama.embed({"embed": table}, inputs), rest["embed"])
    y, backward = layerwise.vjp(
        functools.partial(llama.block, config),
        old["layers"],
        x,
        *of_positions(config, inputs.shape[1]),
    )
    used = rest if config.tied else {k: v for k, v in rest.items() if k != "embed"}
    loss, (gradients, dy) = jax.value_and_grad(head_loss, (1, 2))(config, used, y, batch)
    apply = functools.partial(_apply_layer, key)
    dx, layers, of_layers = backward(dy, state["layers"], tx, apply)
    (of_table,) = pull(dx)
    if config.tied:
        of_table += gradients["embed"]
    gradients |= {"embed": of_table}
    updates, of_rest = tx.update(gradients, state["rest"], rest)
    rest = _apply_rest(key, old, updates)
    return {**rest, "layers": layers}, {"layers": of_layers, "rest": of_rest}, loss


def _updates(tx: optax.GradientTransformation, gradients: Any, state: Any, params: Any):
    found = {
        part: tx.update(gradients[part], state[part], params[part]) for part in params
    }
    return tuple({part: x[i] for part, x in found.items()} for i in range(2))


def _apply_layer(key: jax.Array, layer: Params, updates: Params, number: jax.Array):
    """Of one layer, with an axis 0 of size 1."""
    return apply_updates_stochastic(layer, updates, jax.random.fold_in(key, number))


def _apply_layers(key: jax.Array, layers: Params, updates: Params) -> Params:
    """Layer after layer, in place, each with noise of its own."""

    def apply(number: jax.Array, layers: Params) -> Params:
        one, update = (
            jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number, 1), tree)
            for tree in (layers, updates)
        )
        new = _apply_layer(key, one, update, number)
        return jax.tree.map(
            lambda x, part: lax.dynamic_update_slice_in_dim(x, part, number, 0),
            layers,
            new,
        )

    if all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(layers)):
        return optax.apply_updates(layers, updates)
    return lax.fori_loop(0, _number(layers), apply, layers)


def _apply_rest(key: jax.Array, old: dict[str, Params], updates: Params) -> Params:
    number = _number(old["layers"])  # the first that is no layer's
    return apply_updates_stochastic(old["rest"], updates, jax.random.fold_in(key, number))


def _number(layers: Params) -> int:
    return jax.tree.leaves(layers)[0].shape[0]
