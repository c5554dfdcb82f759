"""A text classification task that needs no download: whose docstring is this?

The docstrings of installed packages, read from their sources without importing them. The
label is the package; the names of all packages are masked in the text. Modules are
divided into a training and an evaluation part, so that no file is on both sides, and a
text that occurs twice is kept once.
"""

import ast
import hashlib
import importlib.util
import inspect
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator

from tqdm import tqdm

from text_data import Example

PACKAGES = (
    "numpy",
    "scipy",
    "jax",
    "flax",
    "optax",
    "orbax",
    "matplotlib",
    "sklearn",
    "sphinx",
    "hypothesis",
)
STANDARD = "python"  # the label of the standard library
ALIASES = ("np", "jnp", "plt", "mpl", "nnx", "scikit-learn", "pyplot", "cpython")
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SHORTEST, MOST = 60, 1200  # characters of a text; texts of a package
EVALUATED = 0.2  # share of the modules


def load(
    show: bool = False, texts: Callable[[pathlib.Path], Iterator[str]] | None = None
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to evaluate, from the packages that are installed.

    With `show`, how far it is; with `texts`, other texts of a file than docstrings.
    """
    masked = re.compile(
        r"(?<![A-Za-z0-9])(?:"
        + "|".join(map(re.escape, sorted((*PACKAGES, STANDARD, *ALIASES), key=len)[::-1]))
        + r")(?![A-Za-z0-9])",
        re.IGNORECASE,
    )
    seen: set[str] = set()
    parts: tuple[list[Example], list[Example]] = [], []
    for label, folder in places(show):
        left = [round((1 - EVALUATED) * MOST), round(EVALUATED * MOST)]
        for side, file in modules(label, folder):
            for text in (texts or docstrings)(file) if left[side] else ():
                text = masked.sub("[MASK]", " ".join(text.split()))
                if len(text) >= SHORTEST and text not in seen and left[side]:
                    seen.add(text)
                    parts[side].append((label, text))
                    left[side] -= 1
    return parts


def places(show: bool = False) -> Iterator[tuple[str, pathlib.Path]]:
    """Labels and folders of what is installed; with `show`, how far it is."""
    folders = {name: folder for name in PACKAGES if (folder := _folder(name))}
    folders[STANDARD] = pathlib.Path(sysconfig.get_paths()["stdlib"])
    yield from tqdm(sorted(folders.items()), "docstrings", disable=not show, leave=False)


def modules(label: str, folder: pathlib.Path) -> Iterator[tuple[bool, pathlib.Path]]:
    """A package's files, and whether each is to evaluate on.

    By a hash: any part of them, from the first on, is a fair sample.
    """
    files = [x for x in folder.rglob("*.py") if _is_source(x.relative_to(folder))]
    numbers = {x: _hash(label, x.relative_to(folder)) for x in files}
    for file in sorted(files, key=numbers.__getitem__):
        yield numbers[file] < EVALUATED, file


def nodes(file: pathlib.Path) -> Iterator[ast.AST]:
    """What a module's source consists of; nothing if it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from ast.walk(tree)


def docstrings(file: pathlib.Path) -> Iterator[str]:
    """Those of a module, its classes and its functions."""
    for node in nodes(file):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def _folder(package: str) -> pathlib.Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return pathlib.Path(places[0]) if places else None


def _is_source(file: pathlib.Path) -> bool:
    return not SKIPPED.intersection(file.parts) and "test" not in file.name


def _hash(label: str, file: pathlib.Path) -> float:
    """A number in [0, 1) that depends on the module's name alone."""
    digest = hashlib.sha256(f"{label}/{file.as_posix()}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
