"""What the programs have in common: arguments, files to be written, what is going on."""

import argparse
import contextlib
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(kind: type) -> Callable:
    """A finite number of the given type above zero, for argparse."""

    def convert(text: str):
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError(text)
        return number

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def add_quiet(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="nothing but the result")


def check_file(parser: Parser, option: str, file: pathlib.Path) -> None:
    """One line and the end, if a file cannot be written; else all is left as it is."""
    there = os.path.lexists(file)
    try:
        file.open("ab").close()
        if not there:
            file.unlink()
    except OSError as error:
        parser.error(f"{option}: cannot write {file}: {error.strerror}")


def check_picture(parser: Parser, option: str, file: pathlib.Path) -> None:
    """The same for what matplotlib shall draw."""
    check_ending(parser, option, file)
    check_file(parser, option, file)


def check_ending(parser: Parser, option: str, file: pathlib.Path) -> None:
    """One line and the end, if matplotlib cannot draw such a file."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted({*FigureCanvasBase.get_supported_filetypes()} - {"pgf"})  # needs TeX
    if file.suffix[1:].lower() not in known:
        endings = ", ".join(known)
        parser.error(f"{option}: {file} must end in a dot and one of {endings}")


def check_folder(
    parser: Parser, option: str, folder: pathlib.Path, keep: bool = True
) -> None:
    """The same for a folder, which is made if it is not there, to `keep` it or not."""
    place = pathlib.Path(os.path.abspath(folder))
    new = [x for x in (place, *place.parents) if not os.path.lexists(x)]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except FileExistsError:
        parser.error(f"{option}: {folder} is no folder")
    except OSError as error:
        parser.error(f"{option}: cannot write in {folder}: {error.strerror}")
    finally:
        for x in () if keep else new:
            with contextlib.suppress(OSError):
                x.rmdir()


def check_readable(parser: Parser, option: str, file: pathlib.Path) -> None:
    """One line and the end, if a file cannot be read."""
    try:
        file.open("rb").close()
    except OSError as error:
        parser.error(f"{option}: cannot read {file}: {error.strerror}")


def counted(number: int, what: str) -> str:
    """Such as `1 step` and `2 steps`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


@contextlib.contextmanager
def compiling(what: str, quiet: bool = False) -> Iterator[None]:
    """Says at once what is being compiled, and then how long it took."""
    began = time.perf_counter()
    if not quiet:
        print(f"compiling {what} ...", end=" ", file=sys.stderr, flush=True)
    yield
    if not quiet:
        print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
