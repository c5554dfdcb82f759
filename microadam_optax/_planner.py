"""The command `microadam-memory`: what a model and its optimizer need on a device."""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from microadam_optax._dense import smaller_than
from microadam_optax._microadam import microadam
from microadam_optax._models import MODELS, shapes_of
from microadam_optax.memory import array_bytes, optimizer_bytes

DEVICES_GB = (16, 24, 40, 80, 141)
GALORE_RANK = 128
DTYPES = ("float32", "bfloat16", "float16")
RATE = 1e-3  # plays no part in what is held


class Plan(NamedTuple):
    """Bytes on one device with one optimizer; activations are not among them."""

    optimizer: str
    parameters: int
    gradients: int
    state: int

    @property
    def sum(self) -> int:
        return self.parameters + self.gradients + self.state

    def fits(self) -> list[int]:
        return [size for size in DEVICES_GB if self.sum <= size * 1e9]


def transformations(args: argparse.Namespace) -> dict[str, optax.GradientTransformation]:
    """Those that are compared; moments are float32 unless said."""
    dense = smaller_than(args.dense_below) if args.dense_below else None
    ours = microadam(
        RATE,
        window=args.window,
        density=args.density,
        block_size=args.block_size,
        error_bits=args.error_bits,
        dense=dense,
    )
    setting = f"({args.window}, {100 * args.density:g} %), {args.error_bits} bits"
    return {
        "Adam": optax.adam(RATE),
        "Adam, mu in bfloat16": optax.adam(RATE, mu_dtype=jnp.bfloat16),
        "Lion": optax.lion(RATE),
        "Adafactor": optax.adafactor(RATE),
        f"GaLore, rank {GALORE_RANK}": optax.contrib.galore(RATE, rank=GALORE_RANK),
        f"MicroAdam {setting}": ours,
    }


def plan(config: dict[str, Any], args: argparse.Namespace) -> list[Plan]:
    """For each optimizer, with everything sharded by the first axis that divides."""
    mesh = AbstractMesh((args.devices,), ("fsdp",))

    def place(shape: tuple[int, ...]) -> NamedSharding:
        divided = [n % args.devices == 0 for n in shape]
        axis = divided.index(True) if any(divided) else None
        spec = () if axis is None else (None,) * axis + ("fsdp",)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shapes = shapes_of(config)
    places = {name: place(shape) for name, shape in shapes.items()}

    def of(dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {x: jax.ShapeDtypeStruct(shape, dtype) for x, shape in shapes.items()}

    parameters = array_bytes(of(args.params_dtype), places)
    gradients = array_bytes(of(args.gradients_dtype or args.params_dtype), places)
    moments = of(jnp.float32)
    return [
        Plan(name, parameters, gradients, optimizer_bytes(tx, moments, places))
        for name, tx in transformations(args).items()
    ]


def read_config(model: str) -> dict[str, Any]:
    """A built-in model's, or that of a file or a folder; ValueError if it is none."""
    if model in MODELS:
        return MODELS[model]
    path = pathlib.Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        known = ", ".join(MODELS)
        raise ValueError(f"{model!r} is neither a file nor one of {known}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return config


def show(rows: list[Plan], title: str, number: int, devices: int) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("GB a device" if devices > 1 else "GB", no_wrap=True)
    for name in ("params", "grads", "state", "sum", "B/param", "fits in"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.parameters, row.gradients, row.state, row.sum)
        fits = row.fits()
        table.add_row(
            row.optimizer,
            *(f"{figure / 1e9:.2f}" for figure in figures),
            f"{row.state * devices / number:.3f}",
            f"{fits[0]} GB" if fits else "none",
        )
    console = Console()
    console.print(table)
    sizes = ", ".join(map(str, DEVICES_GB))
    console.print(
        f"B/param is the state's. Fits in: the least of {sizes} GB a device; "
        "activations and temporaries come on top.",
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


def make_parser() -> _Parser:
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
    add("--dense-below", type=int, default=0, metavar="N", help="elements of a leaf")
    add("--json", action="store_true", help="figures in bytes instead of a table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Prints the plan; the status is 2 after one line if it cannot be made."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        config = read_config(args.model)
        number = array_bytes(
            {x: jax.ShapeDtypeStruct(s, jnp.int8) for x, s in shapes_of(config).items()}
        )
        rows = plan(config, args)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if args.json:
        found = [{**row._asdict(), "sum": row.sum, "fits_gb": row.fits()} for row in rows]
        whole = {"model": args.model, "parameters": number, "devices": args.devices}
        print(json.dumps({**whole, "bytes_a_device": found}, indent=1))
        return 0
    title = f"{args.model}: {number:,} parameters, {args.params_dtype}"
    title += f", {args.devices} devices" if args.devices > 1 else ""
    try:
        show(rows, title, number, args.devices)
    except ModuleNotFoundError:
        parser.error("the table needs rich: pip install rich, or use --json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
