"""Variational inference by numpyro: a Bayesian regression with many weights."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks import Task

CLASSES, PARTICLES = 10, 64


def pairs(images: np.ndarray) -> np.ndarray:
    """The products of all pairs of pixels, each at most 1."""
    first, second = np.triu_indices(images.shape[1])
    return images[:, first] * images[:, second]


def variational() -> Task:
    """numpyro's SVI of a softmax regression of the digits on all pairs of their pixels.

    A normal distribution for each of 20,800 weights, so 41,600 parameters in two leaves.
    Seeds are those of the noise; the loss is the negative evidence lower bound an image.
    """
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from sklearn.datasets import load_digits

    found = load_digits()
    x = jnp.asarray(pairs((found.images / 16.0).reshape(-1, 64)), jnp.float32)
    y = jnp.asarray(found.target)

    def model(x: jax.Array, y: jax.Array) -> None:
        normal = numpyro.distributions.Normal(0.0, 1.0)
        prior = normal.expand((x.shape[1], CLASSES)).to_event(2)
        logits = x @ numpyro.sample("weights", prior)
        numpyro.sample("y", numpyro.distributions.Categorical(logits=logits), obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    start = svi.init(jax.random.key(0), x, y)
    free = svi.optim.get_params(start.optim_state)  # unconstrained, as SVI trains them
    constrain = svi.constrain_fn

    def negative_bound(particles: int, free: Any, key: jax.Array) -> jax.Array:
        bound = Trace_ELBO(num_particles=particles)
        return bound.loss(key, constrain(free), model, guide, x, y) / len(y)

    held = jax.jit(functools.partial(negative_bound, PARTICLES))

    def loss(free: Any, batch: Any) -> jax.Array:
        return negative_bound(1, free, jax.random.key(batch))

    def batches(seed: int) -> Iterator[Any]:
        for number in range(1 << 20):
            yield np.uint32(1_000_003 * seed + number)

    def evaluate(free: Any) -> dict[str, float]:
        return {"negative bound, loss": float(held(free, jax.random.key(2**31)))}

    return Task(lambda _: free, loss, batches, evaluate)
