"""Which elements of a block are selected, in plain loops.

Selection compares the bits of ``|x|`` as integers, like `_topk`. Their k largest are
those above a bar. A few are found one by one, each the largest below the last. Else the
bar is looked for by counting how many keys are above three guesses at a time: the first
are around the bars of the blocks before, the next where the counts leave room. Two or
three such passes are enough.
"""

import numpy as np
from numba.core.types import float32, int32

from microadam_optax._kernels.cpu_data import inline
from microadam_optax._kernels.cpu_llvm import WORD, choose

_COMPARISONS = 1280  # up to which maxima cost less than counts
_SLOWLY = np.float32(0.1)  # how guesses follow from block to block


@inline
def select(s, shape, top):
    """A bar that exactly k keys are above; of ties at it, the first stay above."""
    if shape.k == 0:
        return top
    if shape.k == shape.block:
        return int32(-1)
    if shape.k * (shape.all + WORD) <= _COMPARISONS:
        bar = kth_by_maxima(s, shape, top) - 1
        if count_above(s, shape, bar) == shape.k:
            return int32(bar)
    return int32(bar_by_counting(s, shape, top))


@inline
def kth_by_maxima(s, shape, top):
    """The k-th largest key, if no two of these are equal."""
    kth = int(top)
    for _ in range(1, shape.k):
        kth = largest_up_to(s, shape, kth - 1)
    return kth


@inline
def bar_by_counting(s, shape, top):
    """Narrows the range of the bar by three guesses at a time."""
    low, many = -1, shape.block  # too many are above the low bar
    high, few = int(top), 0  # and too few above the high one
    bar, gap = int(s.guess[0]), int(8 * s.guess[1])
    tries = 0
    while high - low > 1:
        if tries > 0 and (few == shape.k - 1 or (tries & 3) == 3):
            bar = largest_up_to(s, shape, high) - 1
            gap = (high - low) >> 2
        first = min(max(bar - gap, low + 1), high - 1)
        second = min(max(bar, low + 1), high - 1)
        third = min(max(bar + gap, low + 1), high - 1)
        counts = count_three(s, shape, first, second, third)
        for bar, count in ((first, counts[0]), (second, counts[1]), (third, counts[2])):
            if count >= shape.k and bar > low:
                low, many = bar, count
            if count < shape.k and bar < high:
                high, few = bar, count
        if many == shape.k:
            break
        tries += 1
        if few == 0 or many == shape.block:
            gap *= 4
            bar = high - gap if few > 0 else low + gap
        else:
            gap = (high - low) // (many - few + 1)
            bar = low + gap * (many - shape.k) + (gap >> 1)
    exclude_ties(s, shape, low, many - shape.k)
    pace = s.guess[2]
    s.guess[0] += pace * (float32(low) - s.guess[0])
    s.guess[1] += pace * (float32((high - low) // (many - few)) - s.guess[1])
    s.guess[2] = max(pace * float32(0.8), _SLOWLY)
    return low


@inline
def count_above(s, shape, bar):
    count, bar = int32(0), int32(bar)
    for i in range(shape.all):
        count = int32(count + (s.keys[i] > bar))
    return int(count)


@inline
def count_three(s, shape, first, second, third):
    """How many keys are above each of three bars."""
    one = two = three = int32(0)
    first, second, third = int32(first), int32(second), int32(third)
    for i in range(shape.all):
        key = s.keys[i]
        one = int32(one + (key > first))
        two = int32(two + (key > second))
        three = int32(three + (key > third))
    return int(one), int(two), int(three)


@inline
def largest_up_to(s, shape, high):
    largest, high = int32(-1), int32(high)
    for i in range(shape.all):
        key = s.keys[i]
        largest = max(largest, choose(key <= high, key, int32(-1)))
    return int(largest)


@inline
def exclude_ties(s, shape, bar, excess):
    """Lowers the last of the keys just above a bar."""
    i = shape.all
    while excess > 0:
        i -= 1
        if s.keys[i] == bar + 1:
            s.keys[i] = bar
            excess -= 1
