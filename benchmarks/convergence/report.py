"""Writes the tables and pictures of the studies into docs/, from their results.

python benchmarks/convergence/report.py
"""

import sys

import choosing
import demonstrations
import methods
import micro_batches
import pictures
import study
from runs import ROOT, Outcome, by_rate, deciding, outcome

sys.path.append(str(ROOT / "benchmarks"))

import pages
import time_tables

DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
LITERAL = [methods.PAPER, *methods.WINDOWS]
COMPARED = {  # the studies in the table of rates
    "digits": ("digits",),
    "language": ("language", "language_windows"),
    "fine-tuned": ("language_finetuned",),
}


def outcomes(name: str, steps: int, only: list[str] | None = None) -> list[Outcome]:
    """Those optimizers of a study that have run with all seeds."""
    one, runs = study.STUDIES[name], study.record(name)
    wanted = only or list(one.methods)
    found = [outcome(runs, method, steps, one.seeds) for method in wanted]
    return [x for x in found if x]


def figure(value: float, name: str) -> str:
    return f"{value:.4f}" if name.endswith("loss") else f"{100 * value:.2f} %"


def table(found: list[Outcome], reference: Outcome | None) -> str:
    """Mean and spread over the seeds, and the difference to Adam."""
    what = deciding(found[0].rows[0])
    seeds = len(found[0].values)
    header = ["optimizer", "state B/param", "learning rate"]
    header += [f"{what}, mean of {seeds}", "spread", "against Adam"]
    rows = []
    for one in found:
        against = ""
        if reference and one.method != reference.method:
            difference = one.mean - reference.mean
            scale = 1 if what.endswith("loss") else 100
            against = f"{scale * difference:+.{4 if scale == 1 else 2}f}"
        rows.append(
            [
                one.method,
                f"{one.state_bytes:.2f}",
                f"{one.rate:g}",
                figure(one.mean, what),
                figure(one.spread, what),
                against,
            ]
        )
    return pages.table(header, rows)


def adam_of(found: list[Outcome]) -> Outcome | None:
    return next((x for x in found if x.method == "Adam"), None)


def main_section(name: str) -> str:
    """A study of all optimizers: its tables, its curves and its learning rates."""
    one, runs = study.STUDIES[name], study.record(name)
    wanted = [x for x in methods.MAIN if x in one.methods]
    found = outcomes(name, one.steps, wanted)
    if not found:
        return "Not run yet."
    longer = outcomes(name, one.long, wanted) if one.long else []
    if one.evaluations > 1:
        pictures.curves(longer or found, IMAGES / f"{name}.png")
    grids = {x: by_rate(runs, x, one.steps, one.search_seeds) for x in wanted}
    what = deciding(runs.rows[0])
    pictures.rates(
        {x: grid for x, grid in grids.items() if grid}, what, IMAGES / f"{name}_rates.png"
    )
    parts = [
        f"{one.about[0].upper()}{one.about[1:]}. {one.steps:,} steps, {one.seeds} seeds "
        f"at the best learning rate of a grid ({one.search_seeds} seed"
        f"{'s' if one.search_seeds > 1 else ''}), MicroAdam but the paper's at Adam's:",
        with_missing(found, wanted),
    ]
    if longer:
        tried = len(by_rate(runs, "Adam", one.long, 1))
        wide = f" (Adam's the best of {tried})" if tried >= study.GRID else ""
        parts += [
            f"{one.long:,} steps, {one.seeds} seeds, at that rate or as many times half "
            f"of it as that helps{wide}, MicroAdam but the paper's at Adam's:",
            with_missing(longer, list(one.long_for) or wanted),
        ]
    if one.evaluations > 1:
        parts.append(f"![{what} by step](images/{name}.png)")
    parts += [
        f"![{what} by learning rate](images/{name}_rates.png)",
        f"{measured_on(name, [*found, *longer])}.",
    ]
    return "\n\n".join(parts)


def with_missing(found: list[Outcome], wanted: list[str]) -> str:
    """Their table, and who is to come."""
    missing = [x for x in wanted if x not in {y.method for y in found}]
    note = f"\n\nNot complete yet: {', '.join(missing)}." if missing else ""
    return table(found, adam_of(found)) + note


def measured_on(name: str, found: list[Outcome]) -> str:
    """The record's machine and command, and who ran elsewhere."""
    machine = study.record(name).machine
    command = f"python benchmarks/convergence/study.py {name}"  # a part of it or all
    text = pages.measured_on({"machine": {**machine, "command": command}})
    others: dict[str, list[str]] = {}
    for one in found:
        for row in one.rows:
            own = machine | row.get("machine", {})
            if own != machine:
                where = f"{own['processor']}, jax {own['jax']}, Python {own['python']}"
                title = f"{one.method} ({one.steps:,} steps)"
                names = others.setdefault(where, [])
                names += [] if title in names else [title]
    return "; ".join([text, *(f"{', '.join(y)}: {x}" for x, y in others.items())])


def windows_section(name: str) -> str:
    """The settings of MicroAdam beside their bytes, and Adam."""
    one = study.STUDIES[name]
    found = in_short(outcomes(name, one.steps, list(methods.WINDOWS)))
    if not found:
        return "Not run yet."
    adam = adam_of(outcomes(name, one.steps, ["Adam"]))
    image = f"{name}_bytes.png"
    pictures.equal_bytes(found, adam, one.about, IMAGES / image)
    what = deciding(found[0].rows[0])
    shown = [adam, *found] if adam else found
    options = in_short(outcomes(name, one.steps, list(methods.OPTIONS)))
    others = f"\n\nOne thing changed:\n\n{table(options, adam)}" if options else ""
    return (
        f"{one.about[0].upper()}{one.about[1:]}; {one.steps:,} steps, {one.seeds} seeds, "
        "`match_adam=False`, each at its own best learning rate."
        f"\n\n{table(shown, adam)}\n\n![{what} by bytes of state](images/{image}){others}"
    )


def in_short(found: list[Outcome]) -> list[Outcome]:
    """Where all are literal, and the text says so."""
    return [x._replace(method=x.method.removesuffix(", literal")) for x in found]


def quality_section() -> str:
    """Adam and the settings of MicroAdam in all studies, mean and spread."""
    wanted = ["Adam", methods.DEFAULT, methods.LEAST, methods.PAPER]
    rows = []
    for name, one in study.STUDIES.items():
        for steps in (one.steps, one.long):
            known = {x.method: x for x in outcomes(name, steps, wanted)}
            if one.record or "Adam" not in known:
                continue
            what = deciding(known["Adam"].rows[0])
            means = [
                f"{figure(x.mean, what)} ± {figure(x.spread, what)}" if x else ""
                for x in map(known.get, wanted)
            ]
            rows.append([f"{one.about}; {steps:,} steps, {what}", *means])
    return pages.table(["mean ± spread", *wanted], rows)


def overview_section() -> str:
    """A sentence for the landing page."""
    one = study.STUDIES["language"]
    wanted = ["Adam", methods.DEFAULT]
    adam, ours = outcomes("language", one.long, wanted)
    what = deciding(adam.rows[0])
    return (
        f"**A {what} of {figure(ours.mean, what)} ± {figure(ours.spread, what)}, where "
        f"Adam ends at {figure(adam.mean, what)} ± {figure(adam.spread, what)}**: "
        f"{one.about}, {one.long:,} steps, both at Adam's best learning rate "
        "([convergence](convergence.md)):"
    )


def rates_section() -> str:
    """The best learning rate of each setting over Adam's, by study."""
    columns = [best_rates(names) for names in COMPARED.values()]
    rows = [[in_table(x), *(own.get(x, "") for own in columns)] for x in LITERAL]
    return pages.table(["(window, density)", *COMPARED], rows)


def in_table(method: str) -> str:
    return method.removeprefix("MicroAdam ").removesuffix(", literal")


def best_rates(names: tuple[str, ...]) -> dict[str, str]:
    """By method, over Adam's best, in the first of these studies that has it."""
    found: dict[str, str] = {}
    for name in names:
        steps = study.STUDIES[name].steps
        adam = adam_of(outcomes(name, steps, ["Adam"]))
        for one in outcomes(name, steps, LITERAL) if adam else []:
            found.setdefault(one.method, f"{one.rate / adam.rate:g}")
    return found


def main() -> None:
    page = DOCS / "convergence.md"
    text = page.read_text()
    sections = {
        name: main_section(name) for name in study.STUDIES if "windows" not in name
    }
    sections["digits windows"] = windows_section("digits")
    sections["language windows"] = windows_section("language_windows")
    sections["quality"] = quality_section()
    sections["rosenbrock"] = demonstrations.rosenbrock_section()
    sections["mechanism"] = demonstrations.mechanism_section()
    for name, content in sections.items():
        text = pages.fill(text, name, content)
    page.write_text(text)
    for other, mark, content in (
        (ROOT / "README.md", "quality", sections["quality"]),
        (DOCS / "index.md", "quality", overview_section()),
        (DOCS / "tuning.md", "rates", rates_section()),
        (DOCS / "tuning.md", "choosing", choosing.section()),
        (DOCS / "layerwise.md", "micro-batches", micro_batches.section()),
    ):
        other.write_text(pages.fill(other.read_text(), mark, content))
    held = pages.load("memory")["state_bytes_a_parameter"]["Llama-2-7B"]
    named = {f"MicroAdam {x}" if x.startswith("(") else x: y for x, y in held.items()}
    pictures.state_bytes(named, IMAGES / "state_bytes.png")
    pictures.speed(time_tables.ratios(pages.load("step_time")), IMAGES / "speed.png")


if __name__ == "__main__":
    main()
