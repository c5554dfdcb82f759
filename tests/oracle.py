"""MicroAdam in float64 NumPy and plain loops: it decides who is right.

Written from the equations in docs/algorithm.md; imports nothing of the package.

The state is discrete: indices, bfloat16 values and ranges, codes. So rounding
cannot accumulate: from equal states, float32 and float64 arithmetic give equal new
states unless a decision (which entry is k-th, which code or bfloat16 is nearest)
lies closer to its boundary than float32's rounding error. The oracle bounds that
error for every decision. `agree` demands equality where the boundary is farther
away, and neighbours where it is not; there the oracle goes on with the other
side's choice, and counts it as a doubt.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

HALF_ULP = 2.0**-24  # relative rounding error of float32
LARGEST = 2.0**60  # gradients saturate there


@dataclasses.dataclass
class Options:
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    window: int = 10
    density: float = 0.01
    block_size: int = 256
    bits: int = 4
    shards: int = 8
    alpha: float = 0.0


@dataclasses.dataclass
class Block:
    """State of one block: the error, and a dict index -> value a step."""

    points: list  # multiples of the step
    step: float
    zero: int  # what is added to a point to store it
    window: list  # newest first, at most window - 1 dicts


@dataclasses.dataclass
class Doubt:
    """Decisions that float32's rounding may take either way."""

    selection: bool = False
    values: set = dataclasses.field(default_factory=set)
    ranges: bool = False
    codes: set = dataclasses.field(default_factory=set)

    def number(self) -> int:
        return self.selection + len(self.values) + self.ranges + len(self.codes)


def blocks_of(shape: tuple, options: Options) -> list:
    """For every block, the flat indices of its elements in the leaf, in order.

    Also the length of a block, which the last one of a cell may not fill.
    """
    rank, size = len(shape), math.prod(shape)
    grid = [1] * rank
    if size and rank:
        first = rank - 1
        while first > 0 and math.prod(shape[first:]) < options.block_size:
            first -= 1
        grid[:first] = shape[:first]
        length = math.prod(shape[first:])
        for g in range(1, options.shards + 1):
            fits = options.shards % g == 0 and shape[first] % g == 0
            if fits and (g == 1 or length / g >= 64):
                grid[first] = g
    order = np.arange(size).reshape(shape)
    cells = []
    for corner in np.ndindex(*grid):
        box = tuple(
            slice(i * (n // g), (i + 1) * (n // g))
            for i, n, g in zip(corner, shape, grid, strict=True)
        )
        cells.append(list(order[box].ravel()))
    q = len(cells[0])
    number = max(1, math.ceil(q / options.block_size))
    b = min(8 * math.ceil(max(1, math.ceil(q / number)) / 8), options.block_size)
    return [cell[i * b : (i + 1) * b] for cell in cells for i in range(number)], b


def new_block(b: int) -> Block:
    return Block([0] * b, 0.0, 0, [])


def bfloat16(x: float, error: float = 0.0) -> tuple[float, bool]:
    """x rounded to bfloat16, and whether an error of that size could change it."""
    low, nearest, high = (
        float(np.float64(y).astype(ml_dtypes.bfloat16)) for y in (x - error, x, x + error)
    )
    return nearest, low != high


def round16(x: float) -> float:
    """x rounded to 16 significant bits, ties to even."""
    if x == 0:
        return 0.0
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, 16)), exponent - 16)


def decode(block: Block) -> list:
    return [point * block.step for point in block.points]


def encode(rest, errors, bits, noise, doubt):
    """Points, step and code of zero of a list of numbers known up to `errors`."""
    f = np.float32
    rest, errors = [*rest, 0.0], [*errors, 0.0]
    lowest = min(range(len(rest)), key=lambda i: rest[i])
    highest = max(range(len(rest)), key=lambda i: rest[i])
    low, high, unsure = rest[lowest], rest[highest], errors[lowest] + errors[highest]
    share = f(1.004 / (2**bits - (1 if noise is None else 2)))
    step = float((f(high) - f(low)) * share)  # as float32 has it, if these are exact
    error = 0.0 if unsure == 0 else unsure * float(share) + 4 * HALF_ULP * step
    step, doubt.ranges = bfloat16(step, error)
    if step < 2.0**-100:
        return [0] * (len(rest) - 1), 0.0, 0
    half, points = 0.5 if noise is None else 0.0, []
    for i, x in enumerate(rest):
        ratio = x / step  # float64, exact enough to decide what float32's x is
        point = math.floor(ratio + half)
        margins = [abs(ratio + half - round(ratio + half))]
        if noise is not None and i < len(noise):
            draw = float(f(noise[i]) * f(step))
            margins.append(abs(draw - (x - point * step)) / step)
            point += draw < x - point * step
        if errors[i] and min(margins) <= errors[i] / step:
            doubt.codes.add(i)
        points.append(point)
    return points[:-1], step, -math.floor(low / step + half)


def step(gradient, block: Block, count: int, options: Options, noise=(None, None)):
    """One step of a block: update, its tolerance, new state and doubts.

    `gradient` may be shorter than the block; the rest is padding.
    """
    b, t = len(block.points), count + 1
    k = max(1, math.ceil(round(options.density * b, 6)))
    real = len(gradient)
    error = decode(block)
    accumulated, errors = [0.0] * b, [0.0] * b
    for i in range(real):
        accumulated[i] = float(gradient[i]) + error[i]
        if any(np.float32(x) != x for x in (error[i], accumulated[i])):
            errors[i] = HALF_ULP * (abs(error[i]) + abs(accumulated[i]))
        accumulated[i] = min(max(accumulated[i], -LARGEST), LARGEST)

    doubt = Doubt()
    ranked = sorted(range(b), key=lambda i: (-abs(accumulated[i]), i))
    selected = sorted(ranked[:k])
    for i in ranked[:k]:
        for j in ranked[k : k + 1]:
            gap = abs(accumulated[i]) - abs(accumulated[j])
            same = max(i, j) < real and (gradient[i], error[i]) == (gradient[j], error[j])
            if 0 < errors[i] + errors[j] >= gap and not same:
                doubt.selection = True

    newest = {}
    for i in selected:
        newest[i], unsure = bfloat16(accumulated[i], errors[i])
        if unsure:
            doubt.values.add(i)
    rest = [0.0 if i in newest else x for i, x in enumerate(accumulated)]
    rest_errors = [0.0 if i in newest else e for i, e in enumerate(errors)]
    error = encode(rest, rest_errors, options.bits, noise[0], doubt)
    new = Block(*error, [newest, *block.window][: max(options.window - 1, 0)])
    update, tolerance = moments_to_update([newest, *block.window], t, b, options)

    if options.alpha:
        kept = decode(new)
        shrink = float(np.float32(1 - options.alpha))
        for i in range(b):
            update[i] += float(np.float32(options.alpha)) * kept[i]
            tolerance[i] += 4 * HALF_ULP * (abs(update[i]) + abs(kept[i]))
        rest = [round16(float(np.float32(shrink * x))) for x in kept]  # as float32 has it
        errors = [0.0] * b
        if not doubt.ranges and not doubt.codes:
            error = encode(rest, errors, options.bits, noise[1], doubt)
            new = Block(*error, new.window)
        else:
            doubt.ranges = True  # which grid it is rounded to again is not known
    return update[:real], tolerance[:real], new, doubt


def moments_to_update(window, t, b, options):
    b1, b2 = float(np.float32(options.b1)), float(np.float32(options.b2))
    c1, c2 = (1 - b1) / (1 - b1**t), (1 - b2) / (1 - b2**t)
    update, tolerance = [], []
    for i in range(b):
        mu = nu = size = 0.0
        for age, entries in enumerate(window):
            if i in entries:
                mu += c1 * b1**age * entries[i]
                nu += c2 * b2**age * entries[i] ** 2
                size += c1 * b1**age * abs(entries[i])
        denominator = math.sqrt(nu) + float(np.float32(options.eps))
        update.append(mu / denominator)
        # A rounding for each term summed, and for each factor, power and root.
        roundings = 2 * len(window) + 12
        tolerance.append(roundings * HALF_ULP * (size / denominator + abs(update[-1])))
    return update, tolerance


def agree(mine: Block, other: Block, doubt: Doubt, options: Options) -> None:
    """Asserts that another implementation's new state is right; adopts its doubts."""
    if doubt.selection:
        adopt(mine, other)
        mine.window[:1] = other.window[:1]
        return
    if options.window > 1:
        assert sorted(mine.window[0]) == sorted(other.window[0]), "indices"
        for i, value in mine.window[0].items():
            if i in doubt.values:
                assert abs(other.window[0][i] - value) <= 2.0**-7 * abs(value)
                mine.window[0][i] = other.window[0][i]
            else:
                assert other.window[0][i] == value, "values"
    if doubt.ranges:
        assert abs(mine.step - other.step) <= 2.0**-6 * mine.step
        adopt(mine, other)
        return
    assert mine.step == other.step, "ranges"
    for i, point in enumerate(mine.points):
        if i in doubt.codes:
            assert abs(point - other.points[i]) <= 1
        else:
            assert point == other.points[i], "codes"
    assert abs(mine.zero - other.zero) <= (len(doubt.codes) > 0), "zero"
    adopt(mine, other)


def adopt(mine: Block, other: Block) -> None:
    """Takes over the other side's error."""
    mine.points, mine.step, mine.zero = other.points, other.step, other.zero
