"""XLA's foreign function interface as this jax has it, by its header."""

import functools
import pathlib
import re

import jax

TESTED = (0, 5)  # the newest version that the kernel has run with, from (0, 3) on


@functools.cache
def header() -> str:
    path = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    return path.read_text()


@functools.cache
def version() -> tuple[int, int]:
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header())[0])
        for part in ("MAJOR", "MINOR")
    )
    return major, minor
