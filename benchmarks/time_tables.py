"""Tables of how long steps take, and compiling."""

from pages import ADAM, DEFAULT, load, measured_on, table

PARTS = {  # of the CPU kernel, by the lines of its block
    "gradient and error": ("accumulate",),
    "selection": ("select",),
    "entries and moments": ("take", "add_newest", "add_older", "write_slot"),
    "update": ("update_entries", "update_selected"),
    "quantization": ("measure", "quantize"),
    "writing": ("write", "clear"),
}


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


def step_table(results: dict) -> str:
    """Whole steps and updates alone, for each size, setting and number of cores."""
    header = ["size", "(window, density)", "blocks", "cores"]
    for step in ("step", "update"):
        header += [f"{step}: adamw", "MicroAdam", "ratio"]
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
