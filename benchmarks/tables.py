"""Writes docs/benchmarks.md, and the figures in README.md, from benchmarks/results.

python benchmarks/tables.py
"""

import json
import math
import pathlib
import re

# Of an H200, by its data sheet, and what (10, 1 %) moves for a bfloat16 parameter: its
# gradient, codes and range in and out, its share of the window in and of a slot out.
CORES, ISSUED, CLOCK, MEMORY = 132, 4, 1.98e9, 4.8e12
LEAST = 2 * (2 + 1 / 2 + 4 / 256) + 27 * 3 / 256 * (1 + 1 / 9)
ROOT = pathlib.Path(__file__).parents[1]


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(results: dict) -> str:
    on = results["machine"]
    return (
        f"{on['processor']}, jax {on['jax']}, optax {on['optax']}, Python "
        f"{on['python']}; `{on['command']}`"
    )


def state_table(results: dict) -> str:
    models = results["state_bytes_a_parameter"]
    settings = next(iter(models.values()))
    rows = [
        [name, *(f"{held[name]:.3f}" for held in models.values())] for name in settings
    ]
    return table(["(window, density)", *models], rows)


def temporary_table(results: dict) -> str:
    """By leaf, at the default setting and, in brackets, where it is most."""
    rows = []
    for name, held in results["temporary_bytes"].items():
        mb = {x: f"{number / 1e6:.1f}" for x, number in held.items()}
        ours = [f"{mb[x]} MB ({mb[f'{x}, most']})" for x in ("kernel", "XLA")]
        rows.append([name, f"{mb['leaf']} MB", f"{mb['Adam']} MB", *ours])
    header = ["leaves", "one holds", "optax.adam"]
    return table([*header, "MicroAdam, kernel", "MicroAdam without numba"], rows)


def step_table(results: dict) -> str:
    header = [
        "parameters",
        "(window, density)",
        "blocks",
        "cores",
        "step",
        "optax.adamw",
        "MicroAdam",
        "ratio",
    ]
    rows = [
        [
            f"{row['parameters'] / 1e6:.0f}M",
            row["setting"],
            row["blocks"],
            str(row["cores"]),
            "with apply_updates" if row["apply_updates"] else "update alone",
            f"{row['adamw_ns_a_parameter']:.2f} ns",
            f"{row['ns_a_parameter']:.2f} ns",
            f"{row['ratio']:.2f}",
        ]
        for row in results["rows"]
    ]
    return table(header, rows)


def compile_table(results: dict) -> str:
    names = list(next(iter(results["seconds"].values())))
    rows = []
    for case, seconds in results["seconds"].items():
        base = seconds[names[0]]
        others = [
            f"{seconds[n]:.2f} s ({seconds[n] / base:.1f} times)" for n in names[1:]
        ]
        rows.append([case, f"{base:.2f} s", *others])
    return table(["leaves", *names], rows)


def page(memory: dict, step: dict, compilation: dict) -> str:
    step_xla, compilation_xla = map(load, ("step_time_xla", "compile_time_xla"))
    return f"""# Benchmarks

Written by `python benchmarks/tables.py` from `benchmarks/results/`. What the kernels are
compiled to is on their [page](kernels.md).

## Bytes of state for each parameter

{state_table(memory)}

From shapes alone: {measured_on(memory)}.

## Temporary memory of a donated update

{temporary_table(memory)}

XLA's own account of the compiled update with its learning rate, by default and in
brackets the most of all settings: {measured_on(memory)}.

## Step time

Nanoseconds for each parameter, and the median of the ratios of neighbouring runs; all
that is written is donated. "With apply_updates": a whole step of several in one program,
less the making of gradients. Blocks of 232 pad the cells of rows of 11,008. A copy of a
float32 array took {step["copy_ns_an_element"]:.2f} ns an element in the same run.

{step_table(step)}

{measured_on(step)}.

Where the time of the CPU kernel goes, in nanoseconds a parameter of one core that has the
data in its caches (decay, rate and `apply_updates` come on top, one pass over memory):

{parts_table(load("cpu_parts"))}

Without numba:

{step_table(step_xla)}

{measured_on(step_xla)}.

## Tracing, compiling and the first step

{compile_table(compilation)}

{measured_on(compilation)}.

Without numba:

{compile_table(compilation_xla)}

{measured_on(compilation_xla)}.
"""


def speed_table(step: dict) -> str:
    """Whole steps on all cores, by setting and blocks: the ratio to optax.adamw."""
    most = max(row["cores"] for row in step["rows"])
    rows = [r for r in step["rows"] if r["apply_updates"] and r["cores"] == most]
    blocks = list(dict.fromkeys(row["blocks"] for row in rows))
    found: dict[tuple, dict[str, str]] = {}
    for row in rows:
        of = f"{row['millions']}M", row["setting"]
        found.setdefault(of, {})[row["blocks"]] = f"{row['ratio']:.2f}"
    header = ["parameters", "(window, density)", *(f"blocks of {x}" for x in blocks)]
    return table(
        header, [[*of, *(row.get(x, "") for x in blocks)] for of, row in found.items()]
    )


def fill(text: str, name: str, content: str) -> str:
    """Replaces what stands between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


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


def short_peak_table(results: dict) -> str:
    """The peaks alone, in bytes a parameter, without accumulation."""
    number, found = results["parameters"], {}
    for row in results["rows"]:
        if "MultiSteps" not in row["optimizer"]:
            peak = f"{row['peak'] / number:.1f}"
            found.setdefault(row["optimizer"], {})[row["dtype"]] = peak
    dtypes = ["float32", "bfloat16"]
    header = ["", *(f"{x} parameters" for x in dtypes)]
    return table(header, [[n, *map(peaks.get, dtypes)] for n, peaks in found.items()])


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


def gpu_peak_table(results: dict, dtype: str = "bfloat16") -> str:
    """Bytes a parameter of a whole step on a GPU, a table for each model."""
    header = ["optimizer", "parameters", "and state", "temporary", "peak", "MultiSteps"]
    found, tables = {row["line"]: row for row in results["rows"]}, []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows, number = [], 0
        for row in results["rows"]:
            if (row["model"], row["dtype"], row["every"]) != (model, dtype, 1):
                continue
            number = row["number"]
            parts = ("parameters", "arguments", "temporary", "peak")
            figures = [f"{row[x]:.2f}" for x in parts]
            more = found.get(f"{row['line']}, MultiSteps")
            rows.append(
                [row["optimizer"], *figures, f"{more['peak']:.2f}" if more else ""]
            )
        tables.append(f"{table(header, rows)}\n\n{number:,} {dtype} parameters.")
    return "\n\n".join([*tables, f"Compiled for an H200: {measured_on(results)}."])


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


def sharding_page(text: str, results: dict) -> str:
    plan = results["plan_70b"]
    layer = {n: sent(each["collectives"]) for n, each in results["layer_70b"].items()}
    own = f"{plan['parameter_bytes'] / 1e9:.3f} GB"
    sections = {
        "meshes": mesh_tables(results),
        "unaligned": unaligned_table(results),
        "weak scaling": weak_table(results),
        "plan": (
            f"{plan['parameters']:,} parameters on a mesh of "
            + " x ".join(f"{n} {axis}" for axis, n in plan["mesh"].items())
            + f"; bfloat16 parameters and gradients are {own} each a device."
            f"\n\n{plan_table(results)}\n\n"
            "Collectives of the update of a layer, the embedding and the head, compiled "
            f"for the 256 devices: {layer['8']} with `shards=8`, "
            f"**{layer[str(plan['shards'])]}** with `shards={plan['shards']}`."
        ),
        "machine": f"{measured_on(results)}.",
    }
    for name, content in sections.items():
        text = fill(text, name, content)
    return text


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
        f"\n## On a GPU\n\n{passed} of {len(results['checks'])} checks of the kernels "
        f"against XLA passed on the device. {results['machine']['device']}, a copy at "
        f"{results['copy_bytes_a_second'] / 1e9:.0f} GB/s.\n\n{table(header, rows)}\n\n"
        f"{measured_on(results)}.\n"
    )


def main() -> None:
    memory, step, compilation = map(load, ("memory", "step_time", "compile_time"))
    on_gpu = ROOT / "benchmarks" / "results" / "gpu.json"
    text = page(memory, step, compilation)
    if on_gpu.exists():
        text += gpu_section(load("gpu"))
    (ROOT / "docs" / "benchmarks.md").write_text(text)
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "state", state_table(memory))
    text = fill(text, "temporary", temporary_table(memory))
    text = fill(text, "peak", short_peak_table(load("peak_memory")))
    speed = f"{speed_table(step)}\n\n{measured_on(step)}.\n\n"
    speed += f"{compile_table(compilation)}\n\n{measured_on(compilation)}."
    readme.write_text(fill(text, "speed", speed))
    of_memory = ROOT / "docs" / "memory.md"
    content = f"{state_table(memory)}\n\nFrom shapes alone: {measured_on(memory)}."
    text = fill(of_memory.read_text(), "state", content)
    text = fill(text, "peak", peak_table(load("peak_memory")))
    if (ROOT / "benchmarks" / "results" / "resident_memory.json").exists():
        text = fill(text, "resident", resident_table(load("resident_memory")))
    if (ROOT / "benchmarks" / "results" / "gpu_memory.json").exists():
        text = fill(text, "gpu peak", gpu_peak_table(load("gpu_memory")))
    of_memory.write_text(text)
    kernels = ROOT / "docs" / "kernels.md"
    text = fill(kernels.read_text(), "gpu code", gpu_code_table(load("kernels")))
    kernels.write_text(fill(text, "tpu code", tpu_code_table(load("kernels"))))
    page_of_meshes = ROOT / "docs" / "sharding.md"
    page_of_meshes.write_text(sharding_page(page_of_meshes.read_text(), load("sharding")))


if __name__ == "__main__":
    main()
