"""Content of a directory of Nix files: its digest, and words in it that make an evaluation depend on more.

Evaluation is kept from everything else by Nix (`restrict-eval`), which answers some questions silently instead of with
an error. Files that ask one of these are found by their text.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from infra.records import record

#: Largest tree that is read, in files and in bytes of all of them.
MAX_FILES: Final = 100_000
MAX_BYTES: Final = 1024 * 1024 * 1024
#: Most entries of the tree's top: each is an argument of the evaluator.
MAX_TOP: Final = 200
#: Changes from run to run, though nothing that is evaluated does.
_CLOCK: Final = re.compile(rb"\bcurrentTime\b|\b__currentTime\b")
#: Part of all that `_CLOCK` finds: looked for first, forty times as fast as an expression without a fixed beginning.
_CLOCK_WORD: Final = b"currentTime"
#: Where `restrict-eval` answers otherwise without an error, and what it forbids although it may have a fixed hash.
_OUTSIDE: Final = re.compile(
    rb"getEnv|pathExists|nixPath|findFile|fetchTarball|fetchTree|fetchGit\b|fetchMercurial|fetchClosure"
    rb"|builtins\.fetchurl|getFlake"
)
_SEARCH_PATH: Final = re.compile(rb"<[A-Za-z0-9._+-]+(?:/[A-Za-z0-9._+-]+)*>")


class NotWholeError(Exception):
    """The tree cannot be known whole; the sentence says why."""


@record(frozen=True, slots=True)
class SourceTree:
    """A directory whose entries an evaluation may read, all but `.git`."""

    root: Path
    #: Names at its top that may be read.
    top: tuple[str, ...]
    #: Of all names, kinds, modes and contents below; empty where there is a leak, with which reading ends.
    digest: str
    #: What makes an evaluation of it depend on something else; empty: nothing that was found.
    leak: str


def tree_root(directory: Path) -> Path:
    """Return the git repository that a directory is in, or the directory itself."""
    return next((each for each in (directory, *directory.parents) if (each / ".git").exists()), directory)


def read_tree(root: Path) -> SourceTree:
    """Read a tree.

    Raises:
        NotWholeError: It is too large, or something in it cannot be read.
    """
    try:
        top = tuple(sorted(each.name for each in root.iterdir() if each.name != ".git"))
        if len(top) > MAX_TOP:
            raise NotWholeError(f"{root} has more than {MAX_TOP} entries")
        digest = hashlib.sha256()
        for path, mode, content in _members(root, top):
            if leak := _leak(path, content):
                return SourceTree(root, top, "", leak)
            name = os.fsencode(path.relative_to(root))
            digest.update(b"%d %s %d %d " % (len(name), name, mode, len(content)))
            digest.update(content)
    except OSError as error:
        raise NotWholeError(f"{error.filename}: {error.strerror}") from None
    return SourceTree(root, top, digest.hexdigest(), "")


def find_clock(root: Path) -> str:
    """Return the first file of a tree that asks for the time; empty where none does.

    Raises:
        NotWholeError: It is too large, or something in it cannot be read.
    """
    try:
        top = sorted(each.name for each in root.iterdir()) if root.is_dir() else []
        return next((str(path) for path, _, content in _members(root, top) if _clock(content)), "")
    except OSError as error:
        raise NotWholeError(f"{error.filename}: {error.strerror}") from None


def _members(root: Path, top: list[str] | tuple[str, ...]) -> Iterator[tuple[Path, int, bytes]]:
    """Yield path, kind with executable bit, and content of all below, in one order.

    A tree that is too large is refused before any of it is read.
    """
    for path, found in _found(root, top):
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFDIR:
            yield path, kind, b""
        elif kind == stat.S_IFLNK:
            yield path, kind, os.fsencode(path.readlink())
        else:
            yield path, kind | (found.st_mode & stat.S_IXUSR), _content(path, found.st_size)


def _found(root: Path, top: list[str] | tuple[str, ...]) -> list[tuple[Path, os.stat_result]]:
    """Return all that is below, in one order: the entries of a directory follow it."""
    entries: list[tuple[Path, os.stat_result]] = []
    size = 0
    waiting = [root / name for name in reversed(top)]
    while waiting:
        path = waiting.pop()
        found = path.lstat()
        entries.append((path, found))
        size += found.st_size
        if len(entries) > MAX_FILES or size > MAX_BYTES:
            raise NotWholeError(f"{root} has more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB")
        if stat.S_ISDIR(found.st_mode):
            waiting += sorted(path.iterdir(), reverse=True)
        elif not stat.S_ISLNK(found.st_mode) and not stat.S_ISREG(found.st_mode):
            raise NotWholeError(f"{path} is neither a file, a directory nor a link")
    return entries


def _content(path: Path, size: int) -> bytes:
    """Read a file of a size that was counted."""
    with path.open("rb") as file:
        content = file.read(size + 1)
    if len(content) > size:
        raise NotWholeError(f"{path} grows while it is read")
    return content


def _clock(content: bytes) -> re.Match[bytes] | None:
    return _CLOCK.search(content) if _CLOCK_WORD in content else None


def _leak(path: Path, content: bytes) -> str:
    found = _clock(content) or _OUTSIDE.search(content)
    if found is None and (path.suffix == ".nix" or b"tryEval" in content):
        found = _SEARCH_PATH.search(content)
    return f"{path} has {found[0].decode()}" if found else ""


def text_leak(text: str) -> str:
    """Return what makes the evaluation of an expression depend on something else; empty: nothing that was found."""
    return _leak(Path("the expression.nix"), text.encode())
