"""Equinox: the model is the tree; its arrays are what is optimized.

python examples/recipes/equinox_model.py
"""

import equinox as eqx
import jax
import optax

import digits
from microadam_optax import microadam

STEPS = 300


def main() -> float:
    train_images, test_images, train_labels, test_labels = digits.load()
    schedule = optax.cosine_decay_schedule(4e-3, STEPS)
    model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
    tx = microadam(schedule)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, state):
        images, labels = batch

        def loss_of(model):
            return digits.cross_entropy(jax.vmap(model)(images), labels)

        gradients = eqx.filter_grad(loss_of)(model)
        updates, state = tx.update(
            gradients, state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), state

    for batch in digits.batches(train_images, train_labels, STEPS):
        model, state = step(batch, model, state)
    found = digits.accuracy(jax.vmap(model)(test_images), test_labels)
    print(f"test accuracy {found:.1%}")
    return found


if __name__ == "__main__":
    main()
