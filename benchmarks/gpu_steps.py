"""Whole training steps of models of Llama's kind whose layers are stacked and scanned.

Each layer is rematerialized in the backward pass. `ordinary` is the step that everybody
writes; `by_layer` updates each layer in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from microadam_optax import layerwise
from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.sizes import MODELS as SIZES
from peak_memory import CONFIG, block, cross_entropy, normalized, of_layer

Params = dict[str, Any]
EMBEDDING = "embed/embedding"
LAYERS = "num_hidden_layers"
LARGER = CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    LAYERS: 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}
SMALLER = LARGER | {
    "hidden_size": 1280,
    "intermediate_size": 3456,
    LAYERS: 24,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
}
HEAD = 128  # the width of one, in all models


class Model(NamedTuple):
    """A model, and the tokens of a batch."""

    config: dict
    batch: int
    length: int


MODELS = {
    "1.7B": Model(LARGER, 4, 512),
    "0.5B": Model(SMALLER, 4, 512),
    "Llama-2-7B": Model(CONFIG | SIZES["llama2-7b"], 1, 2048),
}


def shapes(config: dict, dtype: Any) -> Params:
    """Of all layers stacked, and of the rest."""
    found = shapes_of(config | {LAYERS: 1})
    layer = of_layer(found, 0)
    rest = {name: shape for name, shape in found.items() if "layers/" not in name}
    stacked = {name: (config[LAYERS], *shape) for name, shape in layer.items()}
    return {
        kind: {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in of.items()}
        for kind, of in {"layers": stacked, "rest": rest}.items()
    }


def mean_loss(params: Params, tokens: jax.Array, head: int = HEAD) -> jax.Array:
    rest = params["rest"]
    one = jax.checkpoint(functools.partial(block, head=head))
    x = rest[EMBEDDING][tokens[:, :-1]]
    x, _ = jax.lax.scan(lambda x, layer: (one(x, layer), None), x, params["layers"])
    return head_loss(rest, x, tokens)


def head_loss(rest: dict[str, jax.Array], x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = normalized(x, rest["norm/scale"]) @ rest["head/kernel"]
    return cross_entropy(logits, tokens)


def ordinary(tx: Any, params: Params, state: Any, tokens: jax.Array) -> Any:
    loss, gradients = jax.value_and_grad(mean_loss)(params, tokens)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def by_layer(
    tx: Any,
    params: Params,
    state: Any,
    tokens: jax.Array,
    apply: Callable[..., Any] = optax.apply_updates,
    apply_rest: Callable[..., Any] = optax.apply_updates,
) -> Any:
    rest, state = params["rest"], dict(state)
    embedded, pull = jax.vjp(lambda table: table[tokens[:, :-1]], rest[EMBEDDING])
    y, backward = layerwise.vjp(
        lambda layer, x: block(x, layer, head=HEAD), params["layers"], embedded
    )
    of_head = jax.value_and_grad(head_loss, (0, 1))
    loss, (gradients, dy) = of_head(rest, y, tokens)
    dx, layers, state["layers"] = backward(dy, state["layers"], tx, apply)
    gradients |= {EMBEDDING: pull(dx)[0]}
    updates, state["rest"] = tx.update(gradients, state["rest"], rest)
    return {"layers": layers, "rest": apply_rest(rest, updates)}, state, loss


def init(tx: Any, params: Params, step: Any) -> Any:
    """The state that a step wants: layer by layer, each kind has its own."""
    if step is by_layer:
        return {kind: tx.init(own) for kind, own in params.items()}
    return tx.init(params)
