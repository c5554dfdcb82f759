"""Fixtures, and hypothesis without time limits and with fixed seeds."""

import hypothesis
import jax
import pytest

collect_ignore = ["data"]  # a script there needs torch

jax.config.update("jax_num_cpu_devices", 8)  # before the first array
hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def strict():
    """No implicit promotion of dtypes, on which optax itself relies."""
    with jax.numpy_dtype_promotion("strict"):
        yield
