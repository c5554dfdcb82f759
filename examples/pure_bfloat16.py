"""Trains a language model in pure bfloat16, rounded as usual and at random.

python examples/pure_bfloat16.py

Parameters, gradients and activations are bfloat16; beside them a float32 run of the same
model. Prints the validation losses and what share of the updates ordinary rounding loses.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from command_line import Parser, add_quiet, compiling, positive
from language_model import LanguageModel, mean_loss
from microadam_optax import apply_updates_stochastic, lost_updates, microadam
from train_lm import batches, evaluate, load_text, split_text

RUNS = {
    "float32": (jnp.float32, False),
    "bfloat16, rounded to nearest": (jnp.bfloat16, False),
    "bfloat16, rounded at random": (jnp.bfloat16, True),
}


def make_step(graph: nnx.GraphDef, tx: optax.GradientTransformation, at_random: bool):
    """The jitted training step."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, text, key):
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(graph, params, text)
        # In float32 from here on: the update must not be rounded before it is added.
        gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
        updates, opt_state = tx.update(gradients, opt_state)
        lost = lost_updates(params, updates)
        if at_random:
            params = apply_updates_stochastic(params, updates, key)
        else:
            params = optax.apply_updates(params, updates)
        return params, opt_state, loss, lost

    return step


def train(args: argparse.Namespace, name: str, text: np.ndarray) -> tuple[float, float]:
    """The validation loss, and the share of updates lost in the last quarter."""
    dtype, at_random = RUNS[name]
    train_text, held_out = split_text(text, args.length)
    model = LanguageModel(args.length, args.width, args.depth, 4, nnx.Rngs(args.seed))
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    tx = microadam(schedule, window=args.window, density=args.density)
    stream, key, lost = batches(train_text, args), jax.random.key(args.seed), []
    shape = jax.ShapeDtypeStruct((args.batch, args.length + 1), np.int32)
    with compiling(f"the training step, {name}", args.quiet):
        opt_state = jax.jit(tx.init)(params)
        step = make_step(graph, tx, at_random)
        step = step.lower(params, opt_state, shape, key).compile()
    for i in tqdm(range(args.steps), desc=name, unit="step", disable=args.quiet):
        key_now = jax.random.fold_in(key, i)
        params, opt_state, _, share = step(params, opt_state, next(stream), key_now)
        lost.append(float(share))
    loss = jax.jit(functools.partial(mean_loss, graph))
    late = float(np.mean(lost[-max(1, args.steps // 4) :]))
    return evaluate(loss, params, held_out, 32), late


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=positive(int), default=200)
    add("--batch", type=positive(int), default=8)
    add("--length", type=positive(int), default=32)
    add("--width", type=positive(int), default=64)
    add("--depth", type=positive(int), default=1)
    add("--learning-rate", type=positive(float), default=1e-3)
    add("--window", type=positive(int), default=2)
    add("--density", type=positive(float), default=0.12)
    add("--seed", type=int, default=0)
    add_quiet(parser)
    args = parser.parse_args(arguments)
    text = load_text([])
    for name in RUNS:
        loss, lost = train(args, name, text)
        print(f"{name}: validation loss {loss:.4f}, {lost:.0%} of late updates too small")
    return 0


if __name__ == "__main__":
    sys.exit(main())
