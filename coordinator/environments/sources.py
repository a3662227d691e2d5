"""Sources of environments as one function: the reader for each kind, within the operator's bounds."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.file_source import read_file
from coordinator.environments.git_source import GitBounds, look
from coordinator.environments.model import SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent

#: Repositories that rounds and requests look at at one time: each takes what `git_mib` allows of the disk.
GIT_AT_ONCE: Final = 4
_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BoundedSources:
    """Reader of files and git repositories; these are in `directory` while they are looked at, and nothing else is."""

    settings: EnvironmentSettings
    directory: Path
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(GIT_AT_ONCE), init=False, repr=False)

    def clear(self) -> None:
        """Remove what a coordinator that was killed has left; blocks."""
        shutil.rmtree(self.directory, ignore_errors=True)

    async def read(self, source: TrackedSource, seen: str) -> SourceContent | None:
        """Return what a source has now, None where it is still at the mark `seen`. Raises `EnvironmentSourceError`."""
        wanted = self.settings
        if source.kind is SourceKind.GIT:
            size_bytes = wanted.git_mib * _MIB
            bounds = GitBounds(wanted.git_hosts, wanted.git_schemes, wanted.git_timeout_s, size_bytes, self.directory)
            async with self._turns:
                return await look(source, seen, bounds)
        if source.kind is SourceKind.FILE:
            content = await asyncio.to_thread(read_file, source.path, wanted.directories)
            return None if content.mark == seen else content
        raise EnvironmentSourceError("this environment is pushed; nothing is read for it.")
