"""Tables of what the state, and a step around it, take in memory."""

from pages import ADAM, DEFAULT, PAPER, load, measured_on, table

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
