"""Words of tracked environments.

An *environment* is a wish list that changes: a file, a file of a git branch, or what clients push. Each content that it
had is a *revision*, numbered from 1 on. Its *pointer* `stable` names one revision for each system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

#: Names stand in addresses, in names of roots and in Nix.
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
#: Owners of one environment.
MAX_OWNERS: Final = 16
#: Characters of a note of a revision and of a trouble.
MAX_NOTE: Final = 500
#: The one pointer that there is so far, as addresses name it.
STABLE: Final = "stable"


class SourceKind(StrEnum):
    """Places that an environment is read from."""

    #: Clients send each revision.
    PUSH = "push"
    #: A file of the coordinator's machine, or a directory there with a file of a known name.
    FILE = "file"
    #: A file of a branch or a tag of a git repository.
    GIT = "git"


@dataclass(frozen=True, slots=True)
class TrackedSource:
    """Source of an environment's content."""

    kind: SourceKind
    #: Of a file or directory: its absolute path; of git: the file in the tree. Empty: the first of the known names.
    path: str = ""
    url: str = ""
    #: Branch or tag; empty: the repository's HEAD.
    ref: str = ""
    #: System of store paths that do not say theirs.
    system: str = ""


@dataclass(frozen=True, slots=True)
class PollState:
    """Result of the last look at a source."""

    #: When it was looked at last, and when that worked last; 0.0 never.
    looked_at: float = 0.0
    seen_at: float = 0.0
    #: The commit, or the digest of the bytes, that was read last.
    mark: str = ""
    #: Why the last look failed: one sentence; "" where it did not. Then since when, and how many looks failed.
    trouble: str = ""
    trouble_since: float = 0.0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment as it is kept."""

    name: str
    source: TrackedSource
    #: Owners of tokens that may change it, beside the operator's; what is built for it is submitted as the first one's.
    owners: tuple[str, ...]
    created_at: float
    poll: PollState = PollState()


@dataclass(frozen=True, slots=True)
class EnvironmentRevision:
    """One content that an environment had."""

    number: int
    created_at: float
    #: `WishList.digest`.
    digest: str
    #: The commit it was read from, or what else the source calls it.
    mark: str
    #: System -> packages there.
    packages: tuple[tuple[str, int], ...]
    #: A sentence about how it came, for people.
    note: str = ""

    @property
    def systems(self) -> tuple[str, ...]:
        """Systems that it has packages for."""
        return tuple(system for system, count in self.packages if count)
