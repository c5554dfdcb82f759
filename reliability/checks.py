"""What source and docs say, beside each other: the part of CI that runs nothing.

python -m pytest reliability/checks.py
"""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import sys

import pytest

import methods
import micro_batches
import microadam_optax
import report
import report_reliability
import runs
import study
import tables

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNTIME = {"jax", "optax"}
WITH_JAX = {"numpy"}  # jax itself requires it
PARTS = [
    "block",
    "call",
    "data",
    "entries",
    "error",
    "handlers",
    "llvm",
    "select",
    "threads",
]
KERNEL = {f"cpu_{x}.py" for x in PARTS}  # of CPUs
OPTIONAL = {  # the extras `planner` and `cpu`, and the files that may want them
    "rich": {"command.py"},
    "numba": KERNEL | {"cpu.py"},
    "llvmlite": KERNEL,  # numba requires it
}
UNSAFE = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch",
}
HELPERS = {  # of the examples; they are no examples themselves
    "bert",
    "checkpointing",
    "command_line",
    "cpu_devices",
    "docstrings",
    "gguf_file",
    "gguf_tokenizer",
    "instructions",
    "language_model",
    "llama",
    "llama_config",
    "llama_files",
    "llama_optimizers",
    "llama_safetensors",
    "llama_samples",
    "llama_saving",
    "llama_step",
    "llama_training",
    "llama_weights",
    "text_data",
    "digits",
}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file):
    """Top-level names of all modules that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def section(page, name):
    """What a script has written into a page."""
    inside = page.read_text().split(f"<!-- {name} -->\n")[1]
    return inside.split(f"\n<!-- end {name} -->")[0]


def test_the_package_requires_jax_and_optax_alone():
    required = importlib.metadata.requires("microadam-optax")
    always = [x for x in required if "extra ==" not in x]
    assert sorted(always) == ["jax>=0.10.2", "optax>=0.2.8"]  # what CI's oldest run has


def test_the_package_imports_nothing_else():
    for file in sources("microadam_optax"):
        for name in imported(file):
            known = name in sys.stdlib_module_names | RUNTIME | WITH_JAX
            optional = file.name in OPTIONAL.get(name, ())
            assert known or optional or name == "microadam_optax", (file, name)


@pytest.mark.parametrize("folder", ["microadam_optax", "examples"])
def test_nothing_loads_pickles(folder):
    for file in sources(folder):
        assert not UNSAFE & set(imported(file)), file
        assert "allow_pickle" not in file.read_text(), file


def test_every_public_name_is_documented():
    page = (DOCS / "api.md").read_text()
    faces = set(dir(microadam_optax)) - {"planner"}  # which is a command
    for name in faces:
        if not name.startswith("_"):
            assert f":: microadam_optax.{name}\n" in page
            data = name in ("PAPER", "STATIC_ARGS")
            assert data or getattr(microadam_optax, name).__doc__


def test_names_of_the_package_on_pages_exist():
    """Functions in the algorithm's table, files in CONTRIBUTING."""
    page = (DOCS / "algorithm.md").read_text()
    for module, name in re.findall(r"`(_\w+)\.(\w+)`", page):
        found = importlib.import_module(f"microadam_optax.{module}")
        assert hasattr(found, name), (module, name)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"(?<![\w`])`?(?:microadam_optax/)?(_\w+)\.py`", text):
        assert list((ROOT / "microadam_optax").rglob(f"{name}.py")), name


def test_every_example_is_listed():
    text = (ROOT / "examples" / "README.md").read_text()
    for file in sources("examples"):
        command = f"`python examples/{file.relative_to(ROOT / 'examples')}"
        assert (command in text) != (file.stem in HELPERS), file
    for file in sources("examples/recipes"):
        page = DOCS / "recipes" / f"{file.stem}.md"
        assert page.exists() != (file.stem in HELPERS), page


@pytest.mark.parametrize("page", [DOCS / "convergence.md", ROOT / "README.md"])
def test_the_summary_is_that_of_the_results(page):
    assert section(page, "quality") == report.quality_section()


def test_the_table_of_micro_batches_is_that_of_the_results():
    assert section(DOCS / "layerwise.md", "micro-batches") == micro_batches.section()


def lengths():
    for name, one in study.STUDIES.items():
        yield from ((name, steps) for steps in (one.steps, one.long) if steps)


@pytest.mark.parametrize(("name", "steps"), list(lengths()))
def test_docs_have_the_tables_of_the_results(name, steps):
    """What `report.py` would write stands there, each in its own section."""
    windows = name == "language_windows"
    text = section(DOCS / "convergence.md", "language windows" if windows else name)
    shown = list(methods.WINDOWS if windows else methods.MAIN)
    found = report.outcomes(name, steps, shown)
    found = report.in_short(found) if windows else found
    reference = report.adam_of(report.outcomes(name, steps, ["Adam"]))
    if windows and reference and found:
        found = [reference, *found]
    if found:
        assert report.table(found, reference) in text
    elif steps == study.STUDIES[name].steps:
        assert text.strip() == "Not run yet."
    else:
        assert f"{steps:,} steps" not in text


@pytest.mark.parametrize("name", sorted(runs.TEXTS))
def test_all_runs_of_a_record_have_the_texts_of_one_python(name):
    record = runs.Runs(name)
    for row in record.rows:
        record.check(record.machine | row.get("machine", {}))


@pytest.mark.parametrize("page", tables.sections())
def test_docs_have_the_tables_of_the_benchmarks(page):
    for name, content in tables.sections()[page].items():
        assert section(ROOT / page, name) == content, name


@pytest.mark.parametrize("name", report_reliability.SECTIONS)
def test_docs_have_what_the_long_checks_found(name, tmp_path, monkeypatch):
    picture = tmp_path / pathlib.Path(report_reliability.PICTURE).name
    monkeypatch.setattr(report_reliability, "PICTURE", picture)
    file, write = report_reliability.SECTIONS[name]
    found = report_reliability.load(file)
    expected = write(found) if found else "Not run yet."
    assert section(report_reliability.PAGE, name) == expected
