"""Namespaces of one daemon: what it sees of the host's accounts and files, and which network it has.

A build is a child of its daemon, so what the daemon cannot see a build cannot see. `infra.daemon.owner` reads a
`Confinement` from its arguments. The daemon's process enters it just before it becomes the daemon; the owner stays
outside and does what can only be done from there: it gives out the ids of a user namespace.

1. Mounts: a mount namespace of its own, in which directories lie read-only over others. Mounts that the host makes
   later still arrive (MS_SLAVE), mounts made here never leave.
2. Ids: an ordinary user's daemon is root of a user namespace that holds the user and some sub-uids, which
   `newuidmap` and `newgidmap` give out by /etc/subuid and /etc/subgid.

Linux only. This file stands alone, as `owner.py` does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

#: Marks a confined command: `--confined OPTION... -- COMMAND...`.
CONFINED: Final = "--confined"
#: unshare(2), mount(2).
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUSER: Final = 0x1000_0000
MS_RDONLY: Final = 1
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_SLAVE: Final = 1 << 19
#: Flags that a read-only remount keeps (nosuid, nodev, noexec): a user namespace may not clear those of the host.
KEPT_FLAGS: Final = 2 | 4 | 8


class ConfinementError(Exception):
    """The namespaces cannot be made; one sentence."""


class Confinement(NamedTuple):
    """The namespaces of one daemon; without anything it has those of its owner.

    Attributes:
        binds: (directory, place) pairs, in order: each directory lies read-only over its place.
        uid_map: Ids of a user namespace as (inner, outer, count) words of newuidmap(1); empty: no user namespace.
        gid_map: The same for groups.
    """

    binds: tuple[tuple[str, str], ...] = ()
    uid_map: tuple[int, ...] = ()
    gid_map: tuple[int, ...] = ()

    def words(self) -> list[str]:
        """Return the owner's arguments that stand before the command."""
        words = [CONFINED]
        for pair in self.binds:
            words += ["--bind", *pair]
        if self.uid_map:
            words += ["--ids", " ".join(map(str, self.uid_map)), " ".join(map(str, self.gid_map))]
        return [*words, "--"] if len(words) > 1 else []


#: No namespaces of its own.
UNCONFINED: Final = Confinement()


def parse(words: Sequence[str]) -> tuple[Confinement, list[str]]:
    """Read back what `words` made and the command after it, as (confinement, command)."""
    rest = list(words)
    found = Confinement()
    if not rest or rest.pop(0) != CONFINED:
        return found, list(words)
    while (option := rest.pop(0)) != "--":
        first, second = rest.pop(0), rest.pop(0)
        if option == "--bind":
            found = found._replace(binds=(*found.binds, (first, second)))
        else:
            maps = [tuple(map(int, text.split())) for text in (first, second)]
            found = found._replace(uid_map=maps[0], gid_map=maps[1])
    return found, rest


class Launch:
    """One daemon on its way into its namespaces. Made before the fork; then `enter` in the child, `assist` outside."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        #: (read, write) ends: the child says that its namespaces are there, the owner that they are complete.
        self._entered = os.pipe()
        self._complete = os.pipe()

    def enter(self) -> None:
        """Enter the namespaces; only in the process that becomes the daemon. Raises `ConfinementError`."""
        wanted = self._confinement
        os.close(self._entered[0])
        os.close(self._complete[1])
        try:
            _call("unshare", "namespaces", CLONE_NEWNS | (CLONE_NEWUSER if wanted.uid_map else 0))
            os.write(self._entered[1], b"1")
            if not os.read(self._complete[0], 1):
                raise ConfinementError("the namespaces stayed incomplete")
            if wanted.uid_map:
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
            _call("mount", "/", None, b"/", None, MS_REC | MS_SLAVE, None)
            for source, target in wanted.binds:
                _call("mount", target, source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
                kept = os.statvfs(target).f_flag & KEPT_FLAGS
                _call("mount", target, None, target.encode(), None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept, None)
        except OSError as error:
            raise ConfinementError(f"no namespaces for the daemon: {error.strerror}") from error
        os.close(self._entered[1])
        os.close(self._complete[0])

    def assist(self, daemon: int) -> None:
        """Complete the namespaces of the process from outside. Raises `ConfinementError`; the process ends then."""
        os.close(self._entered[1])
        os.close(self._complete[0])
        try:
            # Nothing comes where the process could not enter: its own message says why.
            if os.read(self._entered[0], 1):
                if self._confinement.uid_map:
                    _give_ids(daemon, "newuidmap", self._confinement.uid_map)
                    _give_ids(daemon, "newgidmap", self._confinement.gid_map)
                os.write(self._complete[1], b"1")
        finally:
            os.close(self._entered[0])
            os.close(self._complete[1])


def _give_ids(process: int, program: str, ids: Sequence[int]) -> None:
    words = [program, str(process), *map(str, ids)]
    try:
        child = os.posix_spawnp(program, words, os.environ)
    except OSError as error:
        raise ConfinementError(f"{program} cannot be started: {error.strerror}") from error
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise ConfinementError(f"`{' '.join(words)}` ended with status {code}")


def _call(name: str, what: str, *arguments: object) -> None:
    """Call the C library, raising `ConfinementError` for what it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise ConfinementError(f"{name} of {what} failed: {os.strerror(ctypes.get_errno())}")
