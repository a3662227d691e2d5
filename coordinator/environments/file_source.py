"""Files of the coordinator's machine as sources: only below the directories that the operator names, links followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.reading import KNOWN_NAMES, SourceContent, mark_of
from coordinator.wishes.model import MAX_FILE_BYTES


def allowed_file(path: str, directories: Sequence[Path]) -> Path:
    """Return the file or directory that may be read. Raises `EnvironmentSourceError`; says nothing of what is there."""
    if not directories:
        raise EnvironmentSourceError(
            "this farm tracks no files; its operator names directories in environments.directories, or push the "
            "content: `drover environments push`."
        )
    wanted = Path(path)
    if wanted.is_absolute() and "\0" not in path:
        real = Path(os.path.realpath(wanted))
        if any(real.is_relative_to(os.path.realpath(each)) for each in directories):
            return real
    raise EnvironmentSourceError(
        f"this farm does not track files there; it does below {', '.join(map(str, directories[:8]))} "
        "(environments.directories)."
    )


def read_file(path: str, directories: Sequence[Path]) -> SourceContent:
    """Return the content of a file, or of the first file of a known name in a directory; blocks.

    Raises:
        EnvironmentSourceError: It is not there, may not be read, or is too large.
    """
    found = allowed_file(path, directories)
    try:
        if found.is_dir():
            named = next((found / name for name in KNOWN_NAMES if (found / name).is_file()), None)
            if named is None:
                raise EnvironmentSourceError(f"{path} has none of {', '.join(KNOWN_NAMES)}; name the file.")
            # A link in it may lead elsewhere.
            found = allowed_file(str(named), directories)
        return _content(found, path)
    except OSError as error:
        raise EnvironmentSourceError(f"{path} cannot be read: {error.strerror}.") from None


def _content(found: Path, path: str) -> SourceContent:
    # A pipe must not wait for its writer, and the last part is no link any more.
    with os.fdopen(os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise EnvironmentSourceError(f"{path} is no regular file.")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise EnvironmentSourceError(f"{path} has more than {MAX_FILE_BYTES} bytes, the limit.")
    return SourceContent(mark_of(data), found.name, data)
