"""The training of finetune_llama.py: its programs, its loop, what it shows and draws."""

import argparse
import functools
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

import checkpointing
import cpu_devices
import instructions
import llama_samples
import llama_step
from command_line import compiling, counted
from instructions import Data
from llama_config import Config
from llama_step import Batch, Params
from microadam_optax import state_shardings

Rows = Callable[[Batch], Batch]  # puts a batch on the devices


class Programs(NamedTuple):
    """Compiled: a training step, the summed loss of a batch, and samples."""

    step: Callable | None  # where no step is left
    loss: Callable
    continued: Callable | None  # where nothing is said


class Run(NamedTuple):
    """How far a run is.

    Attributes:
      step: steps done.
      params: of the model.
      state: of the optimizer.
      before: held-out loss before the first step.
      losses: of each step, the mean of its micro-batches.
    """

    step: int
    params: Params
    state: Any
    before: float
    losses: list[float]


def init_state(tx: optax.GradientTransformation, params: Params, mesh: Mesh | None):
    """The optimizer's state, on a mesh divided as the parameters are."""
    places = None
    if mesh is not None:
        places = {
            part: state_shardings(tx, own)
            for part, own in llama_step.parts(params).items()
        }
    return jax.jit(functools.partial(llama_step.init, tx), out_shardings=places)(params)


def start(
    tx: optax.GradientTransformation, params: Params, mesh: Mesh | None, manager: Any
) -> Run:
    """The run at its last checkpoint, if there is one, else at its beginning."""
    state = init_state(tx, params, mesh)
    if manager is None or manager.latest_step() is None:
        return Run(0, params, state, float("nan"), [])
    like = checkpointing.shapes((params, state))
    jax.tree.map(lambda x: x.delete(), (params, state))  # or both are there twice
    found = checkpointing.restore(manager, *like)
    before, losses = found.record["before"], found.record["losses"]
    return Run(found.step, found.params, found.state, before, losses)


def compile_step(
    args: argparse.Namespace,
    config: Config,
    tx: optax.GradientTransformation,
    run: Run,
    batch: Batch,
) -> Callable:
    """The training step; parameters and state stay where they are."""
    way = llama_step.by_layer if args.layerwise else llama_step.ordinary
    kept = run.params, run.state
    places = jax.tree.map(lambda x: x.sharding, kept) if args.mesh else None
    jitted = jax.jit(
        functools.partial(way, config, tx),
        donate_argnums=(0, 1),
        out_shardings=places and (*places, None),
        compiler_options=llama_step.EXACT if args.dtype == "bfloat16" else None,
    )
    return jitted.lower(*kept, batch, jax.random.key(args.seed)).compile()


def compile_programs(
    args: argparse.Namespace,
    config: Config,
    tx: optax.GradientTransformation,
    run: Run,
    batch: Batch,
    prompts: llama_samples.Prompts,
) -> Programs:
    """What will be run, for these shapes and places; says how long each takes."""
    step = continued = None
    loss = jax.jit(functools.partial(llama_step.whole_loss, config))
    if run.step < args.steps:
        with compiling("the training step", args.quiet):
            step = compile_step(args, config, tx, run, batch)
    with compiling("the held-out loss", args.quiet):
        loss = loss.lower(run.params, batch).compile()
    if not args.quiet:
        continued = jax.jit(functools.partial(llama_samples.continued, config))
        with compiling("the samples"):
            continued = continued.lower(run.params, *prompts[:2]).compile()
    return Programs(step, loss, continued)


def held_out_loss(loss: Callable, run: Run, rows: Batch, like: Batch, put: Rows) -> float:
    """Mean over all tokens that count, each once, in batches like the given one.

    Raises:
      FloatingPointError: it is not finite.
    """
    total, count, size = 0.0, len(rows.tokens), len(like.tokens)
    for start in range(0, count, size):
        part = [x[start : start + size] for x in rows]
        filling = size - len(part[0])  # rows in which nothing counts
        filled = (np.pad(x, ((0, filling), (0, 0))) for x in part)
        total += float(loss(run.params, put(Batch(*filled))))
    if not np.isfinite(total):
        after = counted(run.step, "step")
        raise FloatingPointError(f"the held-out loss is {total} after {after}")
    return total / float(rows.weights.sum())


def step_once(
    args: argparse.Namespace, step: Callable, run: Run, rows: Batch, put: Rows
) -> tuple[Run, int]:
    """One step of all its micro-batches, and the tokens that went in."""
    params, state, losses, tokens = run.params, run.state, [], 0
    for i in range(args.accumulate):
        number = run.step * args.accumulate + i
        batch = instructions.batch_at(rows, number, args.batch, args.seed)
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        params, state, loss = step(params, state, put(batch), key)
        losses.append(loss)
        tokens += instructions.used(batch)
    mean = float(np.mean([float(x) for x in losses]))
    if not np.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} at step {run.step + 1}")
    return Run(run.step + 1, params, state, run.before, [*run.losses, mean]), tokens


@jax.jit
def finite(tree: Any) -> jax.Array:
    """Whether all numbers are."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def train(
    args: argparse.Namespace, step: Callable, run: Run, data: Data, put: Rows, manager
) -> Run:
    """To the last step, with progress; saves on the way there, with a manager."""
    seconds = tokens = 0.0
    bar = tqdm(total=args.steps, initial=run.step, unit="step", disable=args.quiet)
    with bar:
        while run.step < args.steps:
            began = time.perf_counter()
            run, more = step_once(args, step, run, data.train, put)
            seconds, tokens = seconds + time.perf_counter() - began, tokens + more
            due = run.step % args.checkpoint_every == 0 and run.step < args.steps
            if manager is not None and due:
                save(manager, run)
            bar.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, {tokens / seconds:,.0f} tokens/s, {memory()}"
            )
            bar.update()
    return run


def save_last(manager: Any, run: Run) -> None:
    """The end of a run, unless that is there."""
    if manager is not None and manager.latest_step() != run.step:
        save(manager, run)


def save(manager: Any, run: Run) -> None:
    """A checkpoint, unless a later run could not go on from it."""
    if not finite(run.params):
        raise FloatingPointError(f"a parameter is not finite after step {run.step}")
    record = {"before": run.before, "losses": run.losses}
    checkpointing.save(
        manager, checkpointing.Saved(run.step, run.params, run.state, record)
    )


def putter(batch: int, mesh: Mesh | None) -> Rows:
    """What puts a batch where the step wants it."""
    if mesh is None:
        return lambda rows: jax.tree.map(jnp.asarray, rows)
    return functools.partial(jax.device_put, device=cpu_devices.of_rows(batch, mesh))


def memory() -> str:
    """The most that was held: on the device if it tells, else by the process."""
    held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if held is None:
        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{held / 1e9:.1f} GB"


def plot(run: Run, after: float, title: str, file: pathlib.Path) -> None:
    """The loss of every step, and of the held-out rows before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(run.losses) + 1)
    axes.plot(steps, run.losses, ".-", color="0.6", linewidth=0.8, label="training batch")
    axes.plot([0, len(run.losses)], [run.before, after], "o", label="held-out rows")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
