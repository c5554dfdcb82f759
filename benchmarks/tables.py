"""Writes the figures of README.md and of the pages in docs/ from benchmarks/results.

python benchmarks/tables.py

What stands between two marks, `<!-- name -->` and `<!-- end name -->`, is replaced; the
text around them is written by hand.
"""

import math

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
from pages import ROOT, fill, load, measured_on, table

# Of an H200, by its data sheet, and what (10, 1 %) moves for a bfloat16 parameter: its
# gradient, codes and range in and out, its share of the window in and of a slot out.
CORES, ISSUED, CLOCK, MEMORY = 132, 4, 1.98e9, 4.8e12
LEAST = 2 * (2 + 1 / 2 + 4 / 256) + 27 * 3 / 256 * (1 + 1 / 9)
ADAM, DEFAULT, PAPER = "optax.adamw", "(2, 6 %)", "(10, 1 %), all compressed"
SHOWN = {  # in README: the names in memory.json, peak_memory.json and gpu_memory.json
    ADAM: ("Adam", ADAM, ADAM),
    "optax.adafactor": ("Adafactor", "", "optax.adafactor"),
    "MicroAdam (2, 6 %), the default": (DEFAULT, f"MicroAdam {DEFAULT}", "MicroAdam"),
    "the same, layer by layer": (DEFAULT, "", "MicroAdam, layer by layer"),
    "MicroAdam (1, 25 %)": ("(1, 25 %)", *["MicroAdam (1, 25 %)"] * 2),
    "MicroAdam (10, 1 %), the paper's": (PAPER, f"MicroAdam {PAPER}", ""),
}


def readme_memory_table() -> str:
    """State, and the peaks of whole training steps, in bytes a parameter."""
    state = load("memory")["state_bytes_a_parameter"]["Llama-2-7B"]
    small, large = load("peak_memory"), load("gpu_memory")
    peaks = {
        row["optimizer"]: row["peak"] / small["parameters"]
        for row in small["rows"]
        if row["dtype"] == "float32"
    }
    found = {
        row["optimizer"]: row["peak"]
        for row in large["rows"]
        if (row["model"], row["dtype"], row["every"]) == ("1.7B", "bfloat16", 1)
    }
    rows = [
        [
            shown,
            f"{state[of_state]:.3f}",
            f"{peaks[of_peak]:.1f}" if of_peak in peaks else "",
            f"{found[of_gpu]:.1f}" if of_gpu in found else "",
        ]
        for shown, (of_state, of_peak, of_gpu) in SHOWN.items()
    ]
    header = ["bytes a parameter", "state, Llama-2-7B", "peak of a step, float32, CPU"]
    return table([*header, "peak of a step, bfloat16, H200"], rows)


def ratios(results: dict) -> dict[str, dict[str, float]]:
    """Of whole steps to optax.adamw's, on all cores in blocks of 256, by size."""
    most = max(row["cores"] for row in results["rows"])
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        if (row["cores"], row["blocks"], row["apply_updates"]) == (most, "256", True):
            size = f"{row['millions']}M parameters"
            found.setdefault(row["setting"], {})[size] = row["ratio"]
    return found


def readme_speed_table() -> str:
    """Of whole steps and of compiling, in times of optax.adamw's."""
    step, slow = load("step_time"), load("step_time_xla")
    compiled, slow_compiled = (
        load(x)["seconds"]["64 distinct leaves"]
        for x in ("compile_time", "compile_time_xla")
    )
    sizes = list(next(iter(ratios(step).values())))
    lines = {name: (of, compiled) for name, of in ratios(step).items()}
    lines[f"{DEFAULT} without numba"] = ratios(slow)[DEFAULT], slow_compiled
    rows = []
    for name, (of, seconds) in lines.items():
        own = next(x for x in seconds if name.startswith(x.split(", all")[0]))
        cells = [f"{of[size]:.2f}" if size in of else "" for size in sizes]
        rows.append([name, *cells, f"{seconds[own] / seconds[ADAM]:.1f}"])
    header = ["times of optax.adamw's", *(f"a step, {size}" for size in sizes)]
    return (
        f"{table([*header, 'first step, 64 distinct leaves, with compiling'], rows)}\n\n"
        f"{measured_on(step)} and `python benchmarks/compile_time.py`."
    )


def state_table(results: dict) -> str:
    models = results["state_bytes_a_parameter"]
    settings = next(iter(models.values()))
    rows = [
        [name, *(f"{held[name]:.3f}" for held in models.values())] for name in settings
    ]
    return (
        f"{table(['(window, density)', *models], rows)}\n\n"
        f"From shapes alone: {measured_on(results)}."
    )


def temporary_table(results: dict) -> str:
    """By leaf, at the default setting and, in brackets, where it is most."""
    rows = []
    for name, held in results["temporary_bytes"].items():
        mb = {x: f"{number / 1e6:.1f}" for x, number in held.items()}
        ours = [f"{mb[x]} MB ({mb[f'{x}, most']})" for x in ("kernel", "XLA")]
        rows.append([name, f"{mb['leaf']} MB", f"{mb['Adam']} MB", *ours])
    header = ["leaves", "one holds", "optax.adam", "MicroAdam, kernel"]
    return (
        f"{table([*header, 'MicroAdam without numba'], rows)}\n\n"
        "XLA's own account of the compiled update with its learning rate, by default and "
        f"in brackets the most of all settings: {measured_on(results)}."
    )


def step_table(results: dict) -> str:
    """Whole steps and updates alone, for each size, setting and number of cores."""
    header = ["parameters", "(window, density)", "blocks", "cores"]
    for step in ("step", "update"):
        header += [f"{step}: adamw, ns", "MicroAdam, ns", "ratio"]
    found: dict[tuple, dict[bool, list[str]]] = {}
    for row in results["rows"]:
        of = f"{row['millions']}M", row["setting"], row["blocks"], str(row["cores"])
        figures = ("adamw_ns_a_parameter", "ns_a_parameter", "ratio")
        cells = [f"{row[x]:.2f}" for x in figures]
        found.setdefault(of, {})[row["apply_updates"]] = cells
    rows = [
        [*of, *cells.get(True, [""] * 3), *cells.get(False, [""] * 3)]
        for of, cells in found.items()
    ]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def compile_table(results: dict) -> str:
    names = list(next(iter(results["seconds"].values())))
    rows = []
    for case, seconds in results["seconds"].items():
        base = seconds[names[0]]
        others = [
            f"{seconds[n]:.2f} s ({seconds[n] / base:.1f} times)" for n in names[1:]
        ]
        rows.append([case, f"{base:.2f} s", *others])
    return f"{table(['leaves', *names], rows)}\n\n{measured_on(results)}."


def peak_table(results: dict) -> str:
    """Bytes a parameter of a whole training step."""
    number = results["parameters"]
    header = ["optimizer", "dtype", "arguments", "temporary", "peak", "of adamw's"]
    rows, reference = [], {}
    for row in results["rows"]:
        kind = row["dtype"], "MultiSteps" in row["optimizer"]
        reference.setdefault(kind, row["peak"])  # optax.adamw comes first
        figures = (f"{row[x] / number:.2f}" for x in ("arguments", "temporary", "peak"))
        ratio = f"{row['peak'] / reference[kind]:.2f}"
        rows.append([row["optimizer"], row["dtype"], *figures, ratio])
    return (
        f"{table(header, rows)}\n\nBytes a parameter, {number:,} parameters, a batch of "
        f"{results['batch']} x {results['length']} tokens: {measured_on(results)}."
    )


PARTS = {  # of the CPU kernel, by the lines of its block
    "gradient and error": ("accumulate",),
    "selection": ("select",),
    "entries and moments": ("take", "add_newest", "add_older", "write_slot"),
    "update": ("update_entries", "update_selected"),
    "quantization": ("measure", "quantize"),
    "writing": ("write", "clear"),
}


def parts_table(results: dict) -> str:
    """Nanoseconds a parameter of the CPU kernel's parts, on one core."""
    header = ["(window, density)", "blocks", *PARTS, "all"]
    rows = [
        [row["setting"], str(row["block"])]
        + [f"{sum(row['lines'].get(x, 0) for x in of):.2f}" for of in PARTS.values()]
        + [f"{row['total']:.2f}"]
        for row in results["rows"]
    ]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def resident_table(results: dict) -> str:
    """The most memory that whole processes held."""
    base = results["rows"][0]["resident_bytes"]
    rows = [
        [
            row["optimizer"],
            f"{row['resident_bytes'] / 1e6:.0f} MB",
            f"{row['resident_bytes'] / row['parameters']:.2f}",
            f"{row['resident_bytes'] / base:.2f}",
        ]
        for row in results["rows"]
    ]
    header = ["optimizer", "resident", "bytes a parameter", "of adamw's"]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def sent(collectives: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in collectives.items()) or "0"


def megabytes(number: float) -> str:
    return f"{number / 1e6:.2f}"


def mesh_tables(results: dict) -> str:
    """One for each mesh, in each cell the optimizers one after another."""
    tables = []
    for mesh in dict.fromkeys(row["mesh"] for row in results["cases"]):
        rows = [mesh_row(row) for row in results["cases"] if row["mesh"] == mesh]
        header = ["leaf", "shape", "spec", "collectives", "temporary", "state"]
        tables.append(f"**{mesh}**\n\n{table(header, rows)}")
    return "\n\n".join(tables)


def mesh_row(row: dict) -> list[str]:
    found = row["optimizers"].values()
    counts = [str(sum(each["collectives"].values())) for each in found]
    held, state = (
        [megabytes(each[key]) for each in found]
        for key in ("temporary_bytes", "state_bytes")
    )
    shape = " x ".join(map(str, row["shape"]))
    columns = (" / ".join(column) for column in (counts, held, state))
    return [row["case"], shape, f"`{row['spec']}`", *columns]


def unaligned_table(results: dict) -> str:
    header = ["leaf", "shape", "devices", "default grid", "`shard_grid`"]
    header += ["temporary, MB", "state, MB"]
    rows = []
    for row in results["unaligned"]:
        grids = [row["default"], row["shard_grid"]]
        held, state = (
            " / ".join(megabytes(each[key]) for each in grids)
            for key in ("temporary_bytes", "state_bytes")
        )
        shape = " x ".join(map(str, row["shape"]))
        counts = (sent(each["collectives"]) for each in grids)
        rows.append([row["case"], shape, str(row["devices"]), *counts, held, state])
    return table(header, rows)


def weak_table(results: dict) -> str:
    rows = results["weak_scaling"]
    names = [name for name in rows[0] if name != "devices"]
    return table(
        ["devices", *(f"{name}: flops / bytes" for name in names)],
        [
            [
                str(row["devices"]),
                *(
                    f"{row[n]['flops'] / 1e6:.1f}M / {megabytes(row[n]['bytes'])} MB"
                    for n in names
                ),
            ]
            for row in rows
        ],
    )


def plan_table(results: dict) -> str:
    plan = results["plan_70b"]
    own = plan["parameter_bytes"]
    rows = [
        [
            name,
            *(f"{number / 1e9:.3f}" for number in (held, 2 * own + held)),
            f"{held * 256 / plan['parameters']:.2f}",
        ]
        for name, held in plan["state_bytes"].items()
    ]
    return table(
        ["", "state, GB", "with parameters and gradients", "bytes a parameter"], rows
    )


def plan_section(results: dict) -> str:
    plan = results["plan_70b"]
    layer = {n: sent(each["collectives"]) for n, each in results["layer_70b"].items()}
    return (
        f"{plan['parameters']:,} parameters on a mesh of "
        + " x ".join(f"{n} {axis}" for axis, n in plan["mesh"].items())
        + f"; bfloat16 parameters and gradients are {plan['parameter_bytes'] / 1e9:.3f} "
        f"GB each a device.\n\n{plan_table(results)}\n\n"
        "Collectives of the update of a layer, the embedding and the head, compiled "
        f"for the 256 devices: {layer['8']} with `shards=8`, "
        f"**{layer[str(plan['shards'])]}** with `shards={plan['shards']}`."
    )


def gpu_code_table(results: dict) -> str:
    """What the compiler made of the GPU kernel, and XLA's program beside it."""
    header = ["(window, density)", "block", "k", "registers", "instructions", "passes"]
    header += ["in all", "operations", "temporary"]
    rows = []
    for row in results["NVIDIA H200"]:
        a_pass, passes = row["instructions_a_pass"], row["passes"]
        held = (row[key] / 1e6 for key in ("temporary_bytes", "xla_temporary_bytes"))
        spilled = f", {row['spilled_bytes']} B spilled" if row["spilled_bytes"] else ""
        rows.append(
            [
                row["case"],
                str(row["block"]),
                str(row["k"]),
                f"{row['registers']}{spilled}",
                str(row["instructions"]),
                f"{passes:.1f} of {a_pass}" if a_pass else "",
                f"{row['instructions'] + a_pass * passes:.0f}",
                f"{row['kernels']} / {row['xla_kernels']}",
                " / ".join(f"{megabytes:.0f}" for megabytes in held) + " MB",
            ]
        )
    narrow = [row for row in results["NVIDIA H200"] if row["dtype"] == "bfloat16"]
    held = [row["xla_temporary_bytes"] / (2 * math.prod(row["shape"])) for row in narrow]
    first = results["NVIDIA H200"][0]
    instructions = first["instructions"] + first["instructions_a_pass"] * first["passes"]
    issued = 1e9 / first["block"] * instructions / (CORES * ISSUED * CLOCK)
    return (
        f"{table(header, rows)}\n\n{compiled_on(results)}.\n\n"
        "Without the kernel, and with a leaf in one piece, XLA holds "
        f"{min(held):.1f} to {max(held):.1f} times the "
        "bytes of a bfloat16 leaf in temporary memory. By arithmetic alone, "
        f"{CORES} multiprocessors that issue {ISSUED} instructions in each of "
        f"{CLOCK / 1e9:.2f}e9 cycles a second need {issued * 1e3:.1f} ms for 1e9 "
        f"parameters at {instructions:.0f} instructions a block; memory of "
        f"{MEMORY / 1e12:.1f} TB/s needs {LEAST / MEMORY * 1e12:.1f} ms to move "
        f"{LEAST:.1f} bytes for each of them."
    )


def compiled_on(results: dict) -> str:
    versions = ", ".join(f"{name} {at}" for name, at in results["compilers"].items())
    return f"{measured_on(results)}; {versions}"


def tpu_code_table(results: dict) -> str:
    rows = [
        [
            row["case"],
            " x ".join(map(str, row["shape"])),
            row["dtype"],
            *(
                f"{row[key] / 1e6:.1f} MB"
                for key in ("argument_bytes", "temporary_bytes", "xla_temporary_bytes")
            ),
        ]
        for row in results["TPU v5e"]
    ]
    header = ["(window, density)", "leaf", "dtype", "arguments", "temporary", "XLA's"]
    return table(header, rows) + f"\n\n{compiled_on(results)}."


def gpu_section(results: dict) -> str:
    """Times on a GPU, once there are any."""
    if not results:
        return "Nothing has been timed on a GPU yet."
    header = ["parameters", "dtype", "", "step", "time", "GB/s"]
    header += ["of adamw", "of a copy", "peak"]
    rows = [
        [
            row["size"],
            row["dtype"],
            row["name"],
            "with apply_updates" if row["apply_updates"] else "update alone",
            f"{row['seconds'] * 1e3:.3f} ms",
            f"{row['bytes_a_second'] / 1e9:.0f}",
            f"{row['ratio_to_adamw']:.2f}",
            f"{row['ratio_to_copy']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        ]
        for row in results["rows"]
        if "seconds" in row
    ]
    passed = sum(found["passed"] for found in results["checks"].values())
    return (
        f"{passed} of {len(results['checks'])} checks of the kernels "
        f"against XLA passed on the device. {results['machine']['device']}, a copy at "
        f"{results['copy_bytes_a_second'] / 1e9:.0f} GB/s.\n\n{table(header, rows)}\n\n"
        f"{measured_on(results)}.\n"
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
        "was not there ([layer by layer](layerwise.md)):\n\n"
        + llama_figure(load("gpu_memory"), "images"),
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
            "gpu": gpu_section(load("gpu")),
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
