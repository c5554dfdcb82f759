"""Linen: a model with partitioning metadata, trained on a mesh of all devices.

python examples/sharded_linen.py              # 8 CPU devices, or all GPUs or TPUs

`nn.with_partitioning` boxes say how parameters are sharded; `state_shardings` makes of
them the shardings of the optimizer state. (`nn.get_partition_spec` of the state itself
is right, too, as long as every mesh axis divides the grid of its leaf.)
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from command_line import compiling
from microadam_optax import microadam, state_shardings

STEPS, BATCH, WIDTH = 60, 64, 64


def dense(width: int, *names: str | None) -> nn.Dense:
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), names)
    bias = nn.with_partitioning(nn.initializers.zeros, names[1:])
    return nn.Dense(width, kernel_init=kernel, bias_init=bias)


class MLP(nn.Module):
    """Two layers, the hidden one cut over tp, all kernels over fsdp as well."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(dense(16 * WIDTH, "fsdp", "tp")(x))
        return dense(WIDTH, "tp", "fsdp")(x)


def train(steps: int = STEPS):
    """Fits a random linear map; returns parameters, optimizer state and losses."""
    devices = jax.device_count()
    tp = 2 if devices % 2 == 0 else 1
    mesh = jax.make_mesh(
        (devices // tp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2
    )
    key, model, tx = jax.random.key(0), MLP(), microadam(1e-3)
    inputs = jax.random.normal(key, (BATCH, WIDTH))
    targets = inputs @ jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) / 8

    def init(key):
        params = model.init(key, inputs)["params"]
        return params, tx.init(params)

    boxed, _ = jax.eval_shape(init, key)
    own = nn.get_sharding(boxed, mesh)
    places = own, state_shardings(tx, boxed, own)
    params, state = jax.jit(init, out_shardings=places)(key)

    def mean_loss(params, inputs, targets):
        return jnp.mean((model.apply({"params": params}, inputs) - targets) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*places, None))
    def step(params, state, inputs, targets):
        loss, gradients = jax.value_and_grad(mean_loss)(params, inputs, targets)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    rows = NamedSharding(mesh, P("fsdp"))
    batch = jax.device_put((inputs, targets), rows)
    with compiling("the training step"):
        compiled = step.lower(params, state, *batch).compile()
    losses = []
    for _ in tqdm(range(steps), unit="step"):
        params, state, loss = compiled(params, state, *batch)
        losses.append(float(loss))
    return params, state, losses


def main() -> int:
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", 8)
    params, state, losses = train()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    for name, tree in (("parameters", params), ("codes", state[0].codes)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            print(
                f"{name}{jax.tree_util.keystr(path)}: {leaf.shape} {leaf.sharding.spec}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
