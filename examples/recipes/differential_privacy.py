"""DP-MicroAdam: training with a guarantee for each example, and what it is worth.

python examples/recipes/differential_privacy.py

Gradients of single examples are clipped, summed and noised by optax; what MicroAdam makes
of the sum, its error feedback too, needs no privacy budget (arXiv 2511.20509). Batches
are drawn as the accounting assumes: each example independently with the same probability.
A batch has room for more than are drawn; the rest of it has no weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import dp_event, rdp

import digits
from microadam_optax import scale_by_microadam

STEPS, DRAWN, ROOM = 300, 128, 256  # examples of a batch: expected, and at most
CLIP, NOISE, DELTA = 1.0, 2.0, 1e-4


def epsilon(examples: int) -> float:
    """The privacy budget that the whole training spends, at DELTA."""
    one = dp_event.PoissonSampledDpEvent(
        DRAWN / examples, dp_event.GaussianDpEvent(NOISE)
    )
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.SelfComposedDpEvent(one, STEPS))
    return float(accountant.get_epsilon(DELTA))


def poisson_batch(rng: np.random.Generator, images, labels):
    """Examples with their weights, 1 for those drawn."""
    drawn = np.flatnonzero(rng.random(len(labels)) < DRAWN / len(labels))
    if len(drawn) > ROOM:
        raise ValueError(f"{len(drawn)} examples were drawn, more than {ROOM}")
    rows = np.zeros(ROOM, np.int64)
    rows[: len(drawn)] = drawn
    weights = (np.arange(ROOM) < len(drawn)).astype(np.float32)
    return images[rows], labels[rows], weights


def main() -> tuple[float, float]:
    """Test accuracy and epsilon."""
    train_images, test_images, train_labels, test_labels = digits.load()
    tx = optax.chain(
        optax.contrib.differentially_private_aggregate(CLIP, NOISE, jax.random.key(0)),
        scale_by_microadam(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(2e-3, STEPS)),
    )
    params = digits.init()
    state = tx.init(params)

    def loss_of_one(params, image, label, weight):
        return weight * digits.loss_of(params, image[None], label[None])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels, weights):
        each = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0, 0, 0))
        updates, state = tx.update(each(params, images, labels, weights), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = poisson_batch(rng, train_images, train_labels)
        params, state = step(params, state, *batch)
    found = digits.accuracy(
        digits.logits_of(params, jnp.asarray(test_images)), test_labels
    )
    spent = epsilon(len(train_labels))
    print(f"test accuracy {found:.1%} at epsilon {spent:.2f}, delta {DELTA:g}")
    return found, spent


if __name__ == "__main__":
    main()
