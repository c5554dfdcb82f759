"""Where a Llama's weights lie in files, and stacking them layer by layer."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from llama import Params, param_shapes
from llama_config import Config

# Our leaves under their names in Hugging Face's checkpoints, a layer's number in braces.
PUBLISHED = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/q": "model.layers.{}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{}.self_attn.v_proj.weight",
    "layers/o": "model.layers.{}.self_attn.o_proj.weight",
    "layers/q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
}


class Source(NamedTuple):
    """What a model's files say besides its weights, for saving it again."""

    path: str
    config: dict[str, Any]  # as in config.json
    files: dict[str, bytes]  # of the tokenizer and of generation, by name


class Weight(NamedTuple):
    """A tensor of a file: a leaf, or a layer's part of one."""

    leaf: str
    layer: int | None
    name: str
    shape: tuple[int, ...]  # as it is stored


def weights(config: Config, names: dict[str, str]) -> Iterator[Weight]:
    """All tensors of a file that calls them by `names`, leaf after leaf."""
    for leaf, shape in leaves(config):
        stacked = leaf.startswith("layers/")
        stored = turned(leaf, shape[1:] if stacked else shape)
        for layer in range(config.num_layers) if stacked else (None,):
            yield Weight(leaf, layer, names[leaf].format(layer), stored)


def leaves(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Names such as ``layers/q``, and shapes."""
    shapes = param_shapes(config)
    layers = shapes.pop("layers")
    return [*shapes.items(), *((f"layers/{x}", shape) for x, shape in layers.items())]


def turned(leaf: str, array):
    """An array or a shape from our orientation to the files', and back."""
    if leaf == "embed":
        return array
    return array.T if isinstance(array, np.ndarray) else array[::-1]


def check_tensors(
    where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """ValueError that names the first tensor missing, of another shape or unknown."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where} has no tensor {name}")
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has the shape {found[name]}, not {shape}")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise ValueError(
            f"{where} has a tensor that the config has no place for: {unknown[0]}"
        )


def assemble(
    config: Config,
    names: dict[str, str],
    read: Callable[[str], np.ndarray],
    dtype,
    place: Callable[[str, np.ndarray], jax.Array],
    show: bool = False,
) -> Params:
    """Parameters from a file's tensors, of which one at a time is in memory.

    Args:
      config: the model's.
      names: of the tensors in the file, by leaf.
      read: a tensor by its name there.
      dtype: of the parameters.
      place: an array on the device, from a leaf's name and its stacked array.
      show: whether a bar says how far it is.

    Returns:
      The parameters as `llama` takes them.
    """
    params: Params = {"layers": {}}
    shapes, last = dict(leaves(config)), (None, config.num_layers - 1)
    found = list(weights(config, names))
    for weight in tqdm(found, "weights", disable=not show, leave=False):
        if weight.layer in (None, 0):
            array = np.empty(shapes[weight.leaf], dtype)
        at = ... if weight.layer is None else weight.layer
        array[at] = turned(weight.leaf, read(weight.name))
        if weight.layer in last:
            *stacked, name = weight.leaf.split("/")
            (params["layers"] if stacked else params)[name] = place(weight.leaf, array)
    return params


def disassemble(params: Params, weight: Weight) -> np.ndarray:
    """A tensor as Hugging Face stores it, on the host."""
    *stacked, name = weight.leaf.split("/")
    leaf = (params["layers"] if stacked else params)[name]
    array = np.asarray(leaf if weight.layer is None else leaf[weight.layer])
    return np.ascontiguousarray(turned(weight.leaf, array))
