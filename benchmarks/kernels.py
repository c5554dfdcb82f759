"""What the compilers make of the kernels, for an H200 and a TPU v5e that need not exist.

    pip install jax-cuda13-plugin jax-cuda13-pjrt --no-deps
    pip install nvidia-cuda-nvcc nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm libtpu
    python benchmarks/kernels.py

With jax 0.12, whose XLA writes out the code of kernels. Prints registers, spills and
instructions of the GPU kernel for each block, with what XLA makes of the same update
without it, and compiles the TPU kernel. The figures are the compilers', nothing runs. A
missing compiler leaves its part of the results as it was.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
import warnings

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from common import report
from microadam_optax import PAPER, scale_by_microadam

FILE = pathlib.Path(__file__).parent / "results" / "kernels.json"
DUMP = pathlib.Path(tempfile.gettempdir()) / "microadam_kernels"
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
COMPILERS = (
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-cuobjdump",
    "libtpu",
)
SHORT = {"window": 3, "density": 0.04}
DEFAULT = {"window": 2, "density": 0.06}
CASES = {
    "(10, 1 %)": ((4096, 4096), "bfloat16", PAPER),
    "(2, 6 %)": ((4096, 4096), "bfloat16", DEFAULT),
    "(1, 12 %)": ((4096, 4096), "bfloat16", {"window": 1, "density": 0.12}),
    "(1, 25 %)": ((4096, 4096), "bfloat16", {"window": 1, "density": 0.25}),
    "(3, 4 %)": ((4096, 4096), "bfloat16", SHORT),
    "(10, 1 %), float32": ((4096, 4096), "float32", PAPER),
    "(10, 1 %), 8 bits": ((4096, 4096), "bfloat16", {**PAPER, "error_bits": 8}),
    "(10, 1 %), 11008 columns": ((4096, 11008), "bfloat16", PAPER),
    "(2, 6 %), 11008 columns": ((4096, 11008), "bfloat16", DEFAULT),
    "(10, 1 %), 768 columns": ((3072, 768), "bfloat16", PAPER),
    "(2, 25 %)": ((4096, 4096), "bfloat16", {"window": 2, "density": 0.25}),
}


def compile_for(device, shape, dtype, implementation, **settings):
    """The donated update of one leaf, compiled for a device that need not exist."""
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    tx = scale_by_microadam(implementation=implementation, **settings)
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    step = jax.jit(
        tx.update, donate_argnums=(0, 1), in_shardings=whole, out_shardings=whole
    )
    return step.trace(leaf, jax.eval_shape(tx.init, leaf)).lower().compile()


def tool(name: str) -> str:
    wheels = pathlib.Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    found = next(map(str, wheels), None) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name}: see the head of this script for its package")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def kernel_ptx() -> pathlib.Path:
    """The kernel that was compiled last, as XLA dumped it."""
    dumped = sorted(DUMP.glob("*.ptx"), key=lambda p: p.stat().st_mtime)
    return [p for p in dumped if ".entry microadam" in p.read_text()][-1]


def account(ptx: pathlib.Path) -> dict:
    """Registers, spills, and instructions, those of rare cases among them."""
    binary = ptx.with_suffix(".cubin")
    said = run(tool("ptxas"), "-v", "-arch=sm_90a", str(ptx), "-o", str(binary))
    listing = run(tool("cuobjdump"), "-sass", str(binary))
    operation = r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w*)"
    code = [op for op in re.findall(operation, listing) if op != "NOP"]
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "instructions": len(code),
        "commonest": collections.Counter(code).most_common(8),
    }


def compilers() -> dict[str, str]:
    """Versions of what compiles."""
    found = {}
    for name in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def launches(program: str) -> int:
    """Kernels that XLA runs for a program, those in loops once."""
    kinds = r" (fusion|custom-call|copy|sort|reduce|dynamic-update-slice)\("
    main = re.split(r"\n(?=ENTRY|%while|%body|%region.*while)", program)
    return sum(len(re.findall(kinds, part)) for part in main if part.startswith("ENTRY"))


def for_gpu(device) -> list[dict]:
    rows = []
    for name, (shape, dtype, settings) in CASES.items():
        compiled = compile_for(device, shape, dtype, "pallas", **settings)
        row = {"case": name, "shape": shape, "dtype": dtype, **account(kernel_ptx())}
        known = scale_by_microadam(**settings)
        state = jax.eval_shape(known.init, jax.ShapeDtypeStruct(shape, dtype))
        block = state.codes.shape[-1] * 8 // settings.get("error_bits", 4)
        k = math.ceil(round(settings["density"] * block, 6))
        row |= {"block": block, "k": k}
        row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        plain = compile_for(device, shape, dtype, "xla", **settings)
        row["xla_temporary_bytes"] = plain.memory_analysis().temp_size_in_bytes
        row["xla_kernels"] = launches(plain.as_text())
        row["kernels"] = launches(compiled.as_text())
        rows.append(row)
        print(
            f"{name:26} block {block:3}, k {row['k']:2}: {row['registers']:3} registers, "
            f"{row['spilled_bytes']} bytes spilled, {row['instructions']} instructions"
        )
    return rows


def for_tpu(device) -> list[dict]:
    rows = []
    for name, (shape, dtype, settings) in CASES.items():
        memory = compile_for(device, shape, dtype, "pallas", **settings).memory_analysis()
        plain = compile_for(device, shape, dtype, "xla", **settings).memory_analysis()
        row = {"case": name, "shape": shape, "dtype": dtype}
        row["temporary_bytes"] = memory.temp_size_in_bytes
        row["xla_temporary_bytes"] = plain.temp_size_in_bytes
        row["argument_bytes"] = memory.argument_size_in_bytes
        rows.append(row)
        print(
            f"{name:26} {row['temporary_bytes'] / 1e6:.1f} MB temporary, "
            f"{row['xla_temporary_bytes'] / 1e6:.1f} MB without the kernel"
        )
    return rows


def prepare(dump: bool = True) -> None:
    """What XLA and its plugins read when they are loaded."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of libraries that run code
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # which asks the network what TPU this is
    jax.config.update("jax_platforms", "cpu")
    if dump:
        shutil.rmtree(DUMP, ignore_errors=True)
        flags = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("error", DeprecationWarning)
    prepare()
    described = {
        "NVIDIA H200": (
            for_gpu,
            "cuda",
            "",
            {"target_config": H200, "topology": "1x1x1"},
        ),
        "TPU v5e": (for_tpu, "tpu", "v5e:2x2", {}),
    }
    kept = json.loads(FILE.read_text())
    results: dict = {"compilers": kept["compilers"] | compilers()}
    for name, (measure, platform, topology, options) in described.items():
        try:
            made = topologies.get_topology_desc(topology, platform, **options)
        except Exception as error:  # each plugin has its own for being absent
            print(f"{name}: no compiler here ({str(error).splitlines()[0]})")
            results[name] = kept[name]
            continue
        print(name)
        results[name] = measure(made.devices[0])
    report("kernels", results)


if __name__ == "__main__":
    main()
