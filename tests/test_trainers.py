"""Trainers that take an optax transformation, run for real as docs/trainers.md shows.

If it fails, somebody's trainer no longer takes MicroAdam as the page says.
`pip install -e ".[test,trainers]"` brings all but EasyDeL; what is missing is skipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import digits
import microadam_optax
from meshes import make_mesh
from microadam_optax import shard_grid, static_args

pytestmark = [pytest.mark.slow, pytest.mark.promotes]


# numpyro


def regression():
    """A Bayesian model with a matrix of 64 x 64, and its data."""
    numpyro = pytest.importorskip("numpyro")
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (256, 64))
    noise = jax.random.normal(keys[2], (256, 64))
    y = x @ jax.random.normal(keys[1], (64, 64)) / 8 + noise

    def model(x, y):
        normal = numpyro.distributions.Normal
        prior = normal(0.0, 1.0).expand([64, 64]).to_event(2)
        weights = numpyro.sample("weights", prior)
        numpyro.sample("y", normal(x @ weights, 1.0).to_event(2), obs=y)

    return model, x, y


def fit_svi(microadam, model, x, y):
    # page: numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    steps = 600
    tx = microadam(optax.cosine_decay_schedule(3e-2, steps))
    svi = SVI(model, AutoNormal(model), tx, Trace_ELBO())
    fitted = svi.run(jax.random.key(1), steps, x, y)
    # end
    assert {x.shape for x in fitted.params.values()} == {(64, 64)}
    return svi, np.asarray(fitted.losses)


def test_numpyro_svi():
    problem = regression()
    svi, ours = fit_svi(microadam_optax.microadam, *problem)
    _, adam = fit_svi(optax.adam, *problem)
    assert ours[0] == adam[0]
    stable = svi.run(jax.random.key(1), 20, *problem[1:], stable_update=True)
    np.testing.assert_allclose(stable.losses, ours[:20], rtol=1e-5)
    ends = [losses[-50:].mean() for losses in (ours, adam)]
    assert ends[1] < 0.5 * adam[0]
    assert ends[0] < 1.05 * ends[1]


# tunix


class Language(nnx.Module):
    """Tells the next token from the last."""

    def __init__(self, rngs: nnx.Rngs, axis: str | None = None):
        def dense(inputs, outputs, *names):
            init = nnx.initializers.lecun_normal()
            if axis is not None:
                init = nnx.with_partitioning(init, names)
            return nnx.Linear(
                inputs, outputs, kernel_init=init, use_bias=False, rngs=rngs
            )

        self.embed = nnx.Embed(64, 64, rngs=rngs)
        self.up = dense(64, 512, None, axis)
        self.down = dense(512, 64, axis, None)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(self.embed(tokens))))


def loss_of(model, input_tokens, input_mask):
    logits, targets = model(input_tokens[:, :-1]), input_tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * input_mask[:, 1:]).mean()


def inputs_of(batch):
    return {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}


def token_batches(number):
    """Sequences that count in fives, modulo 64."""
    trainer = pytest.importorskip("tunix.sft.peft_trainer")
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 64, size=(number, 8, 1))
    tokens = ((starts + 5 * np.arange(16)) % 64).astype(np.int32)
    return [trainer.TrainingInput(x, np.ones_like(x)) for x in tokens]


def train_with_tunix(microadam, model, batches, steps, every=None):
    # page: tunix
    from tunix.sft import peft_trainer

    schedule = optax.cosine_decay_schedule(2e-2, steps)
    make = optax.inject_hyperparams(microadam, static_args=static_args(microadam))
    config = peft_trainer.TrainingConfig(
        max_steps=steps, eval_every_n_steps=steps, gradient_accumulation_steps=every
    )
    trainer = peft_trainer.PeftTrainer(model, make(learning_rate=schedule), config)
    trainer.with_loss_fn(loss_of).with_gen_model_input_fn(inputs_of)
    trainer.train(batches)
    # end
    return trainer


TUNIX = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


@TUNIX
@pytest.mark.parametrize("accumulated", [None, 2])
def test_tunix_peft_trainer(accumulated):
    batches = token_batches(40)
    model = Language(nnx.Rngs(0))
    before = loss_of(model, **inputs_of(batches[0]))
    steps = 40 // (accumulated or 1)
    ours = microadam_optax.microadam
    trainer = train_with_tunix(ours, model, batches, steps, accumulated)
    assert trainer.train_steps == steps
    assert loss_of(model, **inputs_of(batches[0])) < 0.75 * before
    if accumulated is None:
        rates = trainer.metrics_logger.get_metric_history("", "learning_rate", "train")
        assert len(rates) == steps
        assert rates[0] > 0.0199 > 0.002 > rates[-1]


@TUNIX
def test_tunix_needs_the_static_arguments():
    trainer = pytest.importorskip("tunix.sft.peft_trainer")
    config = trainer.TrainingConfig(eval_every_n_steps=1)
    make = optax.inject_hyperparams(microadam_optax.microadam)
    with pytest.raises(TypeError, match="static_args"):
        trainer.PeftTrainer(Language(nnx.Rngs(0)), make(learning_rate=0.1), config)


@TUNIX
def test_tunix_on_a_mesh():
    """State is sharded like the model, and refused where an axis cuts no grid evenly."""
    batches = token_batches(10)
    with jax.set_mesh(make_mesh("fsdp 8")):
        model = Language(nnx.Rngs(0), "fsdp")
        before = loss_of(model, **inputs_of(batches[0]))
        trainer = train_with_tunix(microadam_optax.microadam, model, batches, 10)
        assert loss_of(model, **inputs_of(batches[0])) < 0.95 * before
        codes = trainer.optimizer.opt_state.inner_state[0].codes
        for name in ("up", "down"):
            array = codes[name]["kernel"][...]
            assert array.addressable_shards[0].data.size * 8 == array.size

        def few(learning_rate):
            return microadam_optax.microadam(learning_rate, shards=4)

        model = Language(nnx.Rngs(0), "fsdp")
        with pytest.raises(ValueError, match=r"partitioned 8 times|divide"):
            train_with_tunix(few, model, batches, 10)

        grid = shard_grid(nnx.state(model, nnx.Param))

        def own(learning_rate):
            return microadam_optax.microadam(learning_rate, shards=4, grid=grid)

        train_with_tunix(own, model, batches, 10)


# EasyDeL's registry of optimizers is in eformer, which CI does not install.


def register_with_easydel(microadam):
    # page: EasyDeL
    import dataclasses

    from eformer.optimizers import OptimizerBuilder, register_optimizer

    @dataclasses.dataclass
    class MicroAdamConfig:
        window: int = 2
        density: float = 0.06

    @register_optimizer("microadam")
    @dataclasses.dataclass
    class MicroAdamBuilder(OptimizerBuilder):
        config: MicroAdamConfig

        def build(self, scheduler):
            return microadam(scheduler, **dataclasses.asdict(self.config))

    # end


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_easydel_builds_it():
    optimizers = pytest.importorskip("eformer.optimizers")
    register_with_easydel(microadam_optax.microadam)
    # What TrainingArguments(optimizer="microadam", extra_optimizer_kwargs=...) passes.
    tx, _ = optimizers.OptimizerFactory.create(
        optimizer_type="microadam",
        scheduler_config=optimizers.SchedulerConfig(learning_rate=1e-2),
        clip_grad=1.0,
        weight_decay=0.01,
        mu_dtype=None,
        window=1,
        density=0.25,
    )
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(3)}
    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(updates=gradients, state=state, params=params)
    assert float((updates["w"] < -1e-3).mean()) == 0.25
    own = state[1][0]  # behind the clipping
    assert own.indices is None  # window 1
    assert int(own.count) == 1


@pytest.mark.parametrize("dense", [None, microadam_optax.smaller_than(4096)])
def test_shardings_that_easydel_mirrors(dense):
    """Its development version passes no `is_leaf` that knows optax.MaskedNode."""
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(64)}
    mesh = make_mesh("fsdp 8")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = microadam_optax.microadam(0.1, dense=dense)

    def mirrored():
        return optax.tree.map_params(
            tx,
            lambda _, own: own,
            jax.eval_shape(tx.init, params),
            jax.tree.map(lambda _: place, params),
            transform_non_params=lambda _: place,
            is_leaf=lambda x: x is None or isinstance(x, jax.sharding.NamedSharding),
        )

    if dense is None:
        assert set(jax.tree.leaves(mirrored())) == {place}
    else:
        with pytest.raises(ValueError, match="MaskedNode"):
            mirrored()


# jax-privacy


def private_loss(microadam, batches, steps, noise):
    loss_of, params, batch_size = digits.loss_of, digits.init(), 64
    # page: jax-privacy
    from jax_privacy import clipped_grad, noise_addition

    gradient_of = clipped_grad(
        loss_of, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=batch_size
    )
    privatizer = noise_addition.gaussian_privatizer(
        stddev=noise * gradient_of.sensitivity(), prng_key=jax.random.key(0)
    )
    tx = optax.chain(privatizer, microadam(optax.cosine_decay_schedule(4e-3, steps)))
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(gradient_of(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    # end
    for batch in batches:
        params, state = step(params, state, *batch)
    return params


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_jax_privacy():
    pytest.importorskip("jax_privacy")
    images, test_images, labels, test_labels = digits.load()
    batches = list(digits.batches(images, labels, 100))
    found = []
    for microadam in (microadam_optax.microadam, optax.adam):
        params = private_loss(microadam, batches, 100, noise=0.5)
        found.append(digits.accuracy(digits.logits_of(params, test_images), test_labels))
    ours, adam = found
    assert adam > 0.6
    assert ours > adam - 0.1
