"""What is trained: a model, its data, and how good it has become."""

import ast
import asyncio
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import bert  # noqa: E402
import docstrings  # noqa: E402
import finetune_bert  # noqa: E402
import language_model  # noqa: E402
import text_data  # noqa: E402
import train_lm  # noqa: E402
from text_data import Example  # noqa: E402

LENGTH, BATCH = 64, 8  # of the language model
WIDTH, DEPTH, HEADS = 128, 2, 4
BERT_LENGTH, BERT_BATCH = 32, 16


class Task(NamedTuple):
    """One thing to train; parameters and batches depend on the seed alone.

    ``evaluate`` gives figures of parameters on held-out data, of which the first
    decides; it is better where it is lower if its name ends in "loss".
    """

    init: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[[Any], dict[str, float]]


def language(text: np.ndarray, start: Any = None) -> Task:
    """A byte language model of a text, from scratch or from given parameters."""
    train, held_out = train_lm.split_text(text, LENGTH)

    def model(seed: int) -> language_model.LanguageModel:
        return language_model.LanguageModel(LENGTH, WIDTH, DEPTH, HEADS, nnx.Rngs(seed))

    graph, _ = nnx.split(model(0), nnx.Param)
    loss = functools.partial(language_model.mean_loss, graph)
    jitted = jax.jit(loss)

    def init(seed: int) -> Any:
        own = nnx.split(model(seed), nnx.Param)[1]
        return own if start is None else jax.tree.map(jnp.array, start)

    def batches(seed: int) -> Iterator[np.ndarray]:
        rng, window = np.random.default_rng(seed), np.arange(LENGTH + 1)
        while True:
            starts = rng.integers(0, len(train) - LENGTH, size=(BATCH, 1))
            yield train[starts + window].astype(np.int32)

    def evaluate(params: Any) -> dict[str, float]:
        return {"validation loss": train_lm.evaluate(jitted, params, held_out, 32)}

    return Task(init, loss, batches, evaluate)


def help_text() -> np.ndarray:
    """Python's own help on its language, English prose: 0.5 MB."""
    return train_lm.load_text([])


def source_text() -> np.ndarray:
    """The source of the standard library's asyncio, Python code: 0.5 MB."""
    folder = pathlib.Path(asyncio.__file__).parent
    return train_lm.load_text(sorted(folder.rglob("*.py")))


class DigitsModel(nnx.Module):
    """Two convolutions and two linear layers on an 8 x 8 image."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(images[..., None]))
        x = nnx.relu(self.second(x))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.logits(x)


def digits() -> Task:
    """scikit-learn's handwritten digits; a third of them is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = (found.images / 16.0).astype(np.float32)
    parts = train_test_split(
        images, found.target, test_size=1 / 3, random_state=0, stratify=found.target
    )
    train_images, test_images, train_labels, test_labels = parts
    graph, _ = nnx.split(DigitsModel(nnx.Rngs(0)), nnx.Param)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    @jax.jit
    def logits_of(params: Any) -> jax.Array:
        return nnx.merge(graph, params)(test_images)

    def init(seed: int) -> Any:
        return nnx.split(DigitsModel(nnx.Rngs(seed)), nnx.Param)[1]

    def batches(seed: int) -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.integers(0, len(train_images), size=32)
            yield train_images[rows], train_labels[rows]

    def evaluate(params: Any) -> dict[str, float]:
        logits = logits_of(params)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, test_labels)
        right = (logits.argmax(-1) == test_labels).mean()
        return {"test accuracy": float(right), "test loss": float(losses.mean())}

    return Task(init, loss, batches, evaluate)


def bert_docstrings() -> Task:
    """MiniLM that learns to tell whose docstring a text is, as in the example."""
    return classification(*docstrings.load())


def bert_code() -> Task:
    """MiniLM that learns to tell from which package a function's code is."""
    return classification(*docstrings.load(texts=code))


def code(file: pathlib.Path) -> Iterator[str]:
    """The body of each function of a module, without its name and its docstring."""
    for node in docstrings.nodes(file):
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            yield "\n".join(map(ast.unparse, body))


def classification(train: list[Example], held_out: list[Example]) -> Task:
    """MiniLM with a linear layer over the labels."""
    folder = finetune_bert.default_model()
    labels = sorted({label for label, _ in train})
    tokens = bert.Tokens(folder, BERT_LENGTH)
    data, evaluated = (text_data.encode(x, labels, tokens) for x in (train, held_out))

    def classifier(seed: int) -> Any:
        return finetune_bert.make_classifier(folder, len(labels), "mean", seed)

    graph, _ = classifier(0)
    predict = finetune_bert.make_predict(graph)

    def init(seed: int) -> Any:
        return classifier(seed)[1]

    def loss(params: Any, batch: Any) -> jax.Array:
        examples, seed = batch
        return finetune_bert.mean_loss(graph, params, examples, jax.random.key(seed))

    def batches(seed: int) -> Iterator[Any]:
        stream = text_data.batches(data, BERT_BATCH, seed)
        for number, batch in enumerate(stream):
            yield batch, np.uint32(1_000_003 * seed + number)  # the seed of the dropout

    def evaluate(params: Any) -> dict[str, float]:
        predicted = finetune_bert.predictions(predict, params, evaluated)
        return finetune_bert.figures(evaluated.labels, predicted)

    return Task(init, loss, batches, evaluate)
