"""One run: a task, an optimizer, a learning rate, a seed and a number of steps."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from methods import Method
from microadam_optax.memory import optimizer_bytes
from tasks import Task

CLIP = 1.0  # global norm of the gradient, for every optimizer
WARMUP, FINAL = 0.05, 0.1  # share of the steps; share of the peak learning rate


def make_step(task: Task, method: Method) -> Callable:
    """The jitted step; the learning rate is traced, so one compilation does for all."""

    @jax.jit
    def step(params, state, batch, rate):
        tx = optimizer(method, rate)
        loss, gradients = jax.value_and_grad(task.loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def optimizer(method: Method, rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP), method.make(rate))


def state_bytes(task: Task, method: Method) -> float:
    """Bytes of optimizer state a parameter of the task's model."""
    params = jax.eval_shape(lambda: task.init(0))
    held = optimizer_bytes(optimizer(method, 0.1), params)
    return held / sum(x.size for x in jax.tree.leaves(params))


def run(
    task: Task,
    method: Method,
    step: Callable,
    rate: float,
    seed: int,
    steps: int,
    evaluations: int = 10,
    title: str = "",
) -> tuple[dict[str, Any], Any]:
    """Trains; the figures of the run, and the parameters."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, max(1, round(WARMUP * steps)), steps, FINAL * rate
    )
    rates = np.asarray(jax.vmap(schedule)(np.arange(steps)), np.float32)
    params, stream = task.init(seed), task.batches(seed)
    state = jax.jit(optimizer(method, 0.1).init)(params)
    curve: list[tuple[int, float]] = []
    began = time.perf_counter()
    with tqdm(total=steps, desc=title, unit="step", leave=False) as bar:
        for number in range(1, steps + 1):
            params, state, loss = step(params, state, next(stream), rates[number - 1])
            if number % max(1, steps // evaluations) == 0 or number == steps:
                figures = {x: round(y, 5) for x, y in task.evaluate(params).items()}
                curve.append((number, next(iter(figures.values()))))
                bar.set_postfix_str(f"loss {float(loss):.3f}")
                if not math.isfinite(float(loss)):
                    break
            bar.update()
    row = {
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "figures": figures,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return row, params
