"""A small model of stacked layers, and its training step written in both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from microadam_optax import PAPER, layerwise, microadam

LAYERS, WIDTH, INNER, BATCH = 4, 64, 96, 16
SCHEDULE = optax.cosine_decay_schedule(1e-2, 20)
TRANSFORMATIONS = {
    "default": microadam(1e-2),
    "paper with a schedule": microadam(SCHEDULE, weight_decay=1e-3, **PAPER),
    "XLA": microadam(1e-2, implementation="xla", block_size=64),
    "literal": microadam(1e-2, window=1, density=0.25, match_adam=False),
    "random rounding": microadam(1e-2, window=1, density=0.06, stochastic_rounding=True),
    "adamw": optax.adamw(1e-2),
    "lion, clipped by block": optax.chain(optax.clip_by_block_rms(1.0), optax.lion(1e-3)),
}


def block(layer, x):
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jax.nn.gelu((scale * x * layer["norm"]) @ layer["up"]) @ layer["down"]


def parameters(dtype=jnp.float32, width=WIDTH, inner=INNER, layers=LAYERS):
    rng = np.random.default_rng(0)
    return {
        "norm": jnp.ones((layers, width), dtype),
        "up": jnp.asarray(rng.normal(0, 0.1, (layers, width, inner)), dtype),
        "down": jnp.asarray(rng.normal(0, 0.1, (layers, inner, width)), dtype),
    }


def data(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(2, BATCH, WIDTH)), dtype)


def loss_of(target, y):
    return jnp.mean((y - target) ** 2)


def ordinary(tx, params, state, x, target, apply=optax.apply_updates):
    """One step as everybody writes it, layers scanned and rematerialized."""

    def loss(params, x):
        remat = jax.checkpoint(block)
        y, _ = jax.lax.scan(lambda x, layer: (remat(layer, x), None), x, params)
        return loss_of(target, y)

    value, (gradients, dx) = jax.value_and_grad(loss, (0, 1))(params, x)
    updates, state = tx.update(gradients, state, params)
    return apply(params, updates), state, value, dx


def by_layers(tx, params, state, x, target, apply=optax.apply_updates):
    y, backward = layerwise.vjp(block, params, x)
    value, dy = jax.value_and_grad(functools.partial(loss_of, target))(y)
    dx, params, state = backward(dy, state, tx, apply=apply)
    return params, state, value, dx


@functools.cache
def jitted(step, tx):
    return jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))


def run(step, tx, steps, params, state):
    step = jitted(step, tx)
    batch = data(params["up"].dtype)
    for _ in range(steps):
        params, state, value, dx = step(params, state, *batch)
    return params, state, value, dx


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
