"""What documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "infra" / "docs" / "decisions"
#: Every document but CHANGELOG.md, which tells of what was.
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "THREAT_MODEL.md", "CONTRIBUTING.md", "tests/benchmarks/RESULTS.md"]


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
