"""Is a step layer by layer the ordinary one, in every bit, on the device that is here?

    python benchmarks/same_bits.py [--steps 5]

A small model of Llama's kind, parameters in bfloat16 and float32, rounded as by optax and
at random. First gradients are compared, then parameters and state after some steps.
Where a compiler gives other bits to a gradient, no bound on parameters follows: MicroAdam
may select another entry. So nothing but equality passes.

For rounding at random XLA must not skip the rounding of an update to bfloat16, which it
does by default where it fuses the update with what adds it: programs would differ there.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpu_steps import LARGER, LAYERS, by_layer, init, mean_loss, shapes
from microadam_optax import apply_updates_stochastic, microadam

CONFIG = LARGER | {
    "hidden_size": 256,
    "intermediate_size": 704,
    LAYERS: 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
BATCH = (2, 33)
OPTIMIZERS = {
    "gradients": optax.sgd(1.0),
    "MicroAdam": microadam(1e-3, weight_decay=1e-2),
    "MicroAdam (1, 25 %)": microadam(1e-3, window=1, density=0.25),
    "optax.adamw": optax.adamw(1e-3),
}
EXACT = {"xla_allow_excess_precision": False}
Step = Callable[..., Any]


def parameters(dtype: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda of: jnp.asarray(rng.normal(0, 0.05, of.shape), dtype),
        shapes(CONFIG, dtype),
    )


def tokens(step: int) -> jax.Array:
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.integers(0, CONFIG["vocab_size"], BATCH), jnp.int32)


def at_random(key: jax.Array, layer: Any, updates: Any, number: Any) -> Any:
    """A layer with noise of its own."""
    return apply_updates_stochastic(layer, updates, jax.random.fold_in(key, number))


def layer_of(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number : number + 1], tree)


def ordinary(tx: Any, key: jax.Array | None, params: Any, state: Any, batch: Any) -> Any:
    """All gradients first; state for each kind and noise for each layer as by layers."""
    loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
    found = {
        kind: tx.update(gradients[kind], state[kind], params[kind]) for kind in params
    }
    updates, state = ({kind: x[i] for kind, x in found.items()} for i in (0, 1))
    if key is None:
        return optax.apply_updates(params, updates), state, loss
    layers = [
        at_random(key, layer_of(params["layers"], i), layer_of(updates["layers"], i), i)
        for i in range(CONFIG[LAYERS])
    ]
    rest = at_random(key, params["rest"], updates["rest"], CONFIG[LAYERS])
    stacked = jax.tree.map(lambda *x: jnp.concatenate(x), *layers)
    return {"layers": stacked, "rest": rest}, state, loss


def by_layers(tx: Any, key: jax.Array | None, params: Any, state: Any, batch: Any) -> Any:
    if key is None:
        return by_layer(tx, params, state, batch)
    of_layer = functools.partial(at_random, key)
    return by_layer(
        tx, params, state, batch, of_layer, lambda p, u: of_layer(p, u, CONFIG[LAYERS])
    )


def trained(step: Step, tx: Any, dtype: Any, random: bool, steps: int) -> Any:
    """Parameters, state and loss after some steps."""
    params, loss = parameters(dtype), None
    state = init(tx, params, by_layer)
    jitted = jax.jit(
        functools.partial(step, tx),
        donate_argnums=(1, 2),
        compiler_options=EXACT if random else None,
    )
    for i in range(steps):
        key = jax.random.key(i) if random else None
        params, state, loss = jitted(key, params, state, tokens(i))
    return params, state, loss


def different(one: Any, other: Any) -> dict[str, int]:
    """How many entries differ, of each leaf that has such."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    )
    counts = {
        jax.tree_util.keystr(path): int(jnp.sum((x != y) & ~((x != x) & (y != y))))
        for (path, x), y in pairs
    }
    return {name: count for name, count in counts.items() if count}


def compare(name: str, dtype: Any, random: bool, steps: int) -> dict[str, int]:
    """What differs between both ways with an optimizer."""
    tx, steps = OPTIMIZERS[name], 1 if name == "gradients" else steps
    one, other = (
        trained(step, tx, dtype, random, steps) for step in (ordinary, by_layers)
    )
    return different(one, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    failed = False
    for dtype in ("bfloat16", "float32"):
        for random in (False, True)[: 2 if dtype == "bfloat16" else 1]:
            for name in OPTIMIZERS:
                found = compare(name, dtype, random, args.steps)
                failed |= bool(found)
                rounded = ", rounded at random" if random else ""
                what = f"different entries {found}" if found else "equal in all bits"
                print(f"{dtype}{rounded}, {name}: {what}", flush=True)
    sys.exit("not equal in all bits" if failed else None)


if __name__ == "__main__":
    main()
