"""Plain JAX: parameters in a dict, one jitted step.

python examples/recipes/plain_jax.py
"""

import functools

import jax
import optax

import digits
from microadam_optax import microadam

STEPS = 300


def main() -> float:
    train_images, test_images, train_labels, test_labels = digits.load()
    schedule = optax.cosine_decay_schedule(4e-3, STEPS)
    tx = microadam(schedule)
    params = digits.init()
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        gradients = jax.grad(digits.loss_of)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for images, labels in digits.batches(train_images, train_labels, STEPS):
        params, state = step(params, state, images, labels)
    found = digits.accuracy(digits.logits_of(params, test_images), test_labels)
    print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
