"""Flax NNX: `nnx.Optimizer` holds the state beside the model.

python examples/recipes/nnx_optimizer.py
"""

import functools

import jax
import optax
from flax import nnx

import digits
from microadam_optax import microadam

STEPS = 300


class Model(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(images)))


def main() -> float:
    train_images, test_images, train_labels, test_labels = digits.load()
    schedule = optax.cosine_decay_schedule(4e-3, STEPS)
    model = Model(nnx.Rngs(0))
    tx = microadam(schedule)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, images, labels):
        def loss_of(model):
            return digits.cross_entropy(model(images), labels)

        optimizer.update(model, nnx.grad(loss_of)(model))

    for images, labels in digits.batches(train_images, train_labels, STEPS):
        step(model, optimizer, images, labels)
    found = digits.accuracy(model(test_images), test_labels)
    print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
