"""Tables, and what stands in pictures' places, of whole training steps on a GPU."""

from typing import NamedTuple

from pages import measured_on, table

CARDS_GB = (16, 24, 40, 80, 141)
LLAMA, SHOWN_MODEL = "Llama-2-7B", "1.7B"
LAYER_BY_LAYER = "MicroAdam, layer by layer"
BARS = {  # of the first picture
    "optax.adamw": "AdamW, bfloat16 moments",
    "optax.adafactor": "Adafactor",
    "MicroAdam": "MicroAdam",
    LAYER_BY_LAYER: LAYER_BY_LAYER,
}
OMITTED = 'implementation="xla"'  # which holds next to what the kernel does
PARTS = ("parameters", "gradients", "state", "other temporary")


class Peak(NamedTuple):
    """Of a step: in GB, and in bytes a parameter."""

    name: str
    gigabytes: float
    bytes_a_parameter: float


def parts(row: dict) -> dict[str, float]:
    """What is held at the peak, in bytes a parameter: of gradients by arithmetic."""
    of = {
        "parameters": row["parameters"],
        "gradients": row["gradients"],
        "state": row["arguments"] - row["parameters"],
    }
    return of | {"other temporary": row["peak"] - sum(of.values())}


def plain_rows(results: dict, model: str, dtype: str = "bfloat16") -> list[dict]:
    """Of a model, where nothing is accumulated."""
    return [
        row
        for row in results["rows"]
        if (row["model"], row["dtype"], row["every"]) == (model, dtype, 1)
    ]


def shown_rows(results: dict) -> list[dict]:
    """The bars of the second picture."""
    rows = plain_rows(results, SHOWN_MODEL)
    return [row for row in rows if OMITTED not in row["optimizer"]]


def shown_name(row: dict) -> str:
    return row["optimizer"].replace(OMITTED, "without its kernel")


def llama_peaks(results: dict) -> list[Peak]:
    """The bars of the first picture."""
    found = {row["optimizer"]: row for row in plain_rows(results, LLAMA)}
    return [
        Peak(shown, found[x]["peak"] * found[x]["number"] / 1e9, found[x]["peak"])
        for x, shown in BARS.items()
    ]


def card_of(gigabytes: float) -> str:
    """The least card that holds that."""
    return next((f"{size} GB" for size in CARDS_GB if gigabytes <= size), "none")


def gpu_peak_table(results: dict) -> str:
    """Bytes a parameter of a whole step on a GPU, a table for each model and dtype."""
    header = ["optimizer", "params", "grads", "state", "other temporary", "peak"]
    header += ["MultiSteps", "accumulate"]
    found, tables = {row["line"]: row for row in results["rows"]}, []
    for model, dtype in dict.fromkeys((x["model"], x["dtype"]) for x in results["rows"]):
        plain = plain_rows(results, model, dtype)
        rows = []
        for row in plain:
            more = (found.get(f"{row['line']}, {x}") for x in header[-2:])
            figures = [
                *parts(row).values(),
                row["peak"],
                *(x and x["peak"] for x in more),
            ]
            rows.append(
                [shown_name(row), *("" if x is None else f"{x:.2f}" for x in figures)]
            )
        number = f"{plain[0]['number']:,} {dtype} parameters."
        tables.append(f"{number}\n\n{table(header, rows)}")
    return "\n\n".join([*tables, f"Compiled for an H200: {measured_on(results)}."])


def layerwise_table(results: dict) -> str:
    """Peaks of a step of Llama-2-7B, the least first, and the least card for each."""
    shown = plain_rows(results, LLAMA) + [
        row | {"optimizer": f"{row['optimizer']}, {row['accumulation']}"}
        for row in results["rows"]
        if (row["model"], row["accumulation"]) == (LLAMA, "accumulate")
        and row["optimizer"] in BARS
    ]
    rows = []
    for row in sorted(shown, key=lambda row: row["peak"]):
        held = row["peak"] * row["number"] / 1e9
        figures = [f"{row['peak']:.2f}", f"{held:.1f} GB", card_of(held)]
        rows.append([shown_name(row), *figures])
    header = ["optimizer", "bytes a parameter", "peak", "fits into"]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def llama_table(results: dict) -> str:
    """Peaks of the step of examples/finetune_llama.py, and the least card for each."""
    rows = []
    for row in results["rows"]:
        held = row["peak"] / 1e9
        each = f"{row['peak_a_parameter']:.2f}"
        rows.append([f"`{row['options']}`", each, f"{held:.1f} GB", card_of(held)])
    header = ["options", "bytes a parameter at the peak", "in all", "fits a card of"]
    return f"{table(header, rows)}\n\n{measured_on(results)}."


def llama_figure(results: dict, folder: str) -> str:
    """The picture of llama_peaks, its figures in words for who does not see it."""
    said = "; ".join(
        f"{x.name}: {x.gigabytes:.1f} GB, {x.bytes_a_parameter:.1f} bytes a parameter, "
        f"for a card of {card_of(x.gigabytes)}"
        for x in llama_peaks(results)
    )
    return (
        "![Peak memory of a whole training step of Llama-2-7B in bfloat16, 1 x 2,048 "
        f"tokens, compiled for an H200. {said}.]({folder}/llama7b.png)"
    )


def parts_figure(results: dict, folder: str) -> str:
    """The picture of the parts of each optimizer's peak."""
    rows = shown_rows(results)
    peaks = "; ".join(f"{row['optimizer']} {row['peak']:.1f}" for row in rows)
    return (
        f"![Bytes a parameter at the peak of a step, {rows[0]['number']:,} bfloat16 "
        f"parameters: {peaks}.]({folder}/step_parts.png)"
    )
