"""NAR archives and real files: packing a tree, and unpacking one where it cannot escape.

Both sides stream: memory holds one piece (at most `CHUNK_SIZE`) and the names of the open directories, whatever the
size of the tree. Packing goes as deep as the kernel takes paths, as Nix does; unpacking holds one descriptor for each
open directory. Unpacking creates every file, link and directory new, relative to an open descriptor of its parent,
and never follows a link, so nothing outside the destination can be reached whatever the archive holds. Operating
system errors pass through as `OSError`.

The case hack is Nix's for file systems that fold case: of names that collide, the later ones are stored with a
suffix, which packing strips.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from infra.nix.errors import FormatError, NixError
from infra.nix.nar import (
    NarData,
    NarDirectory,
    NarDirectoryEnd,
    NarEvent,
    NarFile,
    NarReader,
    NarSymlink,
    NarWriter,
)

#: Most bytes in one piece of an archive that `dump` gives. Larger ones are new memory of the system each time, whose
#: faults cost more than reading: 2.3 ms for 5 MB in pieces of 1 MiB (measured).
CHUNK_SIZE: Final = 256 * 1024
#: What the case hack appends, before a number.
CASE_HACK_SUFFIX: Final = b"~nix~case~hack~"

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class NarFilesError(NixError):
    """A tree that no archive can hold, or that changed while it was packed; names the path."""

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(f"{path}: {message}")


def _archive_names(path: str, *, case_hack: bool) -> list[tuple[bytes, str]]:
    """(name in the archive, path) of the entries of a directory, sorted by name."""
    names: dict[bytes, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if case_hack:
                name = name.partition(CASE_HACK_SUFFIX)[0]
            if name in names:
                raise NarFilesError(entry.path, "two names are equal without the case hack")
            names[name] = entry.path
    return sorted(names.items())


def _file_events(name: bytes, path: str) -> Iterator[NarEvent]:
    fd = os.open(path, _READ_FLAGS)
    with os.fdopen(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NarFilesError(path, "it changed its type while it was packed")
        yield NarFile(name, bool(status.st_mode & stat.S_IXUSR), status.st_size)
        left = status.st_size
        while left:
            data = file.read(min(left, CHUNK_SIZE))
            if not data:
                raise NarFilesError(path, "it shrank while it was packed")
            left -= len(data)
            yield NarData(data)


def events_of(path: str | os.PathLike[str], *, case_hack: bool = False) -> Iterator[NarEvent]:
    """The events of the tree at `path`; a symlink there is packed, not followed.

    The tree must not be open to others' writing: a directory that is swapped for a link meanwhile would be followed.

    Raises:
        NarFilesError: On a device, socket or pipe, or a tree that changes underneath.
        OSError: As the file system gives it.
    """
    # Pending nodes, last first; None closes a directory.
    pending: list[tuple[bytes, str] | None] = [(b"", os.fspath(path))]
    while pending:
        node = pending.pop()
        if node is None:
            yield NarDirectoryEnd()
            continue
        name, at = node
        mode = os.lstat(at).st_mode
        if stat.S_ISDIR(mode):
            yield NarDirectory(name)
            pending.append(None)
            pending.extend(reversed(_archive_names(at, case_hack=case_hack)))
        elif stat.S_ISLNK(mode):
            # A Path would normalise the target.
            yield NarSymlink(name, os.readlink(os.fsencode(at)))  # noqa: PTH115
        elif stat.S_ISREG(mode):
            yield from _file_events(name, at)
        else:
            raise NarFilesError(at, "neither file, directory nor symlink")


def dump(path: str | os.PathLike[str], *, case_hack: bool = False) -> Iterator[bytes]:
    """The archive of the tree at `path`, in pieces of 1 to `CHUNK_SIZE` bytes.

    Raises:
        NarFilesError: On a device, socket or pipe, or a tree that changes underneath.
        FormatError: If a directory is too deep for the format.
        OSError: As the file system gives it.
    """
    writer = NarWriter()
    small: list[bytes] = []
    size = 0
    for event in events_of(path, case_hack=case_hack):
        piece = writer.write(event)
        if size + len(piece) > CHUNK_SIZE:
            if small:
                yield b"".join(small)
            small, size = [], 0
            # The last piece of a file carries its padding and may be a few bytes too long.
            while len(piece) > CHUNK_SIZE:
                yield piece[:CHUNK_SIZE]
                piece = piece[CHUNK_SIZE:]
        small.append(piece)
        size += len(piece)
    writer.close()
    if small:
        yield b"".join(small)


class _OpenDirectory:
    """A directory being filled: its descriptor, and with the case hack how often each folded name came."""

    __slots__ = ("fd", "folded")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.folded: dict[bytes, int] = {}


class NarUnpacker:
    """Unpacks an archive that arrives in pieces, to `dest`, which must not exist; a context manager.

    Leaving the context without a successful `close` removes what was unpacked. Files get mode 0644 or 0755 and
    directories 0755, less the umask.
    """

    def __init__(self, dest: str | os.PathLike[str], *, case_hack: bool = False) -> None:
        self._dest = Path(dest)
        self._case_hack = case_hack
        self._reader = NarReader()
        self._stack: list[_OpenDirectory] = []
        self._file: int | None = None
        self._left = 0
        #: Whether `dest` was created here, so that it is ours to remove.
        self._created = False
        self._complete = False
        self._parent: int | None = None

    def __enter__(self) -> Self:
        self._parent = os.open(self._dest.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            if self._created and not self._complete:
                stack.callback(remove_tree, self._dest)
            for fd in [self._parent, self._file, *(directory.fd for directory in self._stack)]:
                if fd is not None:
                    stack.callback(os.close, fd)
            self._parent = self._file = None
            self._stack = []

    def feed(self, data: bytes) -> None:
        """Unpack the next bytes of the archive.

        Raises:
            FormatError: If they break the format, or a name carries the case hack's suffix while it is on.
            FileExistsError: If `dest` exists.
            OSError: As the file system gives it.
        """
        for event in self._reader.feed(data):
            self._apply(event)

    def close(self) -> None:
        """Accept the result.

        Raises:
            FormatError: If the archive was cut short.
        """
        self._reader.close()
        self._complete = True

    def _apply(self, event: NarEvent) -> None:
        match event:
            case NarData(data):
                self._write(data)
            case NarDirectoryEnd():
                os.close(self._stack.pop().fd)
            case NarFile(name, executable, size):
                entry, parent = self._place(name)
                fd = os.open(entry, _CREATE_FLAGS, 0o755 if executable else 0o644, dir_fd=parent)
                self._created = True
                if size:
                    self._file, self._left = fd, size
                else:
                    os.close(fd)
            case NarSymlink(name, target):
                entry, parent = self._place(name)
                os.symlink(target, entry, dir_fd=parent)
                self._created = True
            case NarDirectory(name):
                entry, parent = self._place(name)
                os.mkdir(entry, 0o755, dir_fd=parent)
                self._created = True
                self._stack.append(_OpenDirectory(os.open(entry, _DIRECTORY_FLAGS, dir_fd=parent)))

    def _place(self, name: bytes) -> tuple[bytes, int]:
        """File name and parent descriptor for the next node."""
        if not self._stack:
            if self._parent is None:
                raise ValueError("the unpacker is used outside its context")
            return os.fsencode(self._dest.name), self._parent
        directory = self._stack[-1]
        if self._case_hack:
            if CASE_HACK_SUFFIX in name:
                raise FormatError("a name carries the case hack's suffix", offset=0, subject="NAR")
            folded = name.lower()
            count = directory.folded.get(folded)
            directory.folded[folded] = 0 if count is None else count + 1
            if count is not None:
                name = b"%b%b%d" % (name, CASE_HACK_SUFFIX, count + 1)
        return name, directory.fd

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError("the unpacker is used outside its context")
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self._left -= len(data)
        if not self._left:
            fd, self._file = self._file, None
            os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a tree that we created; a symlink is removed itself."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    # shutil.rmtree recurses, and a tree may be deeper than the interpreter's stack.
    directories = [path]
    for directory in directories:
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                directories.append(entry)
            else:
                entry.unlink()
    for directory in reversed(directories):
        directory.rmdir()


def restore(chunks: Iterable[bytes], dest: str | os.PathLike[str], *, case_hack: bool = False) -> None:
    """Unpack the archive `chunks` to `dest`, which must not exist; on any failure nothing of it stays.

    Raises:
        FormatError: If the archive breaks the format.
        FileExistsError: If `dest` exists.
        OSError: As the file system gives it.
    """
    with NarUnpacker(dest, case_hack=case_hack) as unpacker:
        for chunk in chunks:
            unpacker.feed(chunk)
        unpacker.close()
