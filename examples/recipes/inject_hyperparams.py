"""`optax.inject_hyperparams`: the learning rate lies in the state and can be changed.

python examples/recipes/inject_hyperparams.py
"""

import functools

import jax
import optax

import digits
from microadam_optax import microadam, static_args

STEPS = 300


def main() -> float:
    train_images, test_images, train_labels, test_labels = digits.load()
    # What shapes the state stays a Python number: `static_args` names those arguments.
    make = optax.inject_hyperparams(microadam, static_args=static_args(microadam))
    tx = make(learning_rate=4e-3)
    params = digits.init()
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        gradients = jax.grad(digits.loss_of)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    stream = digits.batches(train_images, train_labels, STEPS)
    for number, (images, labels) in enumerate(stream):
        if number == 2 * STEPS // 3:  # nothing is compiled again
            rate = state.hyperparams["learning_rate"]
            state.hyperparams["learning_rate"] = rate / 10
        params, state = step(params, state, images, labels)
    found = digits.accuracy(digits.logits_of(params, test_images), test_labels)
    rate = float(state.hyperparams["learning_rate"])
    print(f"test accuracy {found:.1%}, learning rate {rate:.1e} at the end")
    return found


if __name__ == "__main__":
    main()
