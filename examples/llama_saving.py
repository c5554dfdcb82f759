"""A Llama-family model to a folder that transformers loads."""

import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from llama import Params, num_params
from llama_config import Config, config_from_json, config_to_json
from llama_safetensors import INDEX, WEIGHTS
from llama_weights import PUBLISHED, Source, Weight, disassemble, weights

SHARD_BYTES = 2 * 2**30
PROGRAM = "microadam_optax"
TOKENS = {"bos_token": "bos_id", "eos_token": "eos_id"}


def save(
    folder: str | pathlib.Path,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    source: Source | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, weights and the tokenizer's files, all of them or none.

    Args:
      folder: where to; one that `save` made before is replaced.
      config: the model's.
      params: of `llama`; the weights are written in the embedding's dtype.
      tokenizer: written where `source` has none.
      source: of the model that was loaded; its files of the tokenizer, of chat templates
        and of generation go along unchanged.
      shard_bytes: weights beyond this go to several files; so much is copied at a time.

    Raises:
      ValueError: where `check_output` does.
    """
    folder = pathlib.Path(folder).resolve()
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    empty = folder.is_dir() and not any(folder.iterdir())  # it may be a mounted volume
    beside = folder if empty else folder.parent
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside))
    try:
        made.chmod(0o777 & ~_umask())
        _write_config(made, config, params["embed"].dtype, source)
        _write_tokenizer(made, config, tokenizer, source)
        _write_weights(made, config, params, shard_bytes)
        _move_up(made) if empty else _replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_output(folder: str | pathlib.Path) -> None:
    """ValueError for a folder that `save` did not write, or that cannot be written."""
    folder = pathlib.Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is there and is no folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise ValueError(
            f"{folder} has files that were not saved by this program; name an empty or "
            "a new folder"
        )
    empty = folder.is_dir() and not any(folder.iterdir())
    places = (folder, *folder.parents) if empty else folder.parents
    there = next(place for place in places if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {there} is not writable")


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether its weights name this program, and all files that are there."""
    shards = sorted(folder.glob("model*.safetensors"))
    try:
        with safe_open(shards[0], framework="numpy") as opened:
            said = opened.metadata() or {}
    except (IndexError, SafetensorError, OSError):
        return False
    there = {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}
    return said.get("made_by") == PROGRAM and there <= set(said["files"].split("\n"))


def _write_config(made: pathlib.Path, config: Config, dtype, source) -> None:
    found = config_to_json(config)
    if source is not None and config_from_json(source.config) == config:
        found = dict(source.config)
    new = "dtype" in found or "rope_parameters" in found  # as transformers 5 writes it
    found.pop("torch_dtype", None)
    found["dtype" if new else "torch_dtype"] = jnp.dtype(dtype).name
    _write_json(made / "config.json", found)


def _write_tokenizer(
    made: pathlib.Path, config: Config, tokenizer: Tokenizer, source: Source | None
) -> None:
    files = dict(source.files) if source else {}
    files.setdefault("tokenizer.json", tokenizer.to_str(pretty=True).encode())
    if "tokenizer_config.json" not in files:
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, ours in TOKENS.items():
            if getattr(config, ours) is not None:
                settings[name] = tokenizer.id_to_token(getattr(config, ours))
        files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    for name, content in files.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(content)


def _write_weights(
    made: pathlib.Path, config: Config, params: Params, shard_bytes: int
) -> None:
    dtype = params["embed"].dtype
    groups = _groups(list(weights(config, PUBLISHED)), dtype.itemsize, shard_bytes)
    numbers = range(1, len(groups) + 1)
    files = [f"model-{x:05}-of-{len(groups):05}.safetensors" for x in numbers]
    files = [WEIGHTS] if len(groups) == 1 else files
    beside = [x.relative_to(made).as_posix() for x in made.rglob("*") if x.is_file()]
    listed = "\n".join(sorted([*beside, *files, INDEX]))
    metadata = {"format": "pt", "made_by": PROGRAM, "files": listed}
    for file, group in zip(files, groups, strict=True):
        tensors = {x.name: disassemble(params, x).astype(dtype) for x in group}
        try:
            save_file(tensors, made / file, metadata=metadata)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{made / file}: {error}") from None
        (made / file).chmod(0o666 & ~_umask())  # the library's files are private
    if len(groups) > 1:
        places = zip(files, groups, strict=True)
        index = {
            "metadata": {"total_size": num_params(config) * dtype.itemsize},
            "weight_map": {x.name: file for file, group in places for x in group},
        }
        _write_json(made / INDEX, index)


def _groups(found: list[Weight], itemsize: int, limit: int) -> list[list[Weight]]:
    """Weights in their order, those of a group of at most so many bytes."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in found:
        size += math.prod(weight.shape) * itemsize
        if size > limit and groups[-1]:
            groups.append([])
            size = math.prod(weight.shape) * itemsize
        groups[-1].append(weight)
    return groups


def _move_up(made: pathlib.Path) -> None:
    """Leaves what is in a folder in the one around it, the weights last."""
    for file in sorted(made.iterdir(), key=lambda x: x.suffix == ".safetensors"):
        file.rename(made.parent / file.name)


def _replace(made: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts one folder in the other's place, which is there until the last moment."""
    if not folder.is_dir():
        made.rename(folder)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(old / "old")
    try:
        made.rename(folder)
    except OSError:
        (old / "old").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _umask() -> int:
    """That of the process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
