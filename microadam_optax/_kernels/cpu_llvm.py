"""What numba has no word for: memory by address, bits of floats, masks.

Each is a line or two of LLVM, and is inlined where it is called.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types

_I1, _I8, _I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
intrinsic: Any = extending.intrinsic
WORD = 64  # keys whose comparisons make up one mask


@intrinsic
def pointer(_typing, address, dtype):
    """An array of a dtype that begins at an address."""
    result = types.CPointer(dtype.dtype)

    def code(context, builder, _signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), code


@intrinsic
def allocate(_typing, count, dtype):
    """Memory for a number of elements, which nothing else has a pointer to."""
    result = types.CPointer(dtype.dtype)

    def code(context, builder, _signature, args):
        kind = context.get_value_type(result)
        size = context.get_abi_sizeof(context.get_data_type(dtype.dtype))
        malloc = external(builder, "malloc", _I8.as_pointer(), [I64])
        malloc.return_value.add_attribute("noalias")
        memory = builder.call(malloc, [builder.mul(args[0], I64(size))])
        return builder.bitcast(memory, kind)

    return result(types.int64, dtype), code


@intrinsic
def release(_typing, memory):
    """Gives back what was allocated."""

    def code(context, builder, _signature, args):
        free = external(builder, "free", ir.VoidType(), [_I8.as_pointer()])
        builder.call(free, [builder.bitcast(args[0], _I8.as_pointer())])
        return context.get_dummy_value()

    return types.none(memory), code


@intrinsic
def address_of(_typing, memory):
    """Where an array begins."""

    def code(_context, builder, _signature, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(memory), code


@intrinsic
def shifted(_typing, memory, count):
    """An array from one of its elements on."""

    def code(_context, builder, _signature, args):
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.int64), code


@intrinsic
def view(_typing, memory, dtype):
    """The same memory as an array of another dtype."""
    result = types.CPointer(dtype.dtype)

    def code(context, builder, _signature, args):
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(memory, dtype), code


@intrinsic
def bits_of(_typing, x):
    """The bits of a float32, int32."""

    def code(_context, builder, _signature, args):
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), code


@intrinsic
def float_of(_typing, bits):
    """The float32 with these bits."""

    def code(_context, builder, _signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), code


@intrinsic
def choose(_typing, flag, one, other):
    """One number or another, without a branch."""

    def code(_context, builder, _signature, args):
        return builder.select(*args)

    return one(types.boolean, one, one), code


@intrinsic
def shift_left(_typing, bits, count):
    """Of an int32 by less than 32, which numba would do in 64 bits."""

    def code(_context, builder, _signature, args):
        return builder.shl(*args)

    return types.int32(types.int32, types.int32), code


@intrinsic
def shift_right(_typing, bits, count):
    """Of an int32 that is not negative."""

    def code(_context, builder, _signature, args):
        return builder.lshr(*args)

    return types.int32(types.int32, types.int32), code


@intrinsic
def from_half(_typing, bits):
    """The float32 of a float16 given by its bits."""

    def code(_context, builder, _signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), code


@intrinsic
def to_half(_typing, x):
    """The bits of a float32 as a float16."""

    def code(_context, builder, _signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), code


@intrinsic
def root(_typing, x):
    """The square root of a float32."""

    def code(_context, builder, _signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [_F32]), args)

    return types.float32(types.float32), code


@intrinsic
def above(_typing, keys, bar):
    """Which of the next `WORD` int32 are larger than a number, the first in bit 0."""

    def code(_context, builder, _signature, args):
        vector = ir.VectorType(I32, WORD)
        address = builder.bitcast(args[0], vector.as_pointer())
        values = builder.load(address, align=4)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[1], I32(0))
        zeros = ir.Constant(vector, None)
        all_ = builder.shuffle_vector(one, zeros, zeros)
        flags = builder.icmp_signed(">", values, all_)
        return builder.bitcast(flags, I64)

    return types.int64(keys, types.int32), code


@intrinsic
def lowest_bit(_typing, mask):
    """The position of the lowest bit of a mask; 64 if there is none."""

    def code(_context, builder, _signature, args):
        return builder.cttz(args[0], _I1(0))

    return types.int64(types.int64), code


@intrinsic
def count_bits(_typing, mask):
    """How many bits of a mask are set."""

    def code(_context, builder, _signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), code


def external(builder: Any, name: str, returned: Any, arguments: list) -> Any:
    """A C function that this process knows by a name."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(returned, arguments)
    return known or ir.Function(builder.module, kind, name)
