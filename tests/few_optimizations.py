"""Compiling ahead of time in less time, where all that is compared is compiled so."""

import contextlib
import os

import jax
import pytest

ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of processes, for all programs


@contextlib.contextmanager
def few_optimizations():
    """Only where `compile` is called: what `jax.jit` keeps is compiled as ever."""
    compile_ = jax.stages.Lowered.compile

    def compiled(*args, **kwargs):
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            return compile_(*args, **kwargs)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax.stages.Lowered, "compile", compiled)
        yield


def environment():
    """That of this process, and with few optimizations."""
    return os.environ | ENVIRONMENT
