"""Trains the language model of train_lm.py in several processes, with checkpoints.

python examples/train_sharded.py                      # 2 processes x 4 CPU devices, FSDP
python examples/train_sharded.py --parallel data      # everything on every device
python examples/train_sharded.py --parallel zero      # parameters there, state cut
python examples/train_sharded.py --checkpoints ckpt   # saves, and goes on from there

One command starts all processes; on a cluster, start it on each host with
--processes 1 --hosts N --host I --coordinator ADDRESS:PORT.
"""

import argparse
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import language_model
import train_lm
from checkpointing import readable
from command_line import Parser, check_file, check_folder, compiling, positive
from cpu_devices import use_cpu_devices
from microadam_optax import check_checkpoint, state_shardings


def shardings(params, mesh: jax.sharding.Mesh, cut: bool):
    """Rows of matrices over all devices, or everything on each of them."""

    def place(leaf) -> NamedSharding:
        rows = cut and leaf.ndim > 1 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, P(*mesh.axis_names) if rows else P())

    return jax.tree.map(place, params)


def batch_at(step: int, text: np.ndarray, args, sharding: NamedSharding) -> jax.Array:
    """The same random sequences at a step in every run, however many processes."""
    rng = np.random.default_rng((args.seed, step))
    starts = rng.integers(0, len(text) - args.length, size=(args.batch, 1))
    rows = text[starts + np.arange(args.length + 1)].astype(np.int32)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def make_step(graph, tx: optax.GradientTransformation, places):
    """As in train_lm.py, with parameters and state pinned to their shardings."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*places, None))
    def step(params, opt_state, text):
        value_and_grad = jax.value_and_grad(language_model.mean_loss, argnums=1)
        loss, gradients = value_and_grad(graph, params, text)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def abstract(tree, shardings):
    """Shapes with shardings: where a checkpoint is to be restored."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings,
    )


def open_checkpoints(args: argparse.Namespace) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        args.checkpoints.absolute(),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=args.save_every, max_to_keep=3
        ),
    )


def restore(manager: ocp.CheckpointManager, tx, params, places):
    """The latest checkpoint, for whatever mesh it was saved; None if there is none."""
    last = manager.latest_step()
    if last is None:
        return None
    like = abstract((params, jax.eval_shape(tx.init, params)), places)
    target = {"params": like[0], "opt_state": like[1]}
    with readable(manager, last):
        saved = manager.item_metadata(last)
    if set(saved or ()) != set(target):
        raise ValueError(f"{manager.directory / str(last)} was not saved by this script")
    check_checkpoint(saved["opt_state"], tx, params)
    with readable(manager, last):
        found = manager.restore(last, args=ocp.args.StandardRestore(target))
    return last, (found["params"], found["opt_state"])


def make_model(args: argparse.Namespace) -> language_model.LanguageModel:
    rngs = nnx.Rngs(args.seed)
    return language_model.LanguageModel(
        args.length, args.width, args.depth, args.heads, rngs
    )


def start(args: argparse.Namespace, mesh: jax.sharding.Mesh, manager):
    """The jitted step, steps done, parameters and state: restored, or new."""
    abstract_model = nnx.eval_shape(lambda: make_model(args))
    graph, shapes = nnx.split(abstract_model, nnx.Param)
    tx = train_lm.make_optimizer(args)
    own = shardings(shapes, mesh, cut=args.parallel == "fsdp")
    state = shardings(shapes, mesh, cut=args.parallel != "data")
    places = own, state_shardings(tx, shapes, state)

    @functools.partial(jax.jit, out_shardings=places)
    def init():
        params = nnx.split(make_model(args), nnx.Param)[1]
        return params, tx.init(params)

    found = restore(manager, tx, shapes, places) if manager else None
    done, made = found or (0, init())
    return make_step(graph, tx, places), done, *made


def train(args: argparse.Namespace, text: np.ndarray) -> dict[str, list]:
    """Trains from the last checkpoint, if there is one; returns the loss curve."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("devices",), (jax.sharding.AxisType.Auto,))
    train_text, _ = train_lm.split_text(text, args.length)
    manager = open_checkpoints(args) if args.checkpoints else None
    step, done, params, opt_state = start(args, mesh, manager)
    rows = NamedSharding(mesh, P("devices"))
    chief = jax.process_index() == 0
    quiet = args.quiet or not chief
    if done >= args.steps:
        manager.close()
        if chief:
            print(f"already at step {done} of {args.steps}; nothing to do")
        return {"loss": []}
    if not quiet:
        leaves = jax.tree.leaves(opt_state)
        held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        print(
            f"{jax.process_count()} processes, {devices} devices, {args.parallel}; "
            f"optimizer state {held:,} bytes a device; from step {done}",
            flush=True,
        )
    batch = batch_at(done + 1, train_text, args, rows)
    with compiling("the training step", quiet):
        step = step.lower(params, opt_state, batch).compile()
        # Gloo gives up where a process comes half a minute late to the first collective.
        everybody = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes("compiled", processes=everybody)
    curve: list[tuple[int, float]] = []
    with tqdm(total=args.steps, initial=done, unit="step", disable=quiet) as bar:
        for number in range(done + 1, args.steps + 1):
            batch = batch_at(number, train_text, args, rows)
            params, opt_state, loss = step(params, opt_state, batch)
            curve.append((number, float(loss)))
            if manager:
                state = {"params": params, "opt_state": opt_state}
                saved, last = ocp.args.StandardSave(state), number == args.steps
                manager.save(number, args=saved, force=last)
            bar.set_postfix_str(f"loss {curve[-1][1]:.3f}")
            bar.update()
    if manager:
        manager.wait_until_finished()
        manager.close()
    if chief:
        print(f"loss {curve[-1][1]:.4f} at step {curve[-1][0]}")
    return {"loss": curve}


def hush_gloo() -> None:
    """Keeps what Gloo prints, from beside Python, out of the output."""
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(args: argparse.Namespace, arguments: list[str]) -> int:
    """Starts the processes, each with this script; if one dies, stops the others."""
    address = f"localhost:{free_port()}"
    command = [sys.executable, __file__, *arguments, "--coordinator", address]
    command += ["--hosts", str(args.processes), "--processes", "1"]
    if not args.quiet:
        print(f"starting {args.processes} processes", flush=True)
    workers = [
        subprocess.Popen([*command, "--host", str(host)])
        for host in range(args.processes)
    ]
    try:
        while all(worker.poll() in (None, 0) for worker in workers):
            if all(worker.poll() == 0 for worker in workers):
                return 0
            time.sleep(0.1)
        found = {i: worker.poll() for i, worker in enumerate(workers) if worker.poll()}
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    if 2 in found.values():
        return 2  # its one line has been printed
    ended = ", ".join(  # one that died takes others with it
        f"process {i} ended with "
        + (signal.Signals(-status).name if status < 0 else f"status {status}")
        for i, status in found.items()
    )
    print(
        f"train_sharded.py: {ended}; with --checkpoints the "
        "same command goes on from the last one.",
        file=sys.stderr,
    )
    return 1


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--parallel", choices=["fsdp", "data", "zero"], default="fsdp")
    add("--processes", type=positive(int), default=2, help="started on this host")
    add("--devices", type=positive(int), default=4, help="CPU devices of each process")
    add("--coordinator", help="ADDRESS:PORT of the first host")
    add("--hosts", type=positive(int), default=1, help="number of hosts")
    add("--host", type=int, default=0, help="this one, from 0")
    add("--checkpoints", type=pathlib.Path, metavar="FOLDER")
    add("--save-every", type=positive(int), default=50, metavar="STEPS")
    add("--curve", type=pathlib.Path, metavar="FILE", help="loss curve as JSON")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = train_lm.make_parser(__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(arguments)
    devices = args.processes * args.hosts * args.devices
    if args.batch % devices:
        parser.error(f"--batch {args.batch} is not a multiple of the {devices} devices")
    text = train_lm.check(args, parser)
    if args.checkpoints:
        check_folder(parser, "--checkpoints", args.checkpoints)
    if args.curve:
        check_file(parser, "--curve", args.curve)
    if args.processes > 1:
        return launch(args, arguments)
    if jax.config.jax_platforms in (None, "", "cpu"):
        use_cpu_devices(args.devices)
    if args.coordinator:
        hush_gloo()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.hosts, args.host)
    try:
        curves = train(args, text)
    except ValueError as error:
        if args.host == 0:
            parser.error(str(error))
        return 2
    if args.curve and jax.process_index() == 0:
        args.curve.write_text(json.dumps(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
