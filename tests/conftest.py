"""Fixtures, hypothesis with fixed seeds, and what the workers have compiled, shared."""

import os
import shutil
import tempfile

import hypothesis
import jax
import pytest

collect_ignore = ["data"]  # a script there needs torch

jax.config.update("jax_num_cpu_devices", 8)  # before the first array
hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("fixed")

CACHE = "JAX_COMPILATION_CACHE_DIR"  # programs that tests start read it, too


def pytest_configure(config):
    """A new folder for each run, so that nothing in it is older than the package."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        config.stash[made] = os.environ[CACHE] = tempfile.mkdtemp(prefix="jax-programs-")
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    if made in config.stash:
        shutil.rmtree(config.stash[made], ignore_errors=True)


made = pytest.StashKey[str]()


@pytest.fixture
def strict():
    """No implicit promotion of dtypes, on which optax itself relies."""
    with jax.numpy_dtype_promotion("strict"):
        yield
