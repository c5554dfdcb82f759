"""Fixtures, and hypothesis without time limits and with fixed seeds."""

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def strict():
    """No implicit promotion of dtypes, on which optax itself relies."""
    with jax.numpy_dtype_promotion("strict"):
        yield
