"""Sources of environments as one function: the reader for each kind, within the operator's bounds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.file_source import read_file
from coordinator.environments.git_source import GitBounds, look
from coordinator.environments.model import SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BoundedSources:
    """Reader of files and git repositories."""

    settings: EnvironmentSettings

    async def read(self, source: TrackedSource, seen: str) -> SourceContent | None:
        """Return what a source has now, None where it is still at the mark `seen`. Raises `EnvironmentSourceError`."""
        wanted = self.settings
        if source.kind is SourceKind.GIT:
            bounds = GitBounds(wanted.git_hosts, wanted.git_schemes, wanted.git_timeout_s, wanted.git_mib * _MIB)
            return await look(source, seen, bounds)
        if source.kind is SourceKind.FILE:
            content = await asyncio.to_thread(read_file, source.path, wanted.directories)
            return None if content.mark == seen else content
        raise EnvironmentSourceError("this environment is pushed; nothing is read for it.")
