"""`optax.apply_if_finite`: a step whose gradient is not finite does not happen.

python examples/recipes/apply_if_finite.py

One gradient has a NaN put into it: parameters and MicroAdam's state stay as they were, to
the bit, and training goes on.
"""

import jax
import jax.numpy as jnp
import optax

import digits
from microadam_optax import microadam

STEPS, BAD = 300, 100


def main() -> tuple[float, bool]:
    """Test accuracy, and whether the bad step left everything as it was."""
    train_images, test_images, train_labels, test_labels = digits.load()
    inner = microadam(2e-3)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=5)
    params = digits.init()
    state = tx.init(params)

    @jax.jit  # not donated: what was before is compared below
    def step(params, state, images, labels, spoil):
        gradients = jax.grad(digits.loss_of)(params, images, labels)
        nan = jnp.where(spoil, jnp.nan, 0.0)
        gradients["hidden"] = gradients["hidden"].at[3, 5].add(nan)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    stream = digits.batches(train_images, train_labels, STEPS)
    for number, (images, labels) in enumerate(stream):
        before = params, state.inner_state
        params, state = step(params, state, images, labels, number == BAD)
        if number == BAD:
            kept = _equal(before, (params, state.inner_state))
    found = digits.accuracy(digits.logits_of(params, test_images), test_labels)
    print(f"test accuracy {found:.1%}; steps left out: {int(state.total_notfinite)}")
    print(f"parameters and state bit-equal over the bad step: {kept}")
    return found, kept


def _equal(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


if __name__ == "__main__":
    main()
