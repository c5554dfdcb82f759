"""A Llama's weights in a folder's model.safetensors or its shards."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from llama import Params
from llama_config import Config
from llama_weights import PUBLISHED, assemble, check_tensors, weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}


class Stored(NamedTuple):
    """A tensor in an opened file."""

    file: pathlib.Path
    opened: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.name).get_shape())

    def dtype(self) -> str:
        return self.opened.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.opened.get_tensor(self.name)


def read_params(folder: pathlib.Path, config: Config, dtype, place, show: bool) -> Params:
    """The folder's parameters, as `llama_weights.assemble` makes them.

    Raises:
      FileNotFoundError: naming a shard that is missing.
      ValueError: naming a tensor that is missing, unknown or of another shape or kind.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Stored] = {}
        for file in _weight_files(folder):
            with naming(file):
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            tensors |= {name: Stored(file, opened, name) for name in list(opened.keys())}
        _drop_unused(config, tensors, folder)
        expected = {x.name: x.shape for x in weights(config, PUBLISHED)}
        found = {name: tensor.shape() for name, tensor in tensors.items()}
        check_tensors(str(folder), found, expected)
        for name, tensor in tensors.items():
            if tensor.dtype() not in FLOATS:
                kinds = ", ".join(sorted(FLOATS))
                raise ValueError(
                    f"{tensor.file}: {name} must be one of {kinds}, got {tensor.dtype()}"
                )
        read = {name: tensor.read for name, tensor in tensors.items()}
        return assemble(config, PUBLISHED, lambda x: read[x](), dtype, place, show)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {name!r} is no name of a shard")
        if not (folder / name).is_file():
            raise FileNotFoundError(2, "No such file", str(folder / name))
    return [folder / name for name in names]


def _drop_unused(config: Config, tensors: dict[str, Stored], folder) -> None:
    """Takes out tables that are computed, and makes one of a tied embedding and head."""
    for name in [x for x in tensors if x.endswith(".rotary_emb.inv_freq")]:
        del tensors[name]
    embed, head = PUBLISHED["embed"], PUBLISHED["head"]
    if config.tied and head in tensors:
        tied = tensors.pop(head)
        if not _same(tensors.setdefault(embed, tied), tied):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {head} differs from {embed}"
            )


def _same(a: Stored, b: Stored) -> bool:
    if a is b:
        return True
    if a.shape() != b.shape():
        return False
    return np.array_equal(a.read(), b.read())


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a file; ValueError if there is none."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


@contextlib.contextmanager
def naming(file: pathlib.Path) -> Iterator[None]:
    """Names the file in what is wrong with it."""
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
