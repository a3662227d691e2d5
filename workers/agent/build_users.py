"""Ids that builders run under: a range for each store, never shared between stores, given back when the store is gone.

Nix kills all processes of a build user before it gives the user to the next build, and knows who is in use by locks
inside one store's state. Two stores that share a user kill each other's builds, or write each other's outputs. So a
store's range is its own, on the whole machine for root, among the user's sub-uids for an ordinary user.

The registry is a directory with one file for each range, named by its first id; every change is made under its lock.
A range is free again when its store is gone and no process runs under it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.errors import WorkerError

#: Registry of root's ranges, one for the machine.
MACHINE_REGISTRY = Path("/var/lib/drover/build-users")
#: Ids from which root's ranges come: above what systemd gives to containers (it ends at 0x6fffffff), below 2^31, where
#: some programs take an id for negative.
HIGH_IDS = range(1_900_000_000, 2_000_000_000)
#: Smallest id used where the machine has no high ones (a container): below it stand the accounts of people.
LOWEST_ID = 30_000
#: `nobody`, which stands for every id that a user namespace does not know, and must own nothing.
NOBODY = 65_534
#: Ids in a range beyond the slots: trial builds, canaries, and builds that are still ending.
SPARE_IDS = 16
#: Most ranges that are looked at for a free place.
MAX_RANGES = 10_000


class NoBuildUsersError(WorkerError):
    """No range of ids can be had; one sentence with a way on."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` ids from `first` on, for users and for groups alike."""

    first: int
    count: int

    @property
    def ids(self) -> range:
        """The ids."""
        return range(self.first, self.first + self.count)


class _Record(BaseModel):
    """A range as it stands in the registry."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    first: int
    count: int
    store: str
    #: Device and inode of the store: a directory that was made anew at the same place is another store.
    identity: tuple[int, int]

    @property
    def ids(self) -> range:
        """The ids."""
        return range(self.first, self.first + self.count)


def claim(registry: Path, pool: Sequence[range], taken: Iterable[range], store: Path, count: int) -> IdRange:
    """Return the range of the store at this directory (which must exist), found or made; blocks for the lock.

    Args:
        registry: Directory of the ranges; made where it is missing.
        pool: Ids that may be given out, best first; within each the highest are given out first.
        taken: Ids that belong to accounts or to other programs.
        store: Physical root of the store.
        count: Least ids that the range must have.

    Raises:
        NoBuildUsersError: The registry cannot be used, or no range is free.
    """
    try:
        found = store.stat()
        registry.mkdir(parents=True, exist_ok=True)
        with _locked(registry):
            records, abandoned = _swept(registry)
            mine = [record for record in records if record.identity == (found.st_dev, found.st_ino)]
            for record in mine:
                if record.count >= count:
                    return IdRange(record.first, record.count)
            used = [record.ids for record in (*records, *abandoned)]
            first = _free_place(pool, [*taken, *used], count)
            made = _Record(first=first, count=count, store=str(store), identity=(found.st_dev, found.st_ino))
            _write(registry / str(first), made.model_dump_json().encode())
            for record in mine:
                # Too small for the slots of today. Nothing runs under it: its store's only worker begins.
                (registry / str(record.first)).unlink(missing_ok=True)
            return IdRange(first, count)
    except OSError as error:
        raise NoBuildUsersError(f"build users cannot be registered in {registry}: {error.strerror}") from error


def own_ids() -> list[range]:
    """Return the user ids that this process may give to others because it is root, the high ones first."""
    known = [_within(HIGH_IDS, ids) for ids in _mapped("uid")]
    known += [_within(range(LOWEST_ID, NOBODY), ids) for ids in _mapped("uid")]
    groups = _mapped("gid")
    return [found for ids in known if ids for other in groups if (found := _within(ids, other))]


def account_ids() -> list[range]:
    """Return the ids of accounts and groups, and those that /etc/subuid and /etc/subgid promise to a user."""
    taken = []
    for path in ("/etc/passwd", "/etc/group"):
        taken += [range(int(fields[2]), int(fields[2]) + 1) for fields in _fields(path) if _numbers(fields[2:3])]
    for path in ("/etc/subuid", "/etc/subgid"):
        taken += [
            range(int(fields[1]), int(fields[1]) + int(fields[2])) for fields in _fields(path) if _numbers(fields[1:3])
        ]
    return taken


def sub_ids(user: str, uid: int) -> list[range]:
    """Return the sub-ids that are the user's both as users and as groups."""
    ranges = []
    for path in ("/etc/subuid", "/etc/subgid"):
        mine = [fields for fields in _fields(path) if fields[0] in {user, str(uid)} and _numbers(fields[1:3])]
        ranges.append([range(int(fields[1]), int(fields[1]) + int(fields[2])) for fields in mine])
    return [found for users in ranges[0] for groups in ranges[1] if (found := _within(users, groups))]


def _fields(path: str) -> Iterator[list[str]]:
    with suppress(OSError):
        for line in Path(path).read_text(errors="replace").splitlines():
            fields = line.split(":")
            if len(fields) >= 3:
                yield fields


def _numbers(fields: Sequence[str]) -> bool:
    return bool(fields) and all(field.strip().isdecimal() for field in fields)


def _mapped(kind: str) -> list[range]:
    """Return the ids that exist in this process's user namespace."""
    lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    return [range(int(inner), int(inner) + int(count)) for inner, _, count in (line.split() for line in lines)]


def _within(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _free_place(pool: Sequence[range], taken: Sequence[range], count: int) -> int:
    """Return the first id of the highest free place: other programs (podman) begin at the low end of sub-ids."""
    for ids in pool:
        end = ids.stop
        for _ in range(MAX_RANGES):
            first = end - count
            if first < ids.start:
                break
            in_the_way = [other.start for other in taken if _within(range(first, end), other)]
            if not in_the_way:
                return first
            end = min(in_the_way)
    raise NoBuildUsersError(f"no {count} ids in a row are free for build users")


def _swept(registry: Path) -> tuple[list[_Record], list[_Record]]:
    """Return the records of stores that exist, and those of others that must stay as something runs under their ids.

    The rest is removed.
    """
    records: list[_Record] = []
    gone: list[_Record] = []
    for entry in sorted(registry.iterdir()):
        if not entry.name.isdecimal():
            continue
        try:
            record = _Record.model_validate(json.loads(entry.read_bytes()))
        except (OSError, ValueError, ValidationError):
            # A torn file cannot be (it is renamed into place); a foreign one takes its place all the same.
            records.append(_Record(first=int(entry.name), count=1, store="", identity=(0, 0)))
            continue
        (records if _is_there(record) else gone).append(record)
    running = _running_ids() if gone else set()
    abandoned = [record for record in gone if not running.isdisjoint(record.ids)]
    for record in gone:
        if record not in abandoned:
            (registry / str(record.first)).unlink(missing_ok=True)
    return records, abandoned


def _is_there(record: _Record) -> bool:
    try:
        found = os.stat(record.store)  # noqa: PTH116 - one call a record, and there may be many
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a disk that is away for the moment
    return (found.st_dev, found.st_ino) == record.identity


def _running_ids() -> set[int]:
    ids = set()
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                with suppress(OSError):
                    ids.add(entry.stat().st_uid)
    return ids


@contextmanager
def _locked(registry: Path) -> Iterator[None]:
    descriptor = os.open(registry / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"new-{path.name}")
    temporary.write_bytes(data)
    temporary.replace(path)
