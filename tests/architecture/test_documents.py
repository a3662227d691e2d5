"""Documents: their references exist, and what they show is so."""

from __future__ import annotations

import ast
import doctest
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.transitions import mermaid

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "infra" / "docs" / "decisions"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
#: Every document but CHANGELOG.md, which tells of what was.
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "THREAT_MODEL.md",
    "CONTRIBUTING.md",
    "infra/nix/FORMATS.md",
    "tests/benchmarks/RESULTS.md",
]


def of_this_tree(text: str) -> list[str]:
    """Return the files of this repository that a text names, in backticks or as targets of links."""
    named = re.findall(r"`((?:coordinator|workers|scheduler|infra|tests)/[\w./-]+\.\w+)(?:::[^`]*)?`", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    return [*named, *linked]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_names_is_there(name: str) -> None:
    assert [path for path in of_this_tree((ROOT / name).read_text()) if not (ROOT / path).exists()] == []


def test_every_decision_has_its_sections_and_stands_in_the_list() -> None:
    records = sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))
    assert re.findall(r"\]\(([0-9][^)]+)\)", (DECISIONS / "README.md").read_text()) == records
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))
    for name in records:
        headings = re.findall(r"^## (.+)$", (DECISIONS / name).read_text(), re.MULTILINE)
        assert headings == ["Context", "Options", "Decision"], name


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the repository, or those of some patterns of git's."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_every_page_that_a_file_cites_is_in_the_repository_and_has_the_section() -> None:
    pages = {str(path.relative_to(ROOT)): path.read_text() for path in tracked("*.md")}
    # These spoke of pages that only their author had.
    elsewhere = re.compile("design" + r" page|nix_" + r"formats|binary_" + r"cache \d")
    cited = re.compile(r"([\w./-]*\w\.md)(?: (?:section )?(\d+(?:\.\d+)?)\b)?")
    wrong = []
    for path in tracked("*.py", "*.toml", "*.md", "*.nix", "run", ".ci/*"):
        text = path.read_text()
        wrong += [f"{path.relative_to(ROOT)}: {match[0]}" for match in elsewhere.finditer(text)]
        for match in cited.finditer(text):
            page = next((page for page in pages if f"/{page}".endswith(f"/{match[1].lstrip('./')}")), None)
            if page is None or (
                match[2] and not re.search(rf"^#+ {re.escape(match[2])}\.? ", pages[page], re.MULTILINE)
            ):
                wrong.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert wrong == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_test_that_a_document_names_is_there(name: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / name).read_text())
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "THREAT_MODEL.md", "CONTRIBUTING.md", "infra/nix/FORMATS.md"]
)
def test_lines_fit_a_pager_where_they_are_not_rows_of_a_table(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if len(line) >= 160 and not line.lstrip().startswith("|")] == []


def test_the_code_map_has_every_package_and_only_modules_that_are_there() -> None:
    rows = {
        match[1]: match[2]
        for match in re.finditer(r"^- \*\*`([\w.]+)`\*\*:(.*(?:\n  .*)*)", ARCHITECTURE, re.MULTILINE)
    }
    packages = {".".join(path.relative_to(ROOT).parent.parts) for path in tracked("*/__init__.py")}
    revisions = "infra.cache.catalog.migrations.versions"
    assert rows.keys() == {name for name in packages if not name.startswith("tests")} - {revisions}
    for package, row in rows.items():
        folder = ROOT.joinpath(*package.split("."))
        modules = [name for name in re.findall(r"`(\w+)`", row) if not (folder / f"{name}.py").exists()]
        assert modules == [], package


def test_the_diagram_of_a_steps_life_is_printed_by_the_core() -> None:
    assert f"```mermaid\n{mermaid()}```" in ARCHITECTURE


def test_the_lines_that_drive_the_core_do_what_they_say() -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL)
    example = doctest.DocTestParser().get_doctest(lines, {}, "ARCHITECTURE.md", None, None)
    ran = doctest.DocTestRunner().run(example)
    assert ran.attempted > 10
    assert ran.failed == 0


def test_every_promise_of_the_threat_model_has_a_name_and_a_test() -> None:
    text = (ROOT / "THREAT_MODEL.md").read_text()
    done = text.split("## What is done\n")[1].split("\n## ")[0]
    promises = re.split(r"^- ", done, flags=re.MULTILINE)[1:]
    assert [promise.split(" ")[0] for promise in promises] == [f"**T{number}" for number in range(1, len(promises) + 1)]
    assert [promise for promise in promises if not re.search(r"`tests/[\w/]+\.py(?:::\w+)?`", promise)] == []


#: The product's own modules.
MODULES = ("coordinator/*.py", "workers/*.py", "infra/*.py", "scheduler/*.py")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each docstring of a module stands, and its text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", ast.get_docstring(node) or ""


def comments(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each comment of a module stands, and its text."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield f"{path.relative_to(ROOT)}:{token.start[0]}", token.string


def test_a_docstring_begins_with_the_thing_and_not_with_a_question() -> None:
    question = re.compile(r"(What|Which|Who|Whoever|Whether|Why|How|That|Where|When|Nobody)\b")
    found = {place: text.split("\n")[0] for path in tracked(*MODULES) for place, text in docstrings(path)}
    assert {place: line for place, line in found.items() if question.match(line)} == {}


def test_docstrings_and_comments_name_the_actor() -> None:
    """`nobody` in backticks is the system's user of that name."""
    nameless = re.compile(r"(?<!`)\b(whoever|nobody)\b(?!`)", re.IGNORECASE)
    found = [
        f"{place}: {word[0]}"
        for path in tracked(*MODULES)
        for place, text in (*docstrings(path), *comments(path))
        for word in nameless.finditer(text)
    ]
    assert found == []
