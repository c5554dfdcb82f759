"""What threads share, and calls of C functions by their address, for numba."""

from llvmlite import ir
from numba import types

from microadam_optax._kernels.cpu_llvm import I32, I64, external, intrinsic


@intrinsic
def add_to(_typing, memory, number):
    """Adds to an int64 that several threads count with, and returns what it was."""

    def code(_context, builder, _signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "seq_cst")

    return types.int64(memory, types.int64), code


@intrinsic
def read_from(_typing, memory):
    """Such an int64, and all that was written before it was."""

    def code(_context, builder, _signature, args):
        return builder.load_atomic(args[0], "seq_cst", 8)

    return types.int64(memory), code


@intrinsic
def let_others_run(_typing):
    """Gives the core to another thread, if one waits for it."""

    def code(context, builder, _signature, _args):
        builder.call(external(builder, "sched_yield", I32, []), [])
        return context.get_dummy_value()

    return types.none(), code


@intrinsic(prefer_literal=True)
def address_of_symbol(_typing, name):
    """The address of what this process knows by a name, found when code is loaded."""
    symbol = name.literal_value

    def code(_context, builder, _signature, _args):
        return builder.ptrtoint(external(builder, symbol, I64, [I64]), I64)

    return types.int64(name), code


@intrinsic
def call(_typing, function, argument):
    """Calls the C function at an address with one address; returns an int64."""

    def code(_context, builder, _signature, args):
        kind = ir.FunctionType(I64, [I64]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), code
