"""Trains a byte-level transformer language model with MicroAdam, on CPU or GPU.

python examples/train_lm.py                      # embedded text, under 3 minutes
python examples/train_lm.py --optimizer adamw    # the same training with AdamW
python examples/train_lm.py --data a.txt b.txt   # any text files
"""

import argparse
import functools
import pathlib
import pydoc_data.topics
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from command_line import Parser, add_quiet, check_picture, compiling, positive
from language_model import LanguageModel, mean_loss
from microadam_optax import Health, diagnostics, microadam
from microadam_optax.memory import optimizer_bytes

LEARNING_RATE = 2e-3  # with either optimizer
HELD_OUT = 0.05  # share of the text, its end, that is only evaluated
EVALUATIONS = 5  # during the training
CLIP = 1.0  # global norm of the gradient


def make_step(
    graph: nnx.GraphDef, tx: optax.GradientTransformation, healthy: bool = False
):
    """The whole training step, jitted; parameters and state are updated in place.

    With `healthy` it returns MicroAdam's diagnostics, too, else None in their place.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, text):
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(graph, params, text)
        updates, opt_state = tx.update(gradients, opt_state, params)
        found = None
        if healthy:
            clipped, _ = optax.clip_by_global_norm(CLIP).update(gradients, None)
            found = diagnostics(opt_state, clipped, updates).total
        return optax.apply_updates(params, updates), opt_state, loss, found

    return step


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    peak, warmup = args.learning_rate, max(1, args.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(args.steps, warmup + 1), peak / 10
    )
    if args.optimizer == "adamw":
        inner = optax.adamw(schedule, weight_decay=args.weight_decay)
    else:
        inner = microadam(
            schedule,
            window=args.window,
            density=args.density,
            block_size=args.block_size,
            error_bits=args.error_bits,
            alpha=args.alpha,
            weight_decay=args.weight_decay,
        )
    return optax.chain(optax.clip_by_global_norm(CLIP), inner)


def load_text(files: list[pathlib.Path]) -> np.ndarray:
    """All files as one array of bytes; by default Python's own help text."""
    if not files:
        topics = pydoc_data.topics.topics
        return np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
    parts = [file.read_bytes() for file in files]
    for file, part in zip(files, parts, strict=True):
        if not part:
            raise ValueError(f"{file} is empty")
    return np.frombuffer(b"\n".join(parts), np.uint8)


def split_text(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Text to train on, and its end as whole sequences to evaluate on."""
    held_out = max(int(HELD_OUT * len(text)), length + 1)
    train, rest = text[:-held_out], text[-held_out:]
    if len(train) < length + 1:
        raise ValueError(
            f"the text has {len(text)} bytes; training and held-out sequences of "
            f"{length} need at least {2 * (length + 1)}"
        )
    rows = len(rest) // (length + 1)
    return train, rest[: rows * (length + 1)].reshape(rows, length + 1)


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Cross-entropy of the held-out bytes under the frequencies in `train`."""
    counts = np.bincount(train, minlength=256) + 1
    return float(-np.log(counts / counts.sum())[held_out[:, 1:]].mean())


def batches(train: np.ndarray, args: argparse.Namespace):
    """Random sequences of the training text, ``(batch, length + 1)``, for ever."""
    rng = np.random.default_rng(args.seed)
    window = np.arange(args.length + 1)
    while True:
        starts = rng.integers(0, len(train) - args.length, size=(args.batch, 1))
        yield train[starts + window].astype(np.int32)


def evaluate(loss, params: nnx.State, held_out: np.ndarray, batch: int) -> float:
    """Mean loss over all of the held-out sequences."""
    rows = [held_out[i : i + batch] for i in range(0, len(held_out), batch)]
    losses = [float(loss(params, row.astype(np.int32))) * len(row) for row in rows]
    return sum(losses) / len(held_out)


def train(
    args: argparse.Namespace, text: np.ndarray, healthy: bool = False
) -> dict[str, list]:
    """Trains, shows progress, and returns the curves, of diagnostics if `healthy`."""
    train_text, held_out = split_text(text, args.length)
    model = LanguageModel(
        args.length, args.width, args.depth, args.heads, nnx.Rngs(args.seed)
    )
    graph, params = nnx.split(model, nnx.Param)
    tx = make_optimizer(args)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    bytes_here = optimizer_bytes(tx, params)
    bytes_adam = optimizer_bytes(optax.adam(1.0), params)
    if not args.quiet:
        print(
            f"{len(text):,} bytes of text, {number:,} parameters, {jax.devices()[0]}\n"
            f"optimizer state: {args.optimizer} {bytes_here:,} bytes "
            f"({bytes_here / number:.2f} a parameter), Adam {bytes_adam:,} "
            f"({bytes_adam / number:.2f})",
            flush=True,
        )
    unigram, stream = unigram_loss(train_text, held_out), batches(train_text, args)
    shape = jax.ShapeDtypeStruct((args.batch, args.length + 1), np.int32)
    with compiling("the training step", args.quiet):
        opt_state = jax.jit(tx.init)(params)
        step = make_step(graph, tx, healthy)
        step = step.lower(params, opt_state, shape).compile()
    held_out_loss = jax.jit(functools.partial(mean_loss, graph))
    curves: dict[str, list] = {"train": [], "validation": [], "unigram": [unigram]}
    curves["health"] = []
    every, seconds = max(1, args.steps // EVALUATIONS), 0.0
    with tqdm(total=args.steps, unit="step", disable=args.quiet) as bar:
        for number in range(1, args.steps + 1):
            began = time.perf_counter()
            params, opt_state, loss, found = step(params, opt_state, next(stream))
            curves["train"].append(float(loss))
            seconds += time.perf_counter() - began  # of steps, without evaluations
            note = ""
            if found is not None:
                curves["health"].append(jax.tree.map(float, found))
                note = f", error/gradient {float(found.error_over_gradient):.1f}"
            if number % every == 0 or number == args.steps:
                value = evaluate(held_out_loss, params, held_out, args.batch)
                curves["validation"].append((number, value))
            speed = number * args.batch * args.length / seconds
            bar.set_postfix_str(f"loss {float(loss):.3f}, {speed:,.0f} tokens/s{note}")
            bar.update()
    last = curves["validation"][-1][1]
    print(f"validation loss {last:.4f} nats a byte, unigram model {unigram:.4f}")
    return curves


def plot(curves: dict[str, list], title: str, file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(curves["train"]) + 1)
    axes.plot(steps, curves["train"], color="0.7", linewidth=0.8, label="training batch")
    axes.plot(*zip(*curves["validation"], strict=True), "o-", label="validation")
    axes.axhline(curves["unigram"][0], linestyle=":", color="C3", label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)


def plot_health(health: list[Health], file: pathlib.Path) -> None:
    """Every figure of the diagnostics over the steps, but those that a window lacks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {name: [getattr(one, name) for one in health] for name in Health._fields}
    known = {
        name: values for name, values in figures.items() if np.isfinite(values).any()
    }
    figure, all_axes = plt.subplots(4, 2, figsize=(7, 10), layout="constrained")
    steps = range(1, len(health) + 1)
    for axes, (name, values) in zip(all_axes.flat, known.items(), strict=False):
        axes.plot(steps, values, linewidth=0.8)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.set_ylim(0, 1.05 * np.nanmax(values))
    for axes in all_axes.flat[len(known) :]:
        axes.remove()
    figure.savefig(file, dpi=120)


def make_parser(description: str) -> Parser:
    parser = Parser(description=description)
    add = parser.add_argument
    add("--data", nargs="+", type=pathlib.Path, default=[], metavar="FILE")
    add("--optimizer", choices=["microadam", "adamw"], default="microadam")
    add("--steps", type=positive(int), default=400)
    add("--batch", type=positive(int), default=8)
    add("--length", type=positive(int), default=128, help="bytes in a sequence")
    add("--width", type=positive(int), default=128)
    add("--depth", type=positive(int), default=3)
    add("--heads", type=positive(int), default=4)
    add("--learning-rate", type=positive(float), default=LEARNING_RATE, help="its peak")
    add("--weight-decay", type=float, default=0.0)
    add("--window", type=int, default=2)
    add("--density", type=float, default=0.06)
    add("--block-size", type=int, default=256)
    add("--error-bits", type=int, default=4)
    add("--alpha", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add_quiet(parser)
    return parser


def check(args: argparse.Namespace, parser: Parser) -> np.ndarray:
    """The text, if all arguments can be used; else one line and the end."""
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    try:
        make_optimizer(args)
        text = load_text(args.data)
        split_text(text, args.length)
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__.splitlines()[0])
    default = pathlib.Path("train_lm.png")
    parser.add_argument("--plot", type=pathlib.Path, default=default, metavar="FILE")
    parser.add_argument(
        "--log-diagnostics",
        action="store_true",
        help="MicroAdam's health beside the loss, and as a picture",
    )
    args = parser.parse_args(arguments)
    if args.log_diagnostics and args.optimizer != "microadam":
        parser.error("--log-diagnostics is for --optimizer microadam")
    text = check(args, parser)
    files = {"loss curve": args.plot}
    if args.log_diagnostics:
        files["diagnostics"] = args.plot.with_stem(f"{args.plot.stem}_health")
    for file in files.values():
        check_picture(parser, "--plot", file)
    curves = train(args, text, args.log_diagnostics)
    plot(curves, f"byte language model, {args.optimizer}", args.plot)
    if args.log_diagnostics:
        plot_health(curves["health"], files["diagnostics"])
    if not args.quiet:
        for what, file in files.items():
            print(f"{what}: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
