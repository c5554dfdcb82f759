"""What an update sends, and holds, on a mesh; weak scaling; a 70B model on 256 devices.

    python benchmarks/sharding.py

Compiles for 8 and for 256 CPU devices and reads XLA's programs and accounts: nothing
is allocated and nothing is timed.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from common import SETTINGS, report
from microadam_optax import PAPER, _chunks, microadam, shard_grid, state_shardings
from microadam_optax.memory import array_bytes, optimizer_bytes

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import meshes

OPTIMIZERS = {
    "MicroAdam": microadam(1e-3, **PAPER),
    "AdamW": optax.adamw(1e-3),
    "Adafactor": optax.adafactor(1e-3),
}
UNALIGNED = {  # shape, spec, devices
    "head_dim": ((4096, 32, 128), P(None, None, "tp"), 8),
    "columns, more devices than `shards`": ((4096, 4096), P(None, "tp"), 16),
    "columns, three devices": ((4096, 1536), P(None, "tp"), 3),
    "a small bias": ((256,), P("tp"), 8),
}
LARGE = {"fsdp": 32, "tp": 8}
CUTS = 32  # `shards` there: what the cut axis of any leaf is sharded over


def llama2_70b() -> dict[str, tuple[tuple[int, ...], P, int]]:
    """Shape, spec and number of the parameters of Llama-2-70B, 68,976,648,192 in all."""
    layers = {
        "query": ((8192, 64, 128), P("fsdp", "tp", None)),
        "key": ((8192, 8, 128), P("fsdp", "tp", None)),
        "value": ((8192, 8, 128), P("fsdp", "tp", None)),
        "out": ((64, 128, 8192), P("tp", None, "fsdp")),
        "gate": ((8192, 28672), P("fsdp", "tp")),
        "up": ((8192, 28672), P("fsdp", "tp")),
        "down": ((28672, 8192), P("tp", "fsdp")),
        "norm_attention": ((8192,), P()),
        "norm_mlp": ((8192,), P()),
    }
    once = {
        "embed": ((32000, 8192), P("tp", "fsdp")),
        "norm": ((8192,), P()),
        "head": ((8192, 32000), P("fsdp", "tp")),
    }
    return {name: (*leaf, 80) for name, leaf in layers.items()} | {
        name: (*leaf, 1) for name, leaf in once.items()
    }


def leaves_70b(mesh, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """All 723 leaves."""
    return {
        f"{i}.{name}": jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, spec)
        )
        for name, (shape, spec, number) in llama2_70b().items()
        for i in range(number)
    }


def state_bytes(tx: optax.GradientTransformation, leaves) -> int:
    """Of the state on each device."""
    return optimizer_bytes(tx, leaves, meshes.shardings_of(leaves))


def compile_update(tx: optax.GradientTransformation, leaves) -> jax.stages.Compiled:
    """The donated update of leaves given as shapes with shardings."""
    places = state_shardings(tx, leaves)
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(tx.init, leaves),
        places,
    )
    out = meshes.shardings_of(leaves), places
    update = jax.jit(tx.update, donate_argnums=(0, 1), out_shardings=out)
    with jax.set_mesh(jax.tree.leaves(leaves)[0].sharding.mesh):
        return update.lower(leaves, state, leaves).compile()


def measure_one(tx: optax.GradientTransformation, leaves) -> dict:
    compiled = compile_update(tx, leaves)
    return {
        "collectives": meshes.collectives(compiled),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": state_bytes(tx, leaves),
    }


def measure(leaves) -> dict[str, dict]:
    """Every optimizer on the same leaves."""
    return {name: measure_one(tx, leaves) for name, tx in OPTIMIZERS.items()}


def all_cases() -> list[dict]:
    rows = []
    for name in tqdm(meshes.MESHES, unit="mesh"):
        mesh = meshes.make_mesh(name)
        for case, (shape, _, spec) in meshes.cases_on(name).items():
            at = NamedSharding(mesh, spec)
            leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
            row = {"mesh": name, "case": case, "shape": shape, "spec": str(spec)}
            rows.append(row | {"optimizers": measure({"w": leaf})})
    return rows


def unaligned_cases() -> list[dict]:
    """Shards that are no whole cells of the default grid, and a grid of the shards."""
    rows = []
    for case, (shape, spec, devices) in UNALIGNED.items():
        mesh = jax.make_mesh(
            (devices,), ("tp",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        at = NamedSharding(mesh, spec)
        leaf = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)}
        row = {"case": case, "shape": shape, "spec": str(spec), "devices": devices}
        for name, grid in (("default", None), ("shard_grid", shard_grid(leaf))):
            row[name] = measure_one(microadam(1e-3, grid=grid, **PAPER), leaf)
        rows.append(row)
    return rows


def weak_scaling() -> list[dict]:
    """512 rows of 4096 on each device: its work by XLA's account.

    The leaf is taken whole, since the account counts a loop's body once.
    """
    rows, elements = [], _chunks.ELEMENTS
    _chunks.ELEMENTS = 2**40
    jax.clear_caches()  # of updates traced in chunks
    for devices in (1, 2, 4, 8):
        mesh = jax.make_mesh(
            (devices,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        leaf = jax.ShapeDtypeStruct(
            (512 * devices, 4096), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
        )
        row = {"devices": devices}
        for name, tx in OPTIMIZERS.items():
            cost = compile_update(tx, {"w": leaf}).cost_analysis()
            row[name] = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
        rows.append(row)
    _chunks.ELEMENTS = elements
    jax.clear_caches()
    return rows


def plan_70b() -> dict:
    """Bytes on each of 256 devices, from shapes and an abstract mesh alone."""
    mesh = AbstractMesh(tuple(LARGE.values()), tuple(LARGE))
    txs = {"AdamW": OPTIMIZERS["AdamW"], "Adafactor": OPTIMIZERS["Adafactor"]} | {
        f"MicroAdam {name}": microadam(1e-3, shards=CUTS, **kw)
        for name, kw in SETTINGS.items()
    }
    leaves = leaves_70b(mesh, jnp.bfloat16)
    moments = leaves_70b(mesh, jnp.float32)  # AdamW's have the dtype of the leaves
    return {
        "mesh": LARGE,
        "shards": CUTS,
        "parameters": sum(x.size for x in leaves.values()),
        "parameter_bytes": array_bytes(leaves, meshes.shardings_of(leaves)),
        "state_bytes": {
            name: state_bytes(tx, moments if name == "AdamW" else leaves)
            for name, tx in txs.items()
        },
    }


def layer_70b() -> dict:
    """One layer, embedding and head compiled for 256 devices: what is sent."""
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(tuple(LARGE.values()), tuple(LARGE), axes)
    leaves = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for name, (shape, spec, _) in llama2_70b().items()
    }
    found = {}
    for shards in (8, CUTS):
        found[str(shards)] = measure_one(microadam(1e-3, shards=shards, **PAPER), leaves)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    jax.config.update("jax_num_cpu_devices", 256)
    results = {
        "cases": all_cases(),
        "unaligned": unaligned_cases(),
        "weak_scaling": weak_scaling(),
        "plan_70b": plan_70b(),
        "layer_70b": layer_70b(),
    }
    for row in results["cases"]:
        sent = {k: v["collectives"] for k, v in row["optimizers"].items()}
        print(row["mesh"], row["case"], row["shape"], row["spec"], sent)
    for name in ("unaligned", "weak_scaling", "plan_70b", "layer_70b"):
        print(results[name])
    report("sharding", results)


if __name__ == "__main__":
    main()
