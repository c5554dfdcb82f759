"""Settings for every test: strict dtypes, and hypothesis without time limits."""

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("fixed")
