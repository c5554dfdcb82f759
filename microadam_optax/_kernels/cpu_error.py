"""The error of a block in plain loops: added to the gradient, and quantized again."""

import numpy as np
from numba.core.types import float32, int32

from microadam_optax import _moments, _quantize
from microadam_optax._kernels.cpu_data import (
    INFINITY,
    ONE,
    ZERO,
    from_bfloat16,
    inline,
    round_bfloat16,
    round_product,
    round_to,
    same,
)
from microadam_optax._kernels.cpu_llvm import (
    bits_of,
    float_of,
    shift_left,
    shift_right,
    shifted,
)

_LARGEST = int(np.float32(_moments.LARGEST).view(np.int32))
_ABOVE = _quantize.ABOVE
_SMALLEST = np.float32(_quantize.SMALLEST)
_HALF = np.float32(0.5)
_BELOW_HALF = np.float32(0.5 - 2**-10)


@inline
def accumulate(row, s, shape, widen):
    """The gradient and the dequantized error; returns the largest key."""
    for i in range(shape.width):
        s.codes[i] = row.codes[i]
    step, zero = from_bfloat16(row.ranges[0]), from_bfloat16(row.ranges[1])
    top = int32(0)
    for part in range(shape.parts):
        to, begin = part * shape.lanes, part * shape.width
        gradient = shifted(row.gradient, begin)
        real = row.size - begin
        if real < shape.lanes or shape.width < shape.lanes:
            for i in range(min(max(real, 0), shape.width)):
                s.staged[i] = widen(gradient[i])
            for i in range(min(max(real, 0), shape.width), shape.lanes):
                s.staged[i] = ZERO
            top = max(top, add_error(s.staged, s, shape, part, step, zero, same))
            for i in range(shape.width, shape.lanes):
                s.keys[to + i] = -1
                s.x[to + i] = ZERO
        else:
            top = max(top, add_error(gradient, s, shape, part, step, zero, widen))
    if top > _LARGEST:
        top = bound(s, shape)
    return top


@inline
def add_error(gradient, s, shape, part, step, zero, widen):
    mask, shift = int32((1 << shape.bits) - 1), int32(shape.bits * part)
    to = part * shape.lanes
    top = int32(0)
    for i in range(shape.lanes):
        code = int32(shift_right(s.codes[i], shift) & mask)
        x = widen(gradient[i]) + (float32(code) - zero) * step
        key = int32(bits_of(x) & 0x7FFFFFFF)
        s.x[to + i] = x
        s.keys[to + i] = key
        top = max(top, key)
    return top


@inline
def bound(s, shape):
    """Finite numbers at most 2**60."""
    top = int32(0)
    for i in range(shape.all):
        key = s.keys[i]
        if _LARGEST < key < INFINITY:
            s.keys[i] = _LARGEST
            s.x[i] = float_of(int32(_LARGEST | (bits_of(s.x[i]) & ~0x7FFFFFFF)))
        top = max(top, s.keys[i])
    return top


@inline
def measure(s, shape):
    """The step that covers a block and zero, and the code of zero."""
    high = low = int32(0)
    for i in range(shape.all):
        bits = bits_of(s.x[i])
        high = max(high, bits)
        low = max(low, int32(bits ^ ~0x7FFFFFFF))
    if max(high, low) > INFINITY:
        return float32(np.nan), ZERO
    span = float32(_ABOVE / ((1 << shape.bits) - 1))
    step = round_bfloat16((float_of(high) + float_of(low)) * span)
    if not (_SMALLEST <= step < np.inf):
        return (step if step > 1 else ZERO), ZERO
    most = float32(255)
    return step, most - float32(multiple(-float_of(low), step, ONE / step, most))


@inline
def multiple(x, step, inverse, zero):
    """The nearest multiple of a step, plus zero: exact, whatever a division rounds to.

    At first it is right, or one less near a tie.
    """
    code = int32(x * inverse + (zero + _BELOW_HALF))
    above_ = x - (float32(code) - zero) * step
    return int32(code + (above_ >= _HALF * step))


@inline
def quantize(s, shape, step, zero):
    if not (0 < step < np.inf):
        for i in range(shape.lanes):
            s.codes[i] = 0
        return
    inverse = ONE / step
    for i in range(shape.lanes):
        s.codes[i] = multiple(s.x[i], step, inverse, zero)
    for part in range(1, shape.parts):
        to, shift = part * shape.lanes, int32(shape.bits * part)
        for i in range(shape.lanes):
            code = multiple(s.x[to + i], step, inverse, zero)
            s.codes[i] = int32(s.codes[i] | shift_left(code, shift))


@inline
def return_error(s, factors, shape, step, zero):
    """Adds the share `alpha` of the error to the update, and keeps the rest of it."""
    mask = (1 << shape.bits) - 1
    for part in range(shape.parts):
        to = part * shape.lanes
        for i in range(shape.lanes):
            code = int32(shift_right(s.codes[i], int32(shape.bits * part)) & mask)
            error = (float32(code) - zero) * step
            s.update[to + i] += round_product(factors.alpha * error)
            s.x[to + i] = round_to(factors.kept * error, 15)
        for i in range(shape.width, shape.lanes):
            s.x[to + i] = ZERO
    return measure(s, shape)
