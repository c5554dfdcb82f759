"""The planner's models have the published numbers of parameters.

If it fails, the planner plans for another model than the one that was named.
"""

import json
import math

import pytest

from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.sizes import MODELS
from published import PUBLISHED


def number_of(config):
    return sum(math.prod(shape) for shape in shapes_of(config).values())


@pytest.mark.parametrize("model", MODELS)
def test_parameter_counts_are_the_published_ones(model):
    assert number_of(MODELS[model]) == PUBLISHED[model]


def test_options_of_a_config():
    """Of Llama: biases, tied embeddings, a width of heads of its own."""
    plain = {**MODELS["llama3-8b"], "num_hidden_layers": 1}
    number = number_of(plain)
    assert number_of({**plain, "attention_bias": True}) == number + 2 * (4096 + 1024)
    assert number_of({**plain, "mlp_bias": True}) == number + 2 * 14336 + 4096
    tied = {**plain, "tie_word_embeddings": True}
    assert number_of(tied) == number - 4096 * 128256
    assert number_of({**plain, "head_dim": 256}) == number + 4096 * 128 * (2 * 32 + 2 * 8)
    many = {**plain, "num_key_value_heads": None}
    assert number_of(many) == number + 2 * 4096 * (4096 - 1024)


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ("mixtral-8x7b", ["num_local_experts"]),
        ("qwen3-8b", ["head_dim", "tie_word_embeddings"]),
        ("gemma3-1b", ["head_dim"]),
        ("gemma3-4b", ["num_attention_heads", "num_key_value_heads", "vocab_size"]),
    ],
)
def test_what_a_config_may_lack(model, absent):
    """The published files leave out what is the default of their class."""
    config = json.loads(json.dumps(MODELS[model]))
    for name in absent:
        del config.get("text_config", config)[name]
    assert number_of(config) == PUBLISHED[model]
