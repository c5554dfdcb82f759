"""Which code updates a leaf: what XLA makes of `_leaf.py`, or a platform's kernel."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from jax import lax

from microadam_optax._blocks import Layout
from microadam_optax._state import Settings

# Platforms whose kernel None chooses: where benchmarks/gpu.py has shown that it beats
# XLA. No platform has been measured yet.
CHOSEN: tuple[str, ...] = ()
# For tests: the kernel of a platform, in Pallas's interpreter on any platform.
INTERPRETED = {"interpret_gpu": "cuda", "interpret_tpu": "tpu"}


def kernels() -> Any:
    """The package of kernels, imported when one is wanted; None if it is not there."""
    name = "microadam_optax._kernels"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def reason_against(
    at: Layout, dtype: Any, settings: Settings, stochastic: bool
) -> str | None:
    """Why no kernel can update a leaf; None if one can."""
    if kernels() is None:
        return "an installation without them"
    return kernels().reason_against(at, dtype, settings, stochastic)


def may_use_kernel(at: Layout, dtype: Any, settings: Settings, stochastic: bool) -> bool:
    """Whether a kernel is asked for, or could be chosen, and can update a leaf."""
    name = settings.implementation
    if name == "xla" or (name is None and not CHOSEN) or 0 in at.shape:
        return False
    return reason_against(at, dtype, settings, stochastic) is None


def run(
    implementation: str | None,
    xla: dict[str, Callable],
    kernel: Callable | None,
    *args: Any,
) -> Any:
    """Runs the code of the platform that JAX lowers for.

    Args:
      implementation: as in `scale_by_microadam`, or one of `INTERPRETED`.
      xla: a function for each platform that has its own, and for "default".
      kernel: called with a platform and whether to interpret before `args`; None if no
        kernel can update the leaf.
      *args: what all of them take.

    Returns:
      What they return.
    """
    if kernel is not None and implementation in INTERPRETED:
        return kernel(INTERPRETED[implementation], True, *args)
    branches = dict(xla)
    if kernel is not None and implementation == "pallas":
        # Lowered for a platform that is neither, a kernel says so.
        branches = {
            "cuda": functools.partial(kernel, "cuda", False),
            "default": functools.partial(kernel, "tpu", False),
        }
    elif kernel is not None and implementation is None:
        for platform in CHOSEN:
            branches[platform] = functools.partial(kernel, platform, False)
    default = branches.pop("default")
    if not branches:
        return default(*args)
    return lax.platform_dependent(*args, default=default, **branches)
