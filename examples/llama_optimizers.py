"""The optimizers of finetune_llama.py, with their schedules and micro-batches."""

import optax

from microadam_optax import accumulate, microadam

LEARNING_RATE = {"microadam": 1e-4, "adamw": 1e-4, "adafactor": 1e-3, "lion": 1e-5}
WARM_UP = 10  # the first of that many parts of the steps


def schedule(peak: float, steps: int) -> optax.Schedule:
    """A linear warm-up that begins above 0, then half a cosine that ends near 0."""
    warm_up = max(1, steps // WARM_UP)
    return optax.warmup_cosine_decay_schedule(
        peak / (warm_up + 1), peak, warm_up, max(steps, warm_up + 1)
    )


def make_optimizer(
    name: str, peak: float, steps: int, every: int = 1
) -> optax.GradientTransformation:
    """An optimizer that steps with the mean gradient of `every` micro-batches."""
    rates = schedule(peak, steps)
    if name == "microadam":
        return accumulate(microadam(rates), every) if every > 1 else microadam(rates)
    tx = {
        "adamw": lambda: optax.adamw(rates, weight_decay=0.0),
        "adafactor": lambda: optax.adafactor(rates),
        "lion": lambda: optax.lion(rates, weight_decay=0.0),
    }[name]()
    return optax.MultiSteps(tx, every).gradient_transformation() if every > 1 else tx
