"""Memory of a whole training step on an H200 that need not exist, by XLA's account.

    pip install jax-cuda13-plugin jax-cuda13-pjrt --no-deps
    pip install nvidia-cuda-nvcc
    python benchmarks/gpu_memory.py [--only TEXT]

Models of Llama's kind whose layers are stacked and scanned, each rematerialized in the
backward pass; forward, backward, update and `apply_updates` in one program that donates
parameters and state. Compiled, not run. With `--only` just the rows whose line has that
text; others stay as they were.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

import kernels
from common import report
from gpu import with_float32_state
from microadam_optax import microadam
from peak_memory import normalized, rotated

RATE = 1e-3  # plays no part in what is held
EVERY = 4  # micro-batches of `optax.MultiSteps`
Params = dict[str, Any]


class Model(NamedTuple):
    """Sizes of a model and of a batch."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int = 32000
    batch: int = 4
    length: int = 512


MODELS = {
    "1.7B": Model(32, 2048, 5504, 16),
    "0.5B": Model(24, 1280, 3456, 10),
}


def shapes(model: Model, dtype: Any) -> Params:
    width, hidden = model.width, model.hidden
    layer = {
        "attention_norm": (width,),
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    stacked = {name: (model.layers, *shape) for name, shape in layer.items()}
    rest = {
        "embedding": (model.vocabulary, width),
        "norm": (width,),
        "head": (width, model.vocabulary),
    }
    return {
        kind: {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in of.items()}
        for kind, of in {"layers": stacked, "rest": rest}.items()
    }


def block(model: Model, x: jax.Array, layer: Params) -> jax.Array:
    y = normalized(x, layer["attention_norm"])
    heads = (*y.shape[:2], model.heads, -1)
    q, k, v = ((y @ layer[name]).reshape(heads) for name in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + y.reshape(x.shape) @ layer["out"]
    y = normalized(x, layer["mlp_norm"])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]


def mean_loss(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    rest = params["rest"]
    one = jax.checkpoint(functools.partial(block, model))
    x = rest["embedding"][tokens[:, :-1]]
    x, _ = jax.lax.scan(lambda x, layer: (one(x, layer), None), x, params["layers"])
    logits = (normalized(x, rest["norm"]) @ rest["head"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


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
    }


def compile_step(device: Any, model: Model, dtype: Any, tx: Any) -> Any:
    """The donated step, compiled for a device."""
    whole = NamedSharding(
        jax.sharding.Mesh(np.array([device]), ("device",)), PartitionSpec()
    )

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), in_shardings=whole, out_shardings=whole
    )
    def step(params, state, tokens):
        loss, gradients = jax.value_and_grad(functools.partial(mean_loss, model))(
            params, tokens
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = shapes(model, dtype)
    state = jax.eval_shape(tx.init, params)
    tokens = jax.ShapeDtypeStruct((model.batch, model.length + 1), jnp.int32)
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((), (), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        return step.trace(params, state, tokens).lower().compile()


def account(compiled: Any, model: Model, dtype: Any) -> dict[str, float]:
    """Bytes a parameter, at the peak."""
    found, leaves = compiled.memory_analysis(), jax.tree.leaves(shapes(model, dtype))
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
        line = f"{name} {dtype} {title}" + ", MultiSteps" * (every > 1)
        if args.only in line:
            tx = transformations()[title]
            if every > 1:
                tx = optax.MultiSteps(tx, every).gradient_transformation()
            began = time.process_time()
            compiled = compile_step(made.devices[0], MODELS[name], dtype, tx)
            spent = {"compile_cpu_seconds": time.process_time() - began}
            row = {"line": line, "model": name, "dtype": dtype, "optimizer": title}
            row |= {"every": every, **account(compiled, MODELS[name], dtype), **spent}
            rows[line] = row
            print(f"{line}: {row['peak']:.2f} bytes a parameter", flush=True)
            report("gpu_memory", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
