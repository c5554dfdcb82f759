"""NNX: a model with sharding metadata, trained on a mesh of all devices.

python examples/sharded_nnx.py                # 8 CPU devices, or all GPUs or TPUs

`nnx.Optimizer` gives each array of the state its parameter's metadata, and NNX shards it
by that. So every mesh axis has to divide the grid of its leaf: where the default grid is
too coarse, as for a kernel whose short last axis is sharded, `shard_grid` makes one of
the shards themselves.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from command_line import compiling
from microadam_optax import microadam, shard_grid

STEPS, BATCH, WIDTH = 60, 64, 64


def dense(inputs: int, outputs: int, *names: str | None, rngs: nnx.Rngs) -> nnx.Linear:
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    bias = nnx.with_partitioning(nnx.initializers.zeros_init(), names[1:])
    return nnx.Linear(inputs, outputs, kernel_init=kernel, bias_init=bias, rngs=rngs)


class MLP(nnx.Module):
    """Two layers, the hidden one cut over tp, all kernels over fsdp as well."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = dense(WIDTH, 16 * WIDTH, "fsdp", "tp", rngs=rngs)
        self.down = dense(16 * WIDTH, WIDTH, "tp", "fsdp", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def mean_loss(model: MLP, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((model(inputs) - targets) ** 2)


@nnx.jit
def step(model: MLP, optimizer: nnx.Optimizer, inputs, targets) -> jax.Array:
    loss, gradients = nnx.value_and_grad(mean_loss)(model, inputs, targets)
    optimizer.update(model, gradients)
    return loss


def train(steps: int = STEPS):
    """Fits a random linear map; returns model, optimizer and losses."""
    devices = jax.device_count()
    tp = 2 if devices % 2 == 0 else 1
    mesh = jax.make_mesh(
        (devices // tp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2
    )
    with jax.set_mesh(mesh):
        model = MLP(nnx.Rngs(0))  # sharded as it is made
        tx = microadam(1e-3, grid=shard_grid(nnx.state(model, nnx.Param)))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        inputs = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
        targets = inputs @ jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) / 8
        batch = jax.device_put((inputs, targets), NamedSharding(mesh, P("fsdp")))
        with compiling("the training step"):
            compiled = step.lower(model, optimizer, *batch).compile()
        losses = [
            float(compiled(model, optimizer, *batch))
            for _ in tqdm(range(steps), unit="step")
        ]
    return model, optimizer, losses


def main() -> int:
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", 8)
    model, optimizer, losses = train()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    state = nnx.state(optimizer).opt_state[0]
    for name, tree in (("parameters", nnx.state(model)), ("codes", state.codes)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            print(
                f"{name}{jax.tree_util.keystr(path)}: {leaf.shape} {leaf.sharding.spec}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
