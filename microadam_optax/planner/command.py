"""The command `microadam-memory`: what a model and its optimizer need on a device."""

import argparse
import json
import math
import pathlib
import sys
from typing import Any

from microadam_optax.planner.models import shapes_of
from microadam_optax.planner.plans import DEVICES_GB, DTYPES, Plan, plan
from microadam_optax.planner.sizes import MODELS


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
    """Prints what is the same for all rows, and the table of the rest."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    several = args.devices > 1
    a_device = " a device" if several else ""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False
    )
    table.add_column(f"GB{a_device}")
    for name in ("state", "B/param", "sum", "fits in"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        fits = row.fits()
        table.add_row(
            row.optimizer,
            f"{row.state / 1e9:.2f}",
            f"{row.state * args.devices / number:.3f}",
            f"{row.sum / 1e9:.2f}",
            f"{fits[0]} GB" if fits else "none",
        )
    console = Console(highlight=False)
    title = f"{args.model}: {number:,} parameters, {args.params_dtype}"
    console.print(title + (f", {args.devices} devices" if several else ""), style="bold")
    console.print(
        f"parameters {rows[0].parameters / 1e9:.2f} GB, "
        f"gradients {rows[0].gradients / 1e9:.2f} GB{a_device}\n"
    )
    console.print(table)
    sizes, small = ", ".join(map(str, DEVICES_GB)), "no leaf is dense"
    if args.dense_below:
        small = f"leaves of fewer than {args.dense_below:,} elements are dense"
    console.print(
        "\nMoments have the parameters' dtype, as in optax, unless named. In MicroAdam "
        f"{small}. B/param is the state's; sum is with parameters and gradients. Fits "
        f"in: the least of {sizes} GB a device; activations and temporaries come on top.",
        style="dim",
    )


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
