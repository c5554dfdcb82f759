"""Flax Linen: `TrainState` holds parameters and state.

python examples/recipes/linen_train_state.py
"""

import functools

import jax
import optax
from flax import linen
from flax.training.train_state import TrainState

import digits
from microadam_optax import microadam

STEPS = 300


class Model(linen.Module):
    """One hidden layer."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = linen.relu(linen.Dense(128)(images))
        return linen.Dense(10)(hidden)


def main() -> float:
    train_images, test_images, train_labels, test_labels = digits.load()
    schedule = optax.cosine_decay_schedule(4e-3, STEPS)
    model = Model()
    training = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), train_images[:1])["params"],
        tx=microadam(schedule),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(training, images, labels):
        def loss_of(params):
            return digits.cross_entropy(
                training.apply_fn({"params": params}, images), labels
            )

        return training.apply_gradients(grads=jax.grad(loss_of)(training.params))

    for images, labels in digits.batches(train_images, train_labels, STEPS):
        training = step(training, images, labels)
    logits = model.apply({"params": training.params}, test_images)
    found = digits.accuracy(logits, test_labels)
    print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
