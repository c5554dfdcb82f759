"""Orbax: training is saved, and goes on from there as if it had not been interrupted.

python examples/recipes/orbax_resume.py
"""

import functools
import pathlib
import tempfile

import jax
import optax
import orbax.checkpoint as ocp

import digits
from microadam_optax import check_checkpoint, microadam

STEPS, SAVED = 200, 80


def main(folder: pathlib.Path | None = None) -> tuple[float, bool]:
    """Test accuracy, and whether both ways end with the same bits."""
    train_images, test_images, train_labels, test_labels = digits.load()
    schedule = optax.cosine_decay_schedule(4e-3, STEPS)
    tx = microadam(schedule)
    stream = list(digits.batches(train_images, train_labels, STEPS))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        gradients = jax.grad(digits.loss_of)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    at = (folder or pathlib.Path(tempfile.mkdtemp())) / "checkpoint"
    params = digits.init()
    here = params, tx.init(params)
    with ocp.StandardCheckpointer() as checkpoints:
        for number, batch in enumerate(stream):
            if number == SAVED:
                checkpoints.save(at, here)
                checkpoints.wait_until_finished()
            here = step(*here, *batch)
        # Another process begins here: it knows the shapes only.
        shapes = jax.eval_shape(digits.init)
        target = shapes, jax.eval_shape(tx.init, shapes)
        check_checkpoint(checkpoints.metadata(at).item_metadata[1], tx, shapes)
        again = checkpoints.restore(at, target)
        for batch in stream[SAVED:]:
            again = step(*again, *batch)
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(again), strict=True)
    same = all(bool((a == b).all()) for a, b in pairs)
    found = digits.accuracy(digits.logits_of(again[0], test_images), test_labels)
    print(f"test accuracy {found:.1%}; bit-equal to the run without a break: {same}")
    return found, same


if __name__ == "__main__":
    main()
