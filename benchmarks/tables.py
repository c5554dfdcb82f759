"""Writes the figures of README.md and of the pages in docs/ from benchmarks/results.

python benchmarks/tables.py

What stands between two marks, `<!-- name -->` and `<!-- end name -->`, is replaced; the
text around them is written by hand.
"""

from gpu_memory_tables import (
    BARS,
    LAYER_BY_LAYER,
    gpu_peak_table,
    layerwise_table,
    llama_figure,
    llama_peaks,
    llama_table,
    parts_figure,
)
from gpu_tables import checks, readme_sentences, time_table, whole_table
from gpu_tables import overview as on_a_gpu
from kernel_tables import gpu_code_table, tpu_code_table
from memory_tables import (
    peak_table,
    readme_memory_table,
    resident_table,
    state_table,
    temporary_table,
)
from mesh_tables import mesh_tables, plan_section, unaligned_table, weak_table
from pages import ADAM, DEFAULT, ROOT, fill, load, measured_on
from time_tables import (
    compile_table,
    parts_table,
    ratios,
    readme_speed_table,
    step_table,
)


def overview() -> dict[str, str]:
    """A sentence each for the landing page."""
    state = load("memory")["state_bytes_a_parameter"]["Llama-2-7B"]
    step = load("step_time")
    ratio = ", ".join(f"{x:.2f} ({size})" for size, x in ratios(step)[DEFAULT].items())
    peaks = {x.name: x for x in llama_peaks(load("gpu_memory"))}
    least, adamw = (peaks[x].gigabytes for x in (LAYER_BY_LAYER, BARS[ADAM]))
    return {
        "llama": f"**A whole training step of Llama-2-7B takes {least:.1f} GB**, where "
        f"AdamW's takes {adamw:.1f}, both in bfloat16, by XLA's account for an H200 that "
        "was not there when it was compiled ([layer by layer](layerwise.md)):\n\n"
        + llama_figure(load("gpu_memory"), "images")
        + f"\n\n{on_a_gpu(load('gpu_whole'))}",
        "bytes": f"**{state[DEFAULT]:.3f} bytes of state a parameter**, where Adam has "
        f"{state['Adam']:.0f} ([memory](memory.md)):",
        "times": f"**A step takes {ratio} times as long as with `optax.adamw`**, on a "
        "CPU of two cores with numba ([benchmarks](benchmarks.md)):",
    }


def sections() -> dict[str, dict[str, str]]:
    """What belongs between the marks of each page."""
    memory, step, meshes = map(load, ("memory", "step_time", "sharding"))
    kernels, gpu_memory = load("kernels"), load("gpu_memory")
    return {
        "README.md": {
            "llama": llama_figure(gpu_memory, "docs/images"),
            "memory": readme_memory_table(),
            "gpu": readme_sentences(load("gpu_whole"), load("gpu_time")),
            "speed": readme_speed_table(),
        },
        "docs/index.md": overview(),
        "docs/memory.md": {
            "state": state_table(memory),
            "peak": peak_table(load("peak_memory")),
            "resident": resident_table(load("resident_memory")),
            "gpu parts": parts_figure(gpu_memory, "images"),
            "gpu peak": gpu_peak_table(gpu_memory),
            "temporary": temporary_table(memory),
        },
        "docs/layerwise.md": {
            "layerwise": layerwise_table(gpu_memory),
            "llama options": llama_table(load("llama_memory")),
        },
        "docs/gpus.md": {
            "checks": checks(load("gpu_check")),
            "whole": whole_table(load("gpu_whole")),
        },
        "docs/compile_time.md": {
            "compile": compile_table(load("compile_time")),
            "compile without numba": compile_table(load("compile_time_xla")),
        },
        "docs/sharding.md": {
            "unaligned": unaligned_table(meshes),
            "plan": plan_section(meshes),
        },
        "docs/benchmarks.md": {
            "steps": step_table(step),
            "steps without numba": step_table(load("step_time_xla")),
            "copy": f"A copy of a float32 array took {step['copy_ns_an_element']:.2f} ns "
            "an element in the same run.",
            "parts": parts_table(load("cpu_parts")),
            "gpu": time_table(load("gpu_time")),
            "gpu code": gpu_code_table(kernels),
            "tpu code": tpu_code_table(kernels),
            "meshes": mesh_tables(meshes),
            "weak scaling": weak_table(meshes),
            "machine": f"{measured_on(meshes)}.",
        },
    }


def main() -> None:
    for name, contents in sections().items():
        page = ROOT / name
        text = page.read_text()
        for mark, content in contents.items():
            if f"<!-- {mark} -->" not in text:
                raise ValueError(f"{name} has no place for {mark!r}.")
            text = fill(text, mark, content)
        page.write_text(text)


if __name__ == "__main__":
    main()
