"""Memory of a whole training step on an H200 that need not exist, by XLA's account.

    pip install jax-cuda13-plugin jax-cuda13-pjrt --no-deps
    pip install nvidia-cuda-nvcc
    python benchmarks/gpu_memory.py [--only TEXT]

Models of Llama's kind whose layers are stacked and scanned, each rematerialized in the
backward pass; forward, backward, update and `apply_updates` in one program that donates
parameters and state. "Layer by layer" updates each layer in the backward pass. Compiled,
not run. With `--only` just the rows whose line has that text; others stay as they were.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import kernels
from common import report
from gpu import with_float32_state
from microadam_optax import layerwise, microadam
from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.sizes import MODELS as SIZES
from peak_memory import CONFIG, block, cross_entropy, normalized, of_layer

RATE = 1e-3  # plays no part in what is held
EVERY = 4  # micro-batches of `optax.MultiSteps`
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
BY_LAYER = "MicroAdam, layer by layer"


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


def mean_loss(params: Params, tokens: jax.Array) -> jax.Array:
    rest = params["rest"]
    one = jax.checkpoint(functools.partial(block, head=HEAD))
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


def by_layer(tx: Any, params: Params, state: Any, tokens: jax.Array) -> Any:
    rest, state = params["rest"], dict(state)
    embedded, pull = jax.vjp(lambda table: table[tokens[:, :-1]], rest[EMBEDDING])
    y, backward = layerwise.vjp(
        lambda layer, x: block(x, layer, head=HEAD), params["layers"], embedded
    )
    of_head = jax.value_and_grad(head_loss, (0, 1))
    loss, (gradients, dy) = of_head(rest, y, tokens)
    dx, layers, state["layers"] = backward(dy, state["layers"], tx)
    gradients |= {EMBEDDING: pull(dx)[0]}
    updates, state["rest"] = tx.update(gradients, state["rest"], rest)
    return {"layers": layers, "rest": optax.apply_updates(rest, updates)}, state, loss


def transformations() -> dict[str, optax.GradientTransformation]:
    def ours(**settings: Any) -> optax.GradientTransformation:
        return microadam(RATE, weight_decay=1e-4, **settings)

    return {
        "optax.adamw": optax.adamw(RATE),
        "optax.adamw, float32 moments": with_float32_state(optax.adamw(RATE)),
        "optax.adafactor": optax.adafactor(RATE),
        "optax.lion": optax.lion(RATE),
        "optax.contrib.galore": optax.contrib.galore(RATE),
        "MicroAdam": ours(),
        "MicroAdam (1, 25 %)": ours(window=1, density=0.25),
        'MicroAdam, implementation="xla"': ours(implementation="xla"),
        BY_LAYER: ours(),
    }


def compile_step(device: Any, model: Model, dtype: Any, tx: Any, how: Callable) -> Any:
    """The donated step, compiled for a device."""
    whole = NamedSharding(
        jax.sharding.Mesh(np.array([device]), ("device",)), PartitionSpec()
    )
    step = jax.jit(
        functools.partial(how, tx),
        donate_argnums=(0, 1),
        in_shardings=whole,
        out_shardings=whole,
    )
    params = shapes(model.config, dtype)
    state = jax.eval_shape(tx.init, params)
    if how is by_layer:
        state = {kind: jax.eval_shape(tx.init, own) for kind, own in params.items()}
    tokens = jax.ShapeDtypeStruct((model.batch, model.length + 1), jnp.int32)
    return step.trace(params, state, tokens).lower().compile()


def account(compiled: Any, config: dict, dtype: Any) -> dict[str, float]:
    """Bytes a parameter, at the peak."""
    found, leaves = compiled.memory_analysis(), jax.tree.leaves(shapes(config, dtype))
    number = sum(x.size for x in leaves)
    held = {
        "parameters": sum(x.size * x.dtype.itemsize for x in leaves),
        "arguments": found.argument_size_in_bytes,
        "outputs_beside": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    peak = held["arguments"] + held["outputs_beside"] + held["temporary"]
    each = {name: x / number for name, x in (held | {"peak": peak}).items()}
    return {"number": number, **each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT")
    args = parser.parse_args()
    kernels.prepare(dump=False)
    made = topologies.get_topology_desc(
        "", "cuda", target_config=kernels.H200, topology="1x1x1"
    )
    path = pathlib.Path(__file__).parent / "results" / "gpu_memory.json"
    rows = {}
    if path.exists():
        rows = {row["line"]: row for row in json.loads(path.read_text())["rows"]}
    cases = itertools.product(
        MODELS, ("bfloat16", "float32"), transformations(), (1, EVERY)
    )
    for name, dtype, title, every in cases:
        if every > 1 and (title == BY_LAYER or name == "Llama-2-7B"):
            continue
        line = f"{name} {dtype} {title}" + ", MultiSteps" * (every > 1)
        if args.only in line:
            tx = transformations()[title]
            if every > 1:
                tx = optax.MultiSteps(tx, every).gradient_transformation()
            began = time.process_time()
            how = by_layer if title == BY_LAYER else ordinary
            compiled = compile_step(made.devices[0], MODELS[name], dtype, tx, how)
            spent = {"compile_cpu_seconds": time.process_time() - began}
            row = {"line": line, "model": name, "dtype": dtype, "optimizer": title}
            row |= {
                "every": every,
                **account(compiled, MODELS[name].config, dtype),
                **spent,
            }
            rows[line] = row
            print(f"{line}: {row['peak']:.2f} bytes a parameter", flush=True)
            report("gpu_memory", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
