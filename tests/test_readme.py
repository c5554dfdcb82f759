"""The code in README.md and on the pages of the docs runs as it is pasted.

If it fails, the first thing that a user copies does not run.
"""

import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "bash",
    "text",
    "py",  # of other projects, run by tests/test_trainers.py
    "{eval-rst}",
    "{literalinclude}",
    "{toctree}",
    "{warning}",
}
WITH_CODE = [page for page, text in PAGES.items() if "```python\n" in text]


def run(page: str, text: str) -> None:
    """All blocks of a page in order, in one namespace; errors name the page's lines."""
    namespace: dict = {"__name__": "__main__"}
    for block in FENCE.finditer(text):
        if block[1] == "python":
            above = "\n" * (text[: block.start(2)].count("\n"))
            exec(compile(above + block[2], page, "exec"), namespace)


def case(page):
    marks = [pytest.mark.makes_nan] if page == "docs/reliability.md" else []
    return pytest.param(page, marks=marks)


@pytest.mark.parametrize("page", list(map(case, WITH_CODE)))
@pytest.mark.promotes
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, PAGES[page])


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md"])
@pytest.mark.promotes
def test_a_wrong_name_in_a_block_is_found(page):
    text = PAGES[page]
    for right, wrong in (("microadam(", "micro_adam("), ("tx.init", "tx.initial")):
        assert right in text
        with pytest.raises((NameError, AttributeError)):
            run(page, text.replace(right, wrong))


@pytest.mark.parametrize("page", list(PAGES))
def test_no_code_is_left_out(page):
    """A fence that is not run is not Python, and nothing has prompts."""
    assert {x[1] for x in FENCE.finditer(PAGES[page])} <= {"python", *NOT_RUN}
    assert len(re.findall(r"^ *```", PAGES[page], re.MULTILINE)) % 2 == 0
    assert ">>>" not in PAGES[page]


def test_blocks_of_other_projects_are_those_that_tests_run():
    tested = (ROOT / "tests" / "test_trainers.py").read_text()
    shown = [x[2] for x in FENCE.finditer(PAGES["docs/trainers.md"]) if x[1] == "py"]
    pieces = re.findall(r"# page: \S+\n(.*?)^ *# end$", tested, re.MULTILINE | re.DOTALL)
    assert len(shown) == len(pieces) > 3
    for block, piece in zip(shown, pieces, strict=True):
        same = (re.sub(r"\n+", "\n", x) for x in (block, textwrap.dedent(piece)))
        assert next(same).endswith(next(same))


def test_the_block_of_numpyro_is_a_whole_program():
    pytest.importorskip("numpyro")
    block = next(x for x in FENCE.finditer(PAGES["docs/trainers.md"]) if x[1] == "py")
    assert "steps = 600\n" in block[2]
    exec(block[2].replace("steps = 600\n", "steps = 2\n"), {})


def test_pages_with_code_are_found():
    assert {"README.md", "docs/index.md", "docs/quickstart.md"} < set(WITH_CODE)
