"""Trees of Nix files that cannot be keyed: they cost little to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.evaluation.source_tree import MAX_BYTES, NotWholeError, find_clock, read_tree

#: Bytes of one file; files have holes, so that they take no disk.
LARGE = 64 * 1024 * 1024


def bytes_read() -> int:
    """Return how many bytes this process has read so far."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def sparse(file: Path, size: int) -> None:
    """Make a file of zeros."""
    with file.open("wb") as out:
        out.truncate(size)


def test_a_tree_that_is_too_large_is_refused_before_any_of_it_is_read(tmp_path: Path) -> None:
    sparse(tmp_path / "first", LARGE)
    sparse(tmp_path / "last", MAX_BYTES)
    before = bytes_read()
    with pytest.raises(NotWholeError, match="1024 MiB"):
        read_tree(tmp_path)
    assert bytes_read() - before < LARGE // 64


def test_reading_ends_with_the_first_leak(tmp_path: Path) -> None:
    (tmp_path / "default.nix").write_text("import <nixpkgs> { }")
    sparse(tmp_path / "image", LARGE)
    before = bytes_read()
    assert read_tree(tmp_path).leak == f"{tmp_path}/default.nix has <nixpkgs>"
    assert bytes_read() - before < LARGE // 64


@pytest.mark.parametrize(
    ("text", "asks"), [("__currentTime", True), ("builtins.currentTime", True), ("currentTimes", False)]
)
def test_the_clock_is_found_as_a_word(tmp_path: Path, text: str, *, asks: bool) -> None:
    (tmp_path / "default.nix").write_text(text)
    assert find_clock(tmp_path) == (str(tmp_path / "default.nix") if asks else "")
    assert bool(read_tree(tmp_path).leak) == asks
