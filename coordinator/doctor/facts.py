"""Facts about a machine and the caches that its Nix asks, as `gather` finds them and `checks` judges them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class NixSettings:
    """Settings as one reader of Nix's files has them, defaults included."""

    substituters: tuple[str, ...]
    trusted_substituters: tuple[str, ...]
    trusted_public_keys: tuple[str, ...]
    trusted_users: tuple[str, ...]
    netrc_file: str
    system: str
    require_sigs: bool = True
    #: `true`, `false` or `relaxed`.
    sandbox: str = "true"
    #: Seconds for which Nix believes that a cache lacks a path.
    negative_ttl_s: int = 3600
    flakes: bool = False


@dataclass(frozen=True, slots=True)
class Netrc:
    """A netrc file, as far as Nix uses it: it sends the password of the first `machine` that matches, by host alone."""

    path: str
    exists: bool
    #: Hosts in it; `default` where it has an entry for all others.
    machines: frozenset[str] = frozenset()
    #: Anybody on this machine may read it.
    open_to_all: bool = False
    #: Why it cannot be read by this user; empty where it can.
    unreadable: str = ""


CacheTrouble: TypeAlias = Literal["address", "unreachable", "slow", "tls", "refused", "status", "not_a_cache"]


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """One cache and its answer to the question of what it is (`nix-cache-info`)."""

    url: str
    #: The user named it, so that it should be among the substituters.
    wanted: bool = False
    trouble: CacheTrouble | None = None
    #: What went wrong in a few words, or the status of the answer.
    reason: str = ""
    store_dir: str = ""
    priority: int | None = None
    #: Seconds until the answer, and by how many this machine's clock is ahead of the cache's.
    took_s: float = 0.0
    clock_ahead_s: float | None = None
    #: Paths that it was found to lack, not asked for again until the newest of these times passes; on this machine.
    denied: int = 0
    denied_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Builds and downloads that Nix would begin for a file or a lock of this directory, by its own dry run."""

    target: str
    built: int = 0
    fetched: int = 0
    download: str = ""
    unpacked: str = ""
    #: Why Nix cannot tell; its last words.
    trouble: str = ""
    #: Of a lock: packages that no cache has, which Nix or the lock's own program would build.
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """All that was found. None: nothing could be found out about it, and `troubles` says why."""

    #: Empty: there is no Nix on PATH.
    nix_version: str
    user: str
    groups: frozenset[str]
    now: float
    #: The user's, all files and variables together; and those of the machine alone, which its daemon has.
    settings: NixSettings | None = None
    machine: NixSettings | None = None
    #: Where an administrator adds a line for the whole machine; a program writes it anew from its own configuration.
    conf: str = "/etc/nix/nix.conf"
    conf_generated: bool = False
    #: Builds and downloads go through a daemon, which has settings and a cache of its own.
    daemon: bool = False
    #: Why the store does not answer; empty where it does.
    store_trouble: str = ""
    #: By the daemon's own word; None where this Nix does not say.
    trusted: bool | None = None
    netrc: Netrc | None = None
    caches: tuple[CacheFacts, ...] = ()
    #: Keys that the user named, `name:base64`.
    wanted_keys: tuple[str, ...] = ()
    store_dir: str = "/nix/store"
    free_bytes: int | None = None
    total_bytes: int | None = None
    plans: tuple[Plan, ...] = ()
    troubles: tuple[str, ...] = field(default=())
