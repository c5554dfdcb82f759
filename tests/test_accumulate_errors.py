"""What `accumulate` cannot do is said in one sentence, before anything is computed.

If it fails, a mistake around micro-batches trains wrongly, or ends in a riddle.
"""

import jax.numpy as jnp
import pytest

from microadam_optax import accumulate, microadam

PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.ones(8)}


@pytest.mark.parametrize("kind", [tuple, list, "inner"])
def test_states_of_something_else(kind):
    tx, inner = accumulate(microadam(1e-2), 2), microadam(1e-2)
    state = inner.init(PARAMS) if kind == "inner" else kind(tx.init(PARAMS))
    name = type(state).__name__
    message = rf"^The state must be an AccumulateState, got a {name}: .*\.$"
    with pytest.raises(TypeError, match=message):
        tx.has_updated(state)
    with pytest.raises(TypeError, match=message):
        tx.update(PARAMS, state, PARAMS)
