"""The functions that XLA knows by name, one for each dtype of gradients, and their cache.

Numba compiles a handler once a machine, for all shapes.
"""

import ctypes
import functools
import hashlib
import pathlib
import threading
from typing import Any

import jax
import llvmlite.binding
import numpy as np
from numba import cfunc
from numba.core.types import float32, float64, uint16

from microadam_optax import _moments
from microadam_optax._kernels import cpu_call
from microadam_optax._kernels.cpu_data import from_bfloat16, inline, same, to_bfloat16
from microadam_optax._kernels.cpu_llvm import from_half, to_half
from microadam_optax._kernels.cpu_threads import address_of_symbol

INFINITE = np.float32(np.inf)
_LARGEST = float64(_moments.LARGEST)
_LARGEST_HALF = float32(65504)
_READ = ("_moments.py", "_quantize.py")  # whose numbers are compiled in, too

_lock = threading.Lock()


@inline
def narrow_half(x):
    """Ends at the largest float16, see `_moments.cast`."""
    if -INFINITE < x < INFINITE:
        x = min(max(x, -_LARGEST_HALF), _LARGEST_HALF)
    return to_half(x)


@inline
def widen_double(x):
    if abs(x) < INFINITE:
        x = min(max(x, -_LARGEST), _LARGEST)
    return float32(x)


@inline
def narrow_double(x):
    return float64(x)


def task_float32(job):
    cpu_call.work(job, float32, same, same)
    return 0


def task_bfloat16(job):
    cpu_call.work(job, uint16, from_bfloat16, to_bfloat16)
    return 0


def task_float16(job):
    cpu_call.work(job, uint16, from_half_, narrow_half)
    return 0


def task_float64(job):
    cpu_call.work(job, float64, widen_double, narrow_double)
    return 0


@inline
def from_half_(x):
    return from_half(x)


def handle_float32(frame):
    return cpu_call.handle(frame, address_of_symbol("microadam_task_float32"))


def handle_bfloat16(frame):
    return cpu_call.handle(frame, address_of_symbol("microadam_task_bfloat16"))


def handle_float16(frame):
    return cpu_call.handle(frame, address_of_symbol("microadam_task_float16"))


def handle_float64(frame):
    return cpu_call.handle(frame, address_of_symbol("microadam_task_float64"))


def target(dtype: str) -> str:
    """The name under which XLA knows the handler for gradients of a dtype."""
    name = f"microadam_{dtype}"
    with _lock:  # a name cannot be registered twice
        if name in kept:
            return name
        task = _compiled(globals()[f"task_{dtype}"])
        llvmlite.binding.add_symbol(f"microadam_task_{dtype}", task.address)
        handler = _compiled(globals()[f"handle_{dtype}"])
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(handler.address)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
        kept[name] = task, handler
    return name


kept: dict[str, Any] = {}  # what XLA calls, by the name of its handler


def _compiled(f: Any) -> Any:
    """A C function, from numba's cache where there is one."""
    f.__qualname__ = f"{f.__name__}_{_stamp()}"
    compiler = functools.partial(cfunc, "int64(int64)", error_model="numpy")
    try:
        return compiler(cache=True)(f)
    except Exception:  # nowhere to write, a full disk, or what is there cannot be read
        return compiler()(f)


@functools.cache
def _stamp() -> str:
    """Tells apart what was compiled from other code, or for another machine."""
    folder = pathlib.Path(__file__).parent
    files = [*sorted(folder.glob("cpu*.py")), *(folder.parent / x for x in _READ)]
    parts = [path.read_bytes() for path in files]
    parts += [
        llvmlite.binding.get_host_cpu_name().encode(),
        str((cpu_call.MAJOR, cpu_call.MINOR)).encode(),
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
