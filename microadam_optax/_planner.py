"""The command `microadam-memory`: what a model and its optimizer need on a device."""

import argparse
import json
import math
import pathlib
import sys
from collections import Counter
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
Shape = tuple[int, ...]
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


class Candidate(NamedTuple):
    """An optimizer, and the dtype of the parameters that it is initialized with."""

    name: str
    tx: optax.GradientTransformation
    dtype: str


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """Those that are compared; optax's moments have the parameters' dtype."""
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
    own, adam = args.params_dtype, optax.adam(RATE)
    rows = [Candidate(f"Adam, {own} moments", adam, own)]
    if own == "float32":
        half = optax.adam(RATE, mu_dtype=jnp.bfloat16)
        rows.append(Candidate("Adam, mu in bfloat16", half, own))
    else:
        rows.append(Candidate("Adam, float32 moments", adam, "float32"))
    galore = optax.contrib.galore(RATE, rank=GALORE_RANK)
    others = {
        "Lion": optax.lion(RATE),
        "Adafactor": optax.adafactor(RATE),
        f"GaLore, rank {GALORE_RANK}": galore,
        f"MicroAdam {setting}": ours,
    }
    return rows + [Candidate(name, tx, own) for name, tx in others.items()]


def plan(config: dict[str, Any], args: argparse.Namespace) -> list[Plan]:
    """For each optimizer, with everything sharded by the first axis that divides."""
    mesh = AbstractMesh((args.devices,), ("fsdp",))

    def place(shape: Shape) -> NamedSharding:
        divided = [n % args.devices == 0 for n in shape]
        axis = divided.index(True) if any(divided) else None
        spec = () if axis is None else (None,) * axis + ("fsdp",)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shapes = [(s, place(s), n) for s, n in Counter(shapes_of(config).values()).items()]

    def weights(dtype: str) -> int:
        return sum(
            n * array_bytes(jax.ShapeDtypeStruct(shape, dtype), at)
            for shape, at, n in shapes
        )

    def state(row: Candidate) -> int:
        # Each leaf has its own part beside what is there without any: of equal leaves
        # one is enough, however many layers there are.
        shared = optimizer_bytes(row.tx, ())
        leaves = ((jax.ShapeDtypeStruct(s, row.dtype), at, n) for s, at, n in shapes)
        return shared + sum(
            n * (optimizer_bytes(row.tx, leaf, at) - shared) for leaf, at, n in leaves
        )

    parameters = weights(args.params_dtype)
    gradients = weights(args.gradients_dtype or args.params_dtype)
    return [Plan(row.name, parameters, gradients, state(row)) for row in candidates(args)]


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
