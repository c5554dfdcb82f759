"""Memory of a whole training step: forward, backward and update, by XLA's account.

python benchmarks/peak_memory.py [--resident]

A small model of Llama's kind, compiled and not run, with MicroAdam and with optax.adamw,
plain and with gradients accumulated by `optax.MultiSteps`. Parameters and state are
donated; what counts is the peak: arguments, what outputs need beside them, temporaries.
With `--resident` instead what the system counts: the most memory that a process has held
that trains a model of 63M parameters for some steps.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common import SETTINGS, report
from microadam_optax import microadam
from microadam_optax.planner.models import shapes_of

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
LARGER = CONFIG | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
}
BATCH, LENGTH = 1, 128
RATE = 1e-3  # plays no part in what is held
Params = dict[str, jax.Array]


def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of heads ``(batch, length, heads, width)``."""
    half = x.shape[-1] // 2
    speeds = 1e4 ** -(jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * speeds
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def block(x: jax.Array, layer: Params, head: int) -> jax.Array:
    """A layer of a model, with heads of a width."""
    y = normalized(x, layer["attention_norm/scale"])
    q, k, v = (
        (y @ layer[f"attention/{part}/kernel"]).reshape(*y.shape[:2], -1, head)
        for part in ("query", "key", "value")
    )
    y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + y.reshape(x.shape) @ layer["attention/out/kernel"]
    y = normalized(x, layer["mlp_norm/scale"])
    y = jax.nn.silu(y @ layer["mlp/gate/kernel"]) * (y @ layer["mlp/up/kernel"])
    return x + y @ layer["mlp/down/kernel"]


def logits_of(params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed/embedding"][tokens]
    layers = sum(name.endswith("mlp_norm/scale") for name in params)
    for layer in range(layers):
        x = block(x, of_layer(params, layer), head=64)  # in both models
    return normalized(x, params["norm/scale"]) @ params["head/kernel"]


def of_layer(named: dict[str, Any], layer: int) -> dict[str, Any]:
    """What belongs to a layer, by its name in there."""
    lead = f"layers/{layer}/"
    return {name[len(lead) :]: x for name, x in named.items() if name.startswith(lead)}


def mean_loss(params: Params, tokens: jax.Array) -> jax.Array:
    return cross_entropy(logits_of(params, tokens[:, :-1]), tokens)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


def shapes(dtype: Any, config: dict = CONFIG) -> dict[str, jax.ShapeDtypeStruct]:
    found = shapes_of(config)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in found.items()}


def train_step(tx: optax.GradientTransformation) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss, gradients = jax.value_and_grad(mean_loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def step_bytes(tx: optax.GradientTransformation, dtype: Any) -> dict[str, int]:
    """XLA's account of the compiled step."""
    params = shapes(dtype)
    state = jax.eval_shape(tx.init, params)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    found = train_step(tx).lower(params, state, tokens).compile().memory_analysis()
    held = {
        "arguments": found.argument_size_in_bytes,
        "outputs_beside": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    return {**held, "peak": sum(held.values())}


def train(name: str, steps: int = 4) -> dict[str, Any]:
    """Trains in this process, which should have done nothing else."""
    tx, params = transformations()[name], {}
    for leaf, of in shapes(jnp.float32, LARGER).items():
        params[leaf] = jnp.full(of.shape, 0.02, of.dtype)
    number = sum(x.size for x in params.values())
    state, step = jax.jit(tx.init)(params), train_step(tx)
    tokens = jnp.arange(BATCH * (LENGTH + 1)).reshape(BATCH, -1)
    for _ in range(steps):
        params, state, loss = step(params, state, tokens)
        loss.block_until_ready()
    kilobyte = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    return {"optimizer": name, "parameters": number, "resident_bytes": peak}


def resident() -> list[dict[str, Any]]:
    """Each optimizer in a process of its own."""
    rows = []
    for name in list(transformations())[: 1 + len(SETTINGS)]:
        command = [sys.executable, __file__, "--train", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        each = rows[-1]["resident_bytes"] / rows[-1]["parameters"]
        print(f"{name}: {each:.2f} bytes a parameter", flush=True)
    return rows


def transformations() -> dict[str, optax.GradientTransformation]:
    plain = {"optax.adamw": optax.adamw(RATE)} | {
        f"MicroAdam {name}": microadam(RATE, weight_decay=1e-4, **kw)
        for name, kw in SETTINGS.items()
    }
    accumulated = {
        f"{name}, MultiSteps": optax.MultiSteps(tx, 4).gradient_transformation()
        for name, tx in plain.items()
    }
    return {**plain, **accumulated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resident", action="store_true", help="of whole processes")
    parser.add_argument("--train", metavar="NAME", help="train and print one row as JSON")
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(args.train)))
        return
    if args.resident:
        report("resident_memory", {"rows": resident()})
        return
    number = sum(leaf.size for leaf in shapes(jnp.float32).values())
    results: dict[str, Any] = {"config": CONFIG, "parameters": number, "rows": []}
    results |= {"batch": BATCH, "length": LENGTH}
    for dtype in ("float32", "bfloat16"):
        for name, tx in transformations().items():
            row = {"optimizer": name, "dtype": dtype, **step_bytes(tx, dtype)}
            results["rows"].append(row)
            each = {x: round(row[x] / number, 2) for x in list(row)[2:]}
            print(f"{dtype} {name}: bytes a parameter {each}", flush=True)
    report("peak_memory", results)


if __name__ == "__main__":
    main()
