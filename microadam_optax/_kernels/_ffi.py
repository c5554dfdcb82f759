"""XLA's foreign function interface, as the header of this jax says it is.

The kernel reads XLA's structs by their layout. A newer interface than the newest tested
is taken only if its header declares all that is read just as before.
"""

import functools
import pathlib
import re

import jax

TESTED = (0, 3), (0, 5)  # the oldest and the newest version that the kernel has run with
_HEAD = "size_t struct_size; * extension_start;"
_LISTS = "int64_t size; * types;"
# Fields in order, pointers without the type that they point to; more may follow a "...".
_STRUCTS = {
    "CallFrame": f"{_HEAD} * api; * ctx; XLA_FFI_ExecutionStage stage; "
    "XLA_FFI_Args args; XLA_FFI_Rets rets; XLA_FFI_Attrs attrs; ...",
    "Args": f"{_HEAD} {_LISTS} * args;",
    "Rets": f"{_HEAD} {_LISTS} * rets;",
    "Attrs": f"{_HEAD} {_LISTS} * names; * attrs;",
    "Buffer": f"{_HEAD} XLA_FFI_DataType dtype; * data; int64_t rank; * dims; ...",
    "Array": "XLA_FFI_DataType dtype; size_t size; * data; ...",
    "Metadata": "size_t struct_size; XLA_FFI_Api_Version api_version; "
    "XLA_FFI_Handler_Traits traits; ...",
    "Metadata_Extension": "* extension_base; * metadata; ...",
    "Api_Version": f"{_HEAD} int major_version; int minor_version; ...",
    "Api": f"{_HEAD} XLA_FFI_Api_Version api_version; * internal_api; ...",
    "Error_Destroy_Args": f"{_HEAD} * error; ...",
    "ThreadPool_Schedule_Args": f"{_HEAD} * ctx; * task; * data; ...",
    "ThreadPool_NumThreads_Args": f"{_HEAD} * ctx; * num_threads; ...",
}
# Where the functions that are called stand in the table of all.
_FUNCTIONS = {"Error_Destroy": 2, "ThreadPool_Schedule": 11, "ThreadPool_NumThreads": 12}


@functools.cache
def header() -> str:
    path = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    return path.read_text()


def version(text: str) -> tuple[int, int]:
    """Major and minor version of the interface that a header declares."""
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", text)[0])
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def reason_against(text: str) -> str | None:
    """Why the kernel cannot be called through a header's interface; None if it can."""
    found = version(text)
    oldest, newest = TESTED
    if found < oldest:
        return f"XLA's FFI {found[0]}.{found[1]}, older than {oldest[0]}.{oldest[1]}"
    changed = changes(text)
    if found > newest and changed:
        return (
            f"XLA's FFI {found[0]}.{found[1]}, newer than {newest[0]}.{newest[1]}, which "
            f"has another {changed[0]}"
        )
    return None


def changes(text: str) -> list[str]:
    """What a header declares otherwise than the kernel reads it."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    changed = [name for name, fields in _STRUCTS.items() if not _has(text, name, fields)]
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);", text)
    for name, place in _FUNCTIONS.items():
        if functions[place : place + 1] != [name]:
            changed.append(name)
    if "XLA_FFI_Extension_Metadata = 1," not in text:
        changed.append("Extension_Metadata")
    return changed


def _has(text: str, name: str, fields: str) -> bool:
    bodies = re.findall(rf"struct XLA_FFI_{name} \{{(.*?)\}}", text, flags=re.DOTALL)
    if not bodies:
        return False
    found = re.sub(r"\s+", " ", bodies[0]).strip()
    found = re.sub(r"[\w ]+\*+ (\w+);", r" * \1;", found).strip()
    found = re.sub(r"XLA_FFI_\w+ extension_base;", "* extension_base;", found)
    found = re.sub(r"\s+", " ", found)
    return f"{found} ".startswith(fields.removesuffix("...").strip() + " ") and (
        fields.endswith("...") or found == fields
    )
