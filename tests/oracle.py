"""MicroAdam in float64 NumPy and plain loops: it decides who is right.

Written from the equations in docs/algorithm.md; imports nothing of the package.

The state is discrete: indices, bfloat16 values and steps, codes. What they are decided
on is the sum of a gradient and the error, which float32 rounds once, as the contract
says, and so does the oracle. The rest of each decision is exact here and has to be there:
`agree` demands equality. Updates are compared within the float32 roundings that there
are on the way to them.
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
    eps_root: float = 0.0
    window: int = 2
    density: float = 0.06
    block_size: int = 256
    bits: int = 4
    shards: int = 8
    alpha: float = 0.0
    match_adam: bool = True


@dataclasses.dataclass
class Block:
    """State of one block: the error, and a dict index -> value a step."""

    points: list  # multiples of the step
    step: float
    zero: int  # what is added to a point to store it
    window: list  # newest first, at most window - 1 dicts


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


def number_selected(b: int, options: Options) -> int:
    return max(1, math.ceil(round(options.density * b, 6)))


def share_selected(blocks: list, b: int, options: Options) -> float:
    """Of all elements of a leaf, given the `blocks_of` it."""
    size = sum(map(len, blocks))
    k = number_selected(b, options)
    return sum(min(k, len(block)) for block in blocks) / size if size else 1.0


def new_block(b: int) -> Block:
    return Block([0] * b, 0.0, 0, [])


def bfloat16(x: float) -> float:
    """x rounded to bfloat16."""
    return float(np.float64(x).astype(ml_dtypes.bfloat16))


def round16(x: float) -> float:
    """x rounded to 16 significant bits, ties to even."""
    if x == 0:
        return 0.0
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, 16)), exponent - 16)


def decode(block: Block) -> list:
    return [point * block.step for point in block.points]


def encode(rest, bits, noise):
    """Points, step and code of zero of a list of float32 numbers."""
    f = np.float32
    low, high = min([*rest, 0.0]), max([*rest, 0.0])
    share = f(1.004 / (2**bits - (1 if noise is None else 2)))
    step = bfloat16(float((f(high) - f(low)) * share))
    if step < 2.0**-100:
        return [0] * len(rest), 0.0, 0
    half, points = 0.5 if noise is None else 0.0, []
    for i, x in enumerate(rest):
        point = math.floor(x / step + half)  # in float64, far finer than x
        if noise is not None:
            point += float(f(noise[i]) * f(step)) < x - point * step
        points.append(point)
    return points, step, -math.floor(low / step + half)


def step(gradient, block: Block, count: int, options: Options, share, noise):
    """One step of a block: update, its tolerance and the new state.

    `gradient` may be shorter than the block; the rest is padding. `share` is that of the
    leaf's selected elements, `noise` that of both encodings or None.
    """
    f = np.float32
    b, t = len(block.points), count + 1
    k = number_selected(b, options)
    real = len(gradient)
    accumulated = [0.0] * b
    for i, error in enumerate(decode(block)[:real]):
        total = float(f(gradient[i]) + f(error))
        accumulated[i] = min(max(total, -LARGEST), LARGEST)

    ranked = sorted(range(b), key=lambda i: (-abs(accumulated[i]), i))
    newest = {i: bfloat16(accumulated[i]) for i in sorted(ranked[:k])}
    rest = [0.0 if i in newest else x for i, x in enumerate(accumulated)]
    window = [newest, *block.window]
    new = Block(*encode(rest, options.bits, noise[0]), window[: options.window - 1])
    update, tolerance = moments_to_update(window, t, b, options, share)

    if options.alpha:
        kept = decode(new)
        shrink = float(f(1 - options.alpha))
        for i in range(b):
            update[i] += float(f(options.alpha)) * kept[i]
            tolerance[i] += 4 * HALF_ULP * (abs(update[i]) + abs(kept[i]))
        rest = [round16(float(f(shrink * x))) for x in kept]  # as float32 has it
        new = Block(*encode(rest, options.bits, noise[1]), new.window)
    return update[:real], tolerance[:real], new


def slowness(b1, b2, options, share):
    """How much longer an update has to be than Adam's to move as fast."""
    if not options.match_adam:
        return 1.0
    ages = np.arange(options.window)
    w1, w2 = (b**ages / np.sum(b**ages) for b in (b1, b2))
    speed = np.sum(w1 / np.sqrt(share + (1 - share) * w2))
    return 1 / (share**0.5 * speed)


def moments_to_update(window, t, b, options, share):
    b1, b2 = float(np.float32(options.b1)), float(np.float32(options.b2))
    steps = min(t, options.window) if options.match_adam else t
    c1, c2 = (1 - b1) / (1 - b1**steps), (1 - b2) / (1 - b2**steps)
    c2 /= slowness(b1, b2, options, share) ** 2
    update, tolerance = [], []
    for i in range(b):
        mu = nu = size = 0.0
        for age, entries in enumerate(window):
            if i in entries:
                mu += c1 * b1**age * entries[i]
                nu += c2 * b2**age * entries[i] ** 2
                size += c1 * b1**age * abs(entries[i])
        root = math.sqrt(nu + float(np.float32(options.eps_root)))
        denominator = root + float(np.float32(options.eps))
        update.append(mu / denominator)
        # A rounding for each term summed, and for each factor, power and root.
        roundings = 2 * len(window) + 12
        if options.match_adam:  # and for what is summed over the window's ages
            roundings += 2 * options.window + 12
        tolerance.append(roundings * HALF_ULP * (size / denominator + abs(update[-1])))
    return update, tolerance


def agree(mine: Block, other: Block) -> None:
    """Asserts that another implementation's new state is the same."""
    for field in dataclasses.fields(Block):
        assert getattr(mine, field.name) == getattr(other, field.name), field.name
