"""Who computes a leaf: XLA, from `_step.update_blocks`, or a kernel of the platform.

`implementation` names one; None chooses, leaf by leaf, and never makes a program fail
that XLA's path would have run. In which pieces XLA computes is in `_xla.py`.
"""

import functools
import importlib
import importlib.util
import warnings
from typing import Any

from microadam_optax._blocks import Layout
from microadam_optax._paths import shown
from microadam_optax._state import Settings

# Platforms whose kernel None chooses.
CHOSEN: tuple[str, ...] = ("cpu", "cuda")
# Names of kernels, and the platforms that each has one for.
NAMED = {"pallas": ("cuda", "tpu"), "numba": ("cpu",)}
# For tests: the kernel of a platform, in Pallas's interpreter on any platform.
INTERPRETED = {"interpret_gpu": "cuda", "interpret_tpu": "tpu"}
NAMES = ("xla", *NAMED, *INTERPRETED)


def choose(
    platforms: tuple[str, ...],
    foreign: bool,
    layout: Layout,
    dtype: Any,
    settings: Settings,
) -> dict[str, str | None]:
    """Who computes a leaf on each platform of a program.

    Args:
      platforms: for which the program is lowered.
      foreign: whether it runs elsewhere and later, or kernels cannot be part of it.
      layout: of the leaf.
      dtype: of its gradient.
      settings: static numbers.

    Returns:
      For each platform the one whose kernel computes, None for XLA.

    Raises:
      NotImplementedError: a kernel is named that cannot.
    """
    chosen = {x: _choose(x, foreign, layout, dtype, settings) for x in platforms}
    if len(platforms) > 1 and settings.implementation is None:
        # Pallas lowers its kernels only in programs for one platform.
        chosen = {x: kernel if x == "cpu" else None for x, kernel in chosen.items()}
    return chosen


def _choose(
    platform: str, foreign: bool, layout: Layout, dtype: Any, settings: Settings
) -> str | None:
    name = settings.implementation
    if name in INTERPRETED:
        return INTERPRETED[name]
    if name is None and (foreign or platform not in CHOSEN or kernels() is None):
        return None
    if name is not None and platform not in NAMED[name]:
        raise NotImplementedError(
            f'`implementation="{name}"` has kernels for {" and ".join(NAMED[name])}, '
            f"not for {platform}; use None, which chooses."
        )
    reason = kernels().unavailable(platform)
    reason = reason or kernels().reason_against(platform, layout, dtype, settings)
    if name is not None and reason is not None:
        raise no_kernel(name, reason)
    if lacks := kernels().missing(platform):
        _tell(platform, lacks)
    return platform if reason is None else None


def check_kernel(path: Any, dtype: Any, layout: Layout, settings: Settings) -> None:
    """Raises NotImplementedError if a kernel is named that cannot update a leaf."""
    name = settings.implementation
    if name is None or name == "xla":
        return
    reason = unavailable(name)
    if reason is not None:
        raise no_kernel(name, reason)
    reason = reason_against(layout, dtype, settings)
    if reason is not None:
        raise no_kernel(name, f"{reason}, as in {shown(path)}")


def reason_against(layout: Layout, dtype: Any, settings: Settings) -> str | None:
    """Why no kernel of the name in the settings can update a leaf; None if one can."""
    reasons = [
        kernels().reason_against(x, layout, dtype, settings)
        for x in _platforms(str(settings.implementation))
    ]
    return None if None in reasons else reasons[0]


def unavailable(name: str) -> str | None:
    """Why no kernel of a name can be used here; None if one can."""
    if kernels() is None:
        return "an installation without `microadam_optax._kernels`"
    reasons = [kernels().unavailable(x) for x in _platforms(name)]
    return None if None in reasons else reasons[0]


def no_kernel(name: str, what: str) -> NotImplementedError:
    """The error for what a kernel that is named cannot do."""
    return NotImplementedError(
        f'`implementation="{name}"` has no kernel for {what}; use None, which chooses.'
    )


@functools.cache
def kernels() -> Any:
    """The package of kernels, imported when one is wanted; None if it is not there."""
    name = "microadam_optax._kernels"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _platforms(name: str) -> tuple[str, ...]:
    known = NAMED | {name: (platform,) for name, platform in INTERPRETED.items()}
    return known[name]


@functools.cache
def _tell(platform: str, lacks: str) -> None:
    """Warns once that None does not choose a kernel that other versions of jax have."""
    warnings.warn(
        f"microadam_optax has no kernel for {platform} with {lacks}; XLA computes.",
        stacklevel=2,
    )
