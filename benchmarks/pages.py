"""What is written into README.md and the pages of docs/: tables, and where they stand."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
# As the results name them.
ADAM, DEFAULT, PAPER = "optax.adamw", "(2, 6 %)", "(10, 1 %), all compressed"


def load(name: str) -> dict:
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    # No line ends within a figure or a setting.
    text = re.sub(r"\((\d+), (\d+) %\)", "(\\1,\u00a0\\2\u00a0%)", text)
    text = re.sub(r"(\d) (GB|MB|s|ms|times)\b", "\\1\u00a0\\2", text)
    text = re.sub(r"(?<=\d) x (?=\d)", "\u00a0x\u00a0", text)
    return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def fill(text: str, name: str, content: str) -> str:
    """Replaces what stands between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def measured_on(results: dict) -> str:
    on = results["machine"]
    return (
        f"{on['processor']}, jax {on['jax']}, optax {on['optax']}, Python "
        f"{on['python']}; `{on['command']}`"
    )
