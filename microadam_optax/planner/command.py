"""The command `microadam-memory`: what a model and its optimizer need on a device.

Parameters, gradients and state are counted, from shapes: activations and temporaries are
not. Layer by layer, the gradients of one layer exist at a time, beside those of all that
is in no layer, such as embeddings and head. `optax.MultiSteps` and `accumulate` take a
step with several micro-batches; what they keep in between counts as state.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
from typing import Any

from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.plans import DEVICES_GB, DTYPES, Plan, plan
from microadam_optax.planner.sizes import MODELS
from microadam_optax.planner.ways import BY_LAYER, ORDINARY


def read_config(model: str) -> dict[str, Any]:
    """A built-in model's, or that of a file or a folder; ValueError if it is none."""
    if model in MODELS:
        return MODELS[model]
    path = pathlib.Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise ValueError(f"the folder {model!r} has no config.json")
        known = ", ".join(MODELS)
        raise ValueError(f"{model!r} is neither a file nor one of {known}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return config


def show(rows: list[Plan], args: argparse.Namespace, number: int) -> None:
    """Prints what is the same for many rows, and the table of the rest."""
    from rich.console import Console

    several = args.devices > 1
    a_device = " a device" if several else ""
    gradients = {row.way: f"{row.gradients / 1e9:.2f} GB" for row in rows}
    console = Console(highlight=False)
    title = f"{args.model}: {number:,} parameters, {args.params_dtype}"
    console.print(title + (f", {args.devices} devices" if several else ""), style="bold")
    console.print(
        f"parameters {rows[0].parameters / 1e9:.2f} GB, gradients "
        f"{gradients[ORDINARY.name]}{a_device}, {gradients[BY_LAYER]} {BY_LAYER}\n"
    )
    console.print(_table(rows, args.devices, number, f"GB{a_device}"))
    sizes, small = ", ".join(map(str, DEVICES_GB)), "no leaf is dense"
    if args.dense_below:
        small = f"leaves of fewer than {args.dense_below:,} elements are dense"
    console.print(
        "\nMoments have the parameters' dtype, as in optax, unless named. In MicroAdam "
        f"{small}. B/param is the state's, with what MultiSteps and accumulate keep "
        "between micro-batches; sum is with parameters and gradients, layer by layer "
        "those of one layer and of what is in none. Fits in: the least of "
        f"{sizes} GB a device; activations and temporaries come on top.",
        style="dim",
    )


def _table(rows: list[Plan], devices: int, number: int, title: str) -> Any:
    """A part for each way to take a step."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False
    )
    table.add_column(title)
    for name in ("state", "B/param", "sum", "fits in"):
        table.add_column(name, justify="right", no_wrap=True)
    for way, of in itertools.groupby(rows, lambda row: row.way):
        table.add_row(f"[bold]{way}[/bold]")
        for row in of:
            table.add_row(*_cells(row, devices, number))
        table.add_section()
    return table


def _cells(row: Plan, devices: int, number: int) -> list[str]:
    fits = row.fits()
    return [
        row.optimizer,
        f"{row.state / 1e9:.2f}",
        f"{row.state * devices / number:.3f}",
        f"{row.sum / 1e9:.2f}",
        f"{fits[0]} GB" if fits else "none",
    ]


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive integer"


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


_count.__name__ = "non-negative integer"


def make_parser() -> _Parser:
    """The arguments of the command."""
    parser = _Parser(prog="microadam-memory", description=__doc__)
    add = parser.add_argument
    add("model", help=f"a config.json or its folder, or one of {', '.join(MODELS)}")
    add("--params-dtype", choices=DTYPES, default="bfloat16")
    add("--gradients-dtype", choices=DTYPES, help="that of the parameters")
    add("--devices", type=_positive, default=1, help="over which all is sharded")
    add("--window", type=int, default=2)
    add("--density", type=float, default=0.06)
    add("--block-size", type=int, default=256)
    add("--error-bits", type=int, default=4)
    below = "leaves of fewer elements are not compressed; 0 for none"
    add("--dense-below", type=_count, default=4096, metavar="N", help=below)
    add("--json", action="store_true", help="figures in bytes instead of a table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Prints the plan; the status is 2 after one line if it cannot be made."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        config = read_config(args.model)
        number = sum(map(math.prod, shapes_of(config).values()))
        rows = plan(config, args)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if args.json:
        found = [{**row._asdict(), "sum": row.sum, "fits_gb": row.fits()} for row in rows]
        whole = {"model": args.model, "parameters": number, "devices": args.devices}
        print(json.dumps({**whole, "bytes_a_device": found}, indent=1))
        return 0
    try:
        show(rows, args, number)
    except ModuleNotFoundError:
        parser.error("the table needs rich: pip install rich, or use --json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
