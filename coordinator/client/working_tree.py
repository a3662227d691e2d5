"""The working tree of a git repository as a tree for a remote evaluation: files that git tracks, as they stand now.

Uncommitted changes are in it, files that git does not track are not, as with a flake. Submodules are empty directories.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Final

from coordinator.api.trees import TreeBounds, TreeChecker, compressed
from coordinator.errors import CoordinatorError
from infra.nar_files import CHUNK_SIZE
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, NarSymlink, NarWriter
from infra.process import ProcessError, ProcessNotFound, run
from infra.records import record

#: Largest tree that is sent; a farm may take less.
BOUNDS: Final = TreeBounds(size_bytes=16 * 1024**3, entries=5_000_000)
_GIT_S: Final = 120.0
_MAX_OUTPUT_BYTES: Final = 1024**3
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_SUBMODULE: Final = b"160000"


class WorkingTreeError(CoordinatorError):
    """The working tree cannot be sent; the sentence says what to do."""

    code: ClassVar[str] = "working_tree"


@record(frozen=True, slots=True)
class WorkingTree:
    """A working tree and the files of it that are sent."""

    root: Path
    #: Paths below it, sorted as a NAR sorts them; True for an empty directory (a submodule).
    paths: tuple[tuple[bytes, bool], ...]
    #: Files that git neither tracks nor ignores.
    untracked: int

    def events(self) -> Iterator[NarEvent]:
        """Yield the events of its NAR. Raises `CoordinatorError` where it cannot be sent, or changes meanwhile."""
        checker = TreeChecker(BOUNDS)
        for event in self._events():
            checker.check(event)
            yield event

    def name(self) -> str:
        """Return the SHA-256 of its NAR; reads all of it."""
        found = hashlib.sha256()
        for piece in self._nar():
            found.update(piece)
        return found.hexdigest()

    def compressed(self) -> Iterator[bytes]:
        """Yield it as it is sent."""
        return compressed(self._nar())

    def _nar(self) -> Iterator[bytes]:
        writer = NarWriter()
        for event in self.events():
            yield writer.write(event)
        writer.close()

    def _events(self) -> Iterator[NarEvent]:
        yield NarDirectory(b"")
        above: list[bytes] = []
        for path, empty in self.paths:
            *directories, last = path.split(b"/")
            shared = 0
            while shared < min(len(above), len(directories)) and above[shared] == directories[shared]:
                shared += 1
            while len(above) > shared:
                above.pop()
                yield NarDirectoryEnd()
            for name in directories[shared:]:
                above.append(name)
                yield NarDirectory(name)
            if empty:
                yield NarDirectory(last)
                yield NarDirectoryEnd()
            else:
                yield from self._file(path, last)
        for _ in above:
            yield NarDirectoryEnd()
        yield NarDirectoryEnd()

    def _file(self, path: bytes, name: bytes) -> Iterator[NarEvent]:
        at = os.path.join(os.fsencode(self.root), path)  # noqa: PTH118 - a name may be any bytes
        try:
            if stat.S_ISLNK(os.lstat(at).st_mode):
                yield NarSymlink(name, os.readlink(at))  # noqa: PTH115 - as above
                return
            descriptor = os.open(at, _READ_FLAGS)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise WorkingTreeError(f"{os.fsdecode(path)!r} is no file; take it out of the repository")
                yield NarFile(name, bool(found.st_mode & stat.S_IXUSR), found.st_size)
                left = found.st_size
                while left:
                    data = file.read(min(left, CHUNK_SIZE))
                    if not data:
                        raise WorkingTreeError(f"{os.fsdecode(path)!r} changed while it was sent; try again")
                    left -= len(data)
                    yield NarData(data)
        except OSError as error:
            raise WorkingTreeError(f"{os.fsdecode(path)!r} cannot be read: {error.strerror}") from None


async def working_tree(directory: Path, env: Mapping[str, str]) -> WorkingTree:
    """Return the working tree that a directory lies in. Raises `WorkingTreeError` where it lies in none."""
    top = await _git(directory, env, "rev-parse", "--show-toplevel")
    root = Path(os.fsdecode(top.removesuffix(b"\n")))
    listed = await _git(root, env, "ls-files", "-z", "--stage")
    untracked = await _git(root, env, "ls-files", "-z", "--others", "--exclude-standard")
    found: dict[bytes, bool] = {}
    for line in listed.split(b"\0"):
        words, tab, path = line.partition(b"\t")
        if tab:
            found[path] = words.split(b" ")[0] == _SUBMODULE
    there = {path: empty for path, empty in found.items() if empty or _exists(root, path)}
    return WorkingTree(root, tuple(sorted(there.items(), key=lambda each: each[0].split(b"/"))), untracked.count(b"\0"))


def _exists(root: Path, path: bytes) -> bool:
    """Return whether a tracked file is there, and not removed without `git rm`."""
    return os.path.lexists(os.path.join(os.fsencode(root), path))  # noqa: PTH118 - as above


async def _git(directory: Path, env: Mapping[str, str], *words: str) -> bytes:
    try:
        done = await run(["git", *words], env=env, timeout_s=_GIT_S, max_output_bytes=_MAX_OUTPUT_BYTES, cwd=directory)
    except ProcessNotFound:
        raise WorkingTreeError(
            f"{directory} does not exist, or git is not on PATH; --remote sends files of git"
        ) from None
    except ProcessError as error:
        raise WorkingTreeError(f"the files of {directory} cannot be listed: {error}") from None
    if done.returncode:
        raise WorkingTreeError(
            f"{directory} lies in no git repository; --remote sends the files that git tracks (`git init`, `git add`), "
            "or fetches a repository with --git URL --rev REV"
        )
    return done.stdout
