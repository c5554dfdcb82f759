"""Tables of what was checked and measured on a GPU."""

from pages import measured_on, table

NAMES = {
    "optax.adamw, float32 state": "optax.adamw, float32 moments",
    "optax.adamw, float32 moments": "AdamW, float32 moments",
    "optax.adamw": "AdamW, bfloat16 moments",
}
SHOWN = (
    "1e9",
    "bfloat16",
    True,
    True,
)  # of the README's table: size, dtype, stacked, applied


def timed(results: dict) -> list[dict]:
    return [row for row in results["rows"] if "seconds" in row]


def kind(row: dict) -> tuple:
    return row["size"], row["dtype"], row["stacked"], row["apply"]


def time_table(results: dict) -> str:
    """All that was timed."""
    header = ["parameters", "optimizer", "time", "GB/s", "of adamw", "of a copy", "peak"]
    rows = []
    for row in timed(results):
        leaves = "" if row["stacked"] else ", leaves apart"
        alone = "" if row["apply"] else ", update alone"
        rows.append(
            [
                f"{row['size']} {row['dtype']}{leaves}{alone}",
                row["name"].replace(", all compressed", ""),
                f"{row['seconds'] * 1e3:.2f} ms",
                f"{row['bytes_a_second'] / 1e9:.0f}",
                f"{row['ratio_to_adamw']:.2f}",
                f"{row['ratio_to_copy']:.2f}",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
            ]
        )
    device = results["machine"]["device"]
    copy = f"{results['copy_bytes_a_second'] / 1e9:.0f} GB/s"
    said = f"{device}; a copy moves {copy}."
    return f"{said}\n\n{table(header, rows)}\n\n{measured_on(results)}."


def checks(results: dict) -> str:
    """What came of the checks, in a sentence or two."""
    cases = results["cases"].values()
    elements = sum(x["elements"] for x in cases)
    differing = {
        other: sum(x[other]["codes"] + x[other]["other_state"] for x in cases)
        for other in ("xla", "cpu")
    }
    worst = max(x[other]["worst_update"] for x in cases for other in differing)
    contexts = sum(x["passed"] for x in results["contexts"].values())
    return (
        f"On an {results['machine']['device']} {len(cases)} cases ran 50 steps each, "
        f"{elements / 1e6:.0f} million numbers of state: **{differing['xla']:.0f} differ "
        f"from XLA's there, {differing['cpu']:.0f} from a CPU's**; updates by up to "
        f"{worst:.1f} units in the last place. With None the kernel ran, and was right, "
        f"in {contexts} of {len(results['contexts'])} programs (jit, scan, vmap, "
        "`shard_map`, remat)."
    )


def whole_table(results: dict) -> str:
    """Whole training steps."""
    header = [
        "model",
        "optimizer",
        "a step",
        "peak",
        "bytes a parameter",
        "by XLA's account",
    ]
    rows = [
        [
            row["model"],
            NAMES.get(row["optimizer"], row["optimizer"]),
            f"{row['seconds'] * 1e3:.0f} ms",
            f"{row['peak_bytes'] / 1e9:.1f} GB",
            f"{row['peak_bytes'] / row['parameters']:.2f}",
            f"{row['account_bytes'] / row['parameters']:.2f}",
        ]
        for row in results["rows"]
    ]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def readme_sentences(whole: dict, times: dict) -> str:
    """Whole steps of Llama-2-7B, and the optimizer's part of others."""
    steps = [
        f"{NAMES.get(row['optimizer'], row['optimizer'])} {row['seconds'] * 1e3:.0f} ms "
        f"and {row['peak_bytes'] / 1e9:.1f} GB"
        for row in reversed(whole["rows"])
        if row["model"] == "Llama-2-7B"
    ]
    ratios = [
        f"{row['name'].split(' %)')[0].removeprefix('MicroAdam ')} %) "
        f"{row['ratio_to_adamw']:.2f}"
        for row in timed(times)
        if kind(row) == SHOWN and row["name"].endswith("kernel")
    ]
    return (
        f"On an {whole['machine']['device']} a whole step of Llama-2-7B took: "
        f"{'; '.join(steps)}. The optimizer alone, of 1e9 bfloat16 parameters, in times "
        f"of optax.adamw with float32 moments: {', '.join(ratios[:-1])} "
        "([more](docs/gpus.md))."
    )


def overview(whole: dict) -> str:
    """A sentence for the landing page."""
    found = {x["optimizer"]: x for x in whole["rows"] if x["model"] == "Llama-2-7B"}
    adamw, layered = found["optax.adamw"], found["MicroAdam, layer by layer"]
    gigabytes, milliseconds = (
        [f"{row[key] * scale:.{digits}f}" for row in (layered, adamw)]
        for key, scale, digits in (("peak_bytes", 1e-9, 1), ("seconds", 1e3, 0))
    )
    return (
        f"Measured on an {whole['machine']['device']}: {gigabytes[0]} GB and "
        f"{milliseconds[0]} ms a step, AdamW {gigabytes[1]} GB and {milliseconds[1]} ms."
    )
