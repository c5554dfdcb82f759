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

FOLDER = "JAX_COMPILATION_CACHE_DIR"
ALL = {  # programs are kept however small; those that tests start read them, too
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}
MADE = pytest.StashKey[str]()


def pytest_configure(config):
    """A new folder for each run, so that nothing in it is older than the package."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        folder = tempfile.mkdtemp(prefix="jax-programs-")
        config.stash[MADE] = os.environ[FOLDER] = folder
        os.environ.update({name: str(value) for name, value in ALL.items()})
    jax.config.update(FOLDER.lower(), os.environ[FOLDER])
    for name, value in ALL.items():
        jax.config.update(name.lower(), value)


def pytest_unconfigure(config):
    if MADE in config.stash:
        shutil.rmtree(config.stash[MADE], ignore_errors=True)


@pytest.fixture
def strict():
    """No implicit promotion of dtypes, on which optax itself relies."""
    with jax.numpy_dtype_promotion("strict"):
        yield
