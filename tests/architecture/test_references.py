"""Pages that are printed from code are what the code says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture.references import PAGES


@pytest.mark.parametrize(("file", "text"), PAGES.items(), ids=lambda each: getattr(each, "name", ""))
def test_the_page_is_printed_from_the_code(file: Path, text: Callable[[], str]) -> None:
    assert file.read_text() == text(), "run `./run docs`"
