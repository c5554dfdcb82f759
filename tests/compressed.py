"""The transformations with every leaf compressed: tests of the method use small ones."""

import functools

import microadam_optax

microadam = functools.partial(microadam_optax.microadam, dense=None)
scale_by_microadam = functools.partial(microadam_optax.scale_by_microadam, dense=None)
