"""Where the CPU kernel's time goes: nanoseconds a parameter of each line of a block.

    python benchmarks/cpu_parts.py [--parameters MILLIONS] [--repeats N]

`cpu_block.update_block` is compiled with a question before each of its lines, whether it
is to be run. The first n lines are timed for every n, on one core, over random gradients
and the state that some steps have left: a line costs the difference.
"""

import argparse
import ast
import collections
import inspect
import itertools
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numba.core.types import float32, uint8, uint16

from common import report
from microadam_optax._kernels import cpu_block, cpu_data
from microadam_optax._kernels.cpu_llvm import pointer

SETTINGS = {"(2, 6 %)": (2, 0.06), "(1, 25 %)": (1, 0.25), "(10, 1 %)": (10, 0.01)}
BLOCKS = (256, 232, 64)
BITS = 4
STEPS = 20  # before any is timed
Shape = collections.namedtuple("Shape", [*cpu_data.Shape._fields, "lines"])


def numbered(body: list[ast.stmt], windowed: bool, names: list[str]) -> list[ast.stmt]:
    """Statements of `update_block`, each under a question; their text goes to names."""
    found = []
    for line in body:
        text = ast.unparse(line)
        if isinstance(line, ast.If) and "slots == 0" in text.splitlines()[0]:
            found += numbered(line.orelse if windowed else line.body, windowed, names)
        elif isinstance(line, ast.If) and "alpha" in text.splitlines()[0]:
            continue
        elif isinstance(line, ast.If) and "slots > 0" in text.splitlines()[0]:
            found += numbered(line.body if windowed else [], windowed, names)
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue
        else:
            asked = ast.parse(f"if shape.lines > {len(names)}: pass").body[0]
            asked.body = [line]  # type: ignore[attr-defined]
            names.append(text.split("(")[0].split("= ")[-1])
            found.append(asked)
    return found


def in_lines(windowed: bool) -> tuple[Any, list[str]]:
    """The module `cpu_block` with questions, and the names of its block's lines."""
    tree, names = ast.parse(inspect.getsource(cpu_block)), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "update_block":
            node.body = numbered(node.body, windowed, names)
    module = types.ModuleType("cpu_block_in_lines")
    exec(compile(ast.fix_missing_locations(tree), "cpu_block", "exec"), vars(module))
    return module, names


def driver(block: Any) -> Any:
    """A compiled function that runs the first lines of all blocks of some arrays."""
    leaf_of, row_of, factors_of = cpu_data.Leaf, cpu_data.Row, cpu_data.Factors
    update_rows, same = block.update_rows, cpu_data.same

    @njit(error_model="numpy")
    def run(addresses, numbers, lines):
        size, parts, width, lanes, k, slots, rows = numbers
        shape = Shape(
            size, parts, width, lanes, lanes * parts, BITS, k, slots, 0, 1, lines
        )
        weights = pointer(addresses[5], float32)
        one, zero = float32(1), float32(0)
        factors = factors_of(one, one, float32(1e-8), zero, weights, zero, one)
        gradient = pointer(addresses[0], float32)
        arrays = row_of(
            gradient,
            gradient,
            pointer(addresses[1], uint8),
            pointer(addresses[2], uint16),
            pointer(addresses[3], uint8),
            pointer(addresses[4], uint16),
            0,
        )
        update_rows(arrays, 0, rows, factors, leaf_of(shape, size, 1), same, same)

    return run


class Case:
    """A leaf and its state, in numpy's memory."""

    def __init__(self, size: int, window: int, density: float, parameters: int):
        self.rows, self.slots = parameters // size, window - 1
        parts = 8 // BITS
        width = size // parts
        k = -int(-size * density // 1)
        numbers = size, parts, width, -(-width // 32) * 32, k, self.slots, self.rows
        self.numbers = tuple(map(int, numbers))
        stored = max(1, self.slots * k)
        self.fresh = np.random.default_rng(0).standard_normal(
            (self.rows, size), np.float32
        )
        self.arrays = [
            self.fresh.copy(),
            np.zeros((self.rows, width), np.uint8),
            np.zeros((self.rows, 2), np.uint16),
            np.tile((np.arange(stored) % size).astype(np.uint8), (self.rows, 1)),
            np.zeros((self.rows, stored), np.uint16),
            0.9 ** np.arange(2 * stored, dtype=np.float32),
        ]

    def seconds(self, run: Any, lines: int) -> float:
        np.copyto(self.arrays[0], self.fresh)
        addresses = tuple(x.ctypes.data for x in self.arrays)
        began = time.thread_time()
        run(addresses, self.numbers, lines)
        return time.thread_time() - began


def profile(case: Case, run: Any, count: int, repeats: int) -> Iterator[float]:
    """Nanoseconds a parameter of each of the lines."""
    for _ in range(STEPS):
        case.seconds(run, count)
    rounds = [[case.seconds(run, n) for n in range(count + 1)] for _ in range(repeats)]
    whole = [min(x) / case.fresh.size * 1e9 for x in zip(*rounds, strict=True)]
    return (after - before for before, after in itertools.pairwise(whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1, metavar="MILLIONS")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = []
    for windowed in (True, False):
        block, names = in_lines(windowed)
        run = driver(block)
        for setting, (window, density) in SETTINGS.items():
            for size in BLOCKS if (window > 1) == windowed else ():
                case = Case(size, window, density, int(args.parameters * 2**20))
                times = list(profile(case, run, len(names), args.repeats))
                rows.append(
                    {"setting": setting, "block": size, "total": sum(times)}
                    | {"lines": dict(zip(names, times, strict=True))}
                )
                print(f"{setting}, blocks of {size}: {sum(times):.2f} ns a parameter")
                for name, spent in zip(names, times, strict=True):
                    print(f"  {name:16} {spent:5.2f}")
    report("cpu_parts", {"rows": rows})


if __name__ == "__main__":
    main()
