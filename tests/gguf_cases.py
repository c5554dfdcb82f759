"""The models of llama_cases.py as GGUF files; who imports it is skipped without gguf."""

import pytest

import llama_cases

gguf = pytest.importorskip("gguf")

WORDS = [
    "a",
    "b",
    "c",
    "Ġ",
    "1",
    "2",
    "Ã",
    "©",
    "ab",
    "abc",
    "Ġa",
    "Ġab",
    "12",
    "ba",
    "<tool>",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = SPECIAL + WORDS + [f"[{x}]" for x in range(19)]
KINDS = [3] * 3 + [1] * 14 + [4] + [5] * 19
MERGES = ["a b", "ab c", "Ġ a", "Ġ ab", "1 2"]
ARCHES = {"llama2": "llama", "mistral": "llama", "smollm2": "llama", "qwen2": "qwen2"}
FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}


def write(path, name="smollm2", kind="F32", drop=(), tensors=None, **changes):
    """A case as a GGUF file, its fields changed; dots in their names are underscores."""
    config, arch = llama_cases.CONFIGS[name], ARCHES[name]
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        **{f"{arch}.{ours}": config.get(key) for ours, key in FIELDS.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        **changes.get("fields", {}),
    }
    if name == "mistral":
        fields["llama.attention.sliding_window"] = config["sliding_window"]
    for key, value in fields.items():
        if value is not None and key not in drop:
            writer.add_key_value(key, value, *_type(value))
    for key, array in {**_tensors(name, arch), **(tensors or {})}.items():
        if key not in drop:
            _add(writer, key, array, kind if array.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(value):
    types = gguf.GGUFValueType
    if isinstance(value, list):
        of = types.STRING if isinstance(value[0], str) else types.INT32
        return types.ARRAY, of
    kinds = {str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32}
    return (kinds[type(value)],)


def _add(writer, name, array, kind):
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _tensors(name, arch):
    """Under gguf's own names, queries and keys as llama.cpp's converter turns them."""
    config = llama_cases.CONFIGS[name]
    kinds = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(kinds[arch], config["num_hidden_layers"])
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    found = {}
    for key, array in llama_cases.tensors(name).items():
        ending = ".".join(key.split(".")[-2:])
        if arch == "llama" and ending in heads:
            halves = array.reshape(heads[ending], 2, -1, array.shape[1])
            array = halves.transpose(0, 2, 1, 3).reshape(array.shape)
        found[names.get_name(key, try_suffixes=(".weight", ".bias"))] = array
    return found
