"""LoRA: a frozen network, and two thin matrices beside each of its own that train.

python examples/recipes/lora.py

`optax.partition` freezes what was trained before: `set_to_zero` keeps no state for it,
and MicroAdam sees the thin matrices only.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import digits
from microadam_optax import memory, microadam

STEPS, RANK = 300, 4


def merged(params: dict) -> dict[str, jax.Array]:
    """The network's own weights with the products of the thin matrices added."""
    return {
        name: own + params["lora"][name][0] @ params["lora"][name][1]
        if name in params["lora"]
        else own
        for name, own in params["frozen"].items()
    }


def init(frozen: dict[str, jax.Array]) -> dict:
    """Thin matrices whose product is 0 at first."""
    lora = {}
    for number, name in enumerate(("hidden", "out")):
        rows, columns = frozen[name].shape
        key = jax.random.key(number)
        down = jax.random.normal(key, (rows, RANK)) / RANK
        lora[name] = (down, jnp.zeros((RANK, columns)))
    return {"frozen": frozen, "lora": lora}


def main() -> tuple[float, float]:
    """Test accuracy before and after."""
    train_images, test_images, train_labels, test_labels = digits.load()
    params = init(digits.init())  # in earnest: a network that was trained before
    tx = optax.partition(
        # Thin matrices are small leaves, which the default leaves to Adam.
        {"lora": microadam(1e-2, dense=None), "frozen": optax.set_to_zero()},
        {"lora": "lora", "frozen": "frozen"},
    )
    state = tx.init(params)

    def loss_of(params, images, labels):
        return digits.loss_of(merged(params), images, labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        gradients = jax.grad(loss_of)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def test_accuracy(params) -> float:
        return digits.accuracy(digits.logits_of(merged(params), test_images), test_labels)

    before = test_accuracy(params)
    held, adam = (memory.optimizer_bytes(x, params) for x in (tx, optax.adam(1.0)))
    for images, labels in digits.batches(train_images, train_labels, STEPS):
        params, state = step(params, state, images, labels)
    after = test_accuracy(params)
    print(f"test accuracy {before:.1%}, then {after:.1%}")
    print(f"state: {held:,} bytes; Adam for the whole network {adam:,}")
    return before, after


if __name__ == "__main__":
    main()
