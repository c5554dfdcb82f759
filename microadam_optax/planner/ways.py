"""Ways to take a step: which gradients exist together, what micro-batches keep."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import optax

from microadam_optax._accumulate import accumulate
from microadam_optax.planner.models import Shapes

EVERY = 2  # micro-batches to a step: their number plays no part in what is held
_LAYER = re.compile(r"(?:.*/)?layers/\d+/")
Wrapper = Callable[[optax.GradientTransformation], optax.GradientTransformation]


class Way(NamedTuple):
    """A way to take a step, and how the optimizers' names begin that can."""

    name: str
    optimizers: tuple[str, ...] = ("",)
    by_layer: bool = False
    wrapper: Wrapper = lambda tx: tx


def _multi_steps(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.MultiSteps(tx, EVERY).gradient_transformation()


def _accumulate(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return accumulate(tx, EVERY)


BY_LAYER = "layer by layer"
ORDINARY = Way("ordinary step")
WAYS = (
    ORDINARY,
    # Adafactor's and GaLore's state is not cut by layers.
    Way(BY_LAYER, ("Adam,", "Lion", "MicroAdam"), by_layer=True),
    Way("optax.MultiSteps", wrapper=_multi_steps),
    Way("accumulate", ("MicroAdam",), wrapper=_accumulate),
    Way(f"accumulate, {BY_LAYER}", ("MicroAdam",), True, _accumulate),
)


def together(shapes: Shapes, by_layer: bool) -> Shapes:
    """Parameters whose gradients exist at the same time.

    Layer by layer those of one layer, the largest, and of all that is in no layer.
    """
    layers: dict[str, Shapes] = {}
    rest: Shapes = {}
    for name, shape in shapes.items():
        found = _LAYER.match(name) if by_layer else None
        of = layers.setdefault(found[0], {}) if found else rest
        of[name] = shape
    return rest | max(layers.values(), key=_number, default={})


def _number(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
