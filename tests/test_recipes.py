"""Every recipe runs, learns, and keeps what it promises.

If it fails, a recipe that users copy does something else than it says.
"""

import jax
import optax
import pytest

import apply_if_finite
import differential_privacy
import digits
import equinox_model
import inject_hyperparams
import linen_train_state
import lora
import multi_steps
import nnx_optimizer
import orbax_resume
import plain_jax
from compressed import scale_by_microadam

PLAIN = [plain_jax, nnx_optimizer, linen_train_state, equinox_model, inject_hyperparams]


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda x: x.__name__)
@pytest.mark.promotes
@pytest.mark.slow
def test_it_learns(recipe):
    assert recipe.main() > 0.93


@pytest.mark.promotes
@pytest.mark.slow
def test_accumulated_gradients(capsys):
    assert multi_steps.main() > 0.88
    assert "after 150 steps" in capsys.readouterr().out


@pytest.mark.promotes
@pytest.mark.slow
def test_a_bad_gradient_loses_nothing(capsys):
    accuracy, kept = apply_if_finite.main()
    assert kept
    assert accuracy > 0.93
    assert "steps left out: 1\n" in capsys.readouterr().out


@pytest.mark.promotes
@pytest.mark.slow
def test_a_break_changes_no_bit(tmp_path):
    accuracy, same = orbax_resume.main(tmp_path)
    assert same
    assert accuracy > 0.85


@pytest.mark.slow
def test_thin_matrices_alone_train(capsys):
    before, after = lora.main()
    assert before < 0.3
    assert after > 0.85
    assert "state: 985 bytes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.promotes
@pytest.mark.slow
def test_differential_privacy():
    accuracy, epsilon = differential_privacy.main()
    assert accuracy > 0.7
    # Without the amplification by sampling it would be some hundreds.
    assert 1 < epsilon < 6


def test_private_gradients_reach_microadam_clipped_and_averaged():
    """Without noise the chain is MicroAdam on the mean of the clipped gradients."""
    gradients = jax.random.normal(jax.random.key(0), (8, 4, 64))
    settings = {"window": 2, "density": 0.25}
    private = optax.chain(
        optax.contrib.differentially_private_aggregate(1.0, 0.0, jax.random.key(0)),
        scale_by_microadam(**settings),
    )
    params = jax.numpy.zeros((4, 64))
    updates, _ = jax.jit(private.update)(gradients, private.init(params), params)
    norms = jax.numpy.sqrt((gradients**2).sum((1, 2), keepdims=True))
    mean = (gradients / jax.numpy.maximum(norms, 1)).mean(0)
    plain = scale_by_microadam(**settings)
    expected, _ = jax.jit(plain.update)(mean, plain.init(params))
    assert (updates == 0).mean() == 0.75
    assert jax.numpy.allclose(updates, expected, rtol=1e-5)
    assert ((updates > 0) == (expected > 0)).all()


def test_the_data_are_divided():
    train_images, test_images, train_labels, test_labels = digits.load()
    assert len(train_images) == len(train_labels) == 1347
    assert len(test_images) == len(test_labels) == 450
