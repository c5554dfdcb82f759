"""Handwritten digits for the recipes: real data that needs no download."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images ``(n, 64)`` to train on and to test on, then the labels of both."""
    found = load_digits()
    images = (found.data / 16).astype(np.float32)
    labels = found.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.25, random_state=0)


def batches(images: np.ndarray, labels: np.ndarray, steps: int) -> Iterator[tuple]:
    """Random batches of 64."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(labels), size=64)
        yield images[rows], labels[rows]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def init(seed: int = 0) -> dict[str, jax.Array]:
    """Parameters of a network with one hidden layer, for recipes without a framework."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "hidden_bias": jnp.zeros(128),
        "out": jax.random.normal(keys[1], (128, 10)) / 11,
        "out_bias": jnp.zeros(10),
    }


def logits_of(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"])
    return hidden @ params["out"] + params["out_bias"]


def loss_of(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array):
    return cross_entropy(logits_of(params, images), labels)


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    return float((jnp.argmax(logits, -1) == labels).mean())
