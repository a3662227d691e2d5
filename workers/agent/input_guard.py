"""Inputs that changed in the worker's store are noticed before and after they are used, and mended.

A path is valid for ever by what the store's database says; what lies on the disk may have been changed since: by a
build that could, by a program beside the farm, by a failing disk. So every path that a sandbox shows to a build (the
closure of its inputs) has an *identity* here, by which a change shows without reading the contents.

| isolation | looked at before and after each build | read in full at first sight |
| --- | --- | --- |
| A, B | the top of every path; all below it of one in turn, and of some more (`DEEP_ENTRIES`) | some (`FIRST_BYTES`) |
| C | everything of every path | every path |

On all of them one path is read in full now and then (`SAMPLE_EVERY`).

Rules: 1. Another identity is a suspicion, the NAR hash against the store's record is the verdict: linking a file (Nix
does that to show it in a sandbox, or to save space) changes its identity too. 2. On class C, where builds could put
back what they changed, a path that was touched while a build ran spoils the build even where its contents are right.
3. A path that has other contents spoils every build that ran meanwhile, is fetched anew over what is there, and keeps
the worker unfit until then. 4. What a spoilt build made is deleted from the store, because it would count as built.
5. A path that the store no longer holds by its own record was collected, whatever still lies there: it is missing, not
changed. Nothing is broken and the worker is not to blame; a build that ran meanwhile is thrown away all the same.

What this cannot see: a change below the top of a path of class A or B until its turn comes; a single file that one
build of class C changed and put back while another one read it; a change of a path that is larger than `FIRST_BYTES`
from before this agent first saw it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import stat
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import attrgetter
from pathlib import Path

from infra.daemon import DaemonError, DaemonOperationError, GcAction
from infra.nar_files import dump
from infra.nix.errors import NixError
from infra.nix.hashing import sha256_text
from infra.nix.path_info import PathInfo
from infra.retry import Outage
from workers.agent.daemon_pool import DaemonSession, DaemonUnreachableError, SessionPool
from workers.agent.farm_sources import FarmSources, InputError
from workers.errors import WorkerError

_log = logging.getLogger(__name__)

_name = attrgetter("name")

#: Entries (files, directories, links) below the tops of paths that one look reads, where builds cannot write inputs:
#: beyond it no other path is begun. The one whose turn it is is read whole, or a large one would never be.
DEEP_ENTRIES = 2000
#: Entries that one look reads at most, on any worker: some seconds.
MOST_ENTRIES = 500_000
#: Bytes of NARs that one look reads of paths that are seen for the first time, where builds cannot write inputs.
FIRST_BYTES = 8 * 1024 * 1024
#: NARs together up to which a look is a matter of the event loop: some files, which a change of threads outweighs.
HERE_BYTES = 32 * 1024
#: Of so many looks before a build, one reads one path in full.
SAMPLE_EVERY = 16
#: Largest NAR that is read as a sample.
SAMPLE_BYTES = 256 * 1024 * 1024
#: Paths whose identity is remembered; beyond it they are seen for the first time again.
MAX_KNOWN = 200_000
#: Paths of one closure that are looked at.
MAX_CLOSURE = 50_000
#: Seconds between two attempts to mend.
MEND_AGAIN_S = 5.0


class InputChangedError(WorkerError):
    """An input is not what the store recorded; the message names it."""


class InputCollectedError(InputError):
    """The store no longer holds an input; the message names it."""


class MendingError(WorkerError):
    """Something that changed in the store is not mended yet."""


class Alteration(Enum):
    """Change of a path since the last look at it."""

    SAME = "same"
    #: Its contents are right although its identity has changed.
    TOUCHED = "touched"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Identity:
    """By what a path is known: two of the top of it, two of all below (empty: not read yet).

    The first of each pair leaves out what making and removing a link changes.
    """

    top: tuple[int, ...]
    top_linked: tuple[int, ...]
    below: bytes = b""
    below_linked: bytes = b""

    def compared(self, now: Identity) -> Alteration | None:
        """Return whether the path that was this is the same now; None where only its contents can show it."""
        firm, linked = self.top == now.top, self.top_linked == now.top_linked
        if self.below and now.below:
            firm, linked = firm and self.below == now.below, linked and self.below_linked == now.below_linked
        if firm and linked:
            return Alteration.SAME
        return None if firm else Alteration.TOUCHED


@dataclass(frozen=True, slots=True)
class _Look:
    """Plan for the look at one path."""

    path: PathInfo
    known: Identity | None
    #: Whether its contents are read whatever its identity says.
    read: bool


@dataclass(frozen=True, slots=True)
class Watch:
    """A build's inputs as they were when it began; `changes` counts by path what became of each until then."""

    paths: tuple[str, ...]
    changes: dict[str, int] = field(default_factory=dict)


class InputGuard:
    """Looks after the inputs of one worker; see the module's text."""

    def __init__(self, store: Path, readers: SessionPool, trusts_builds: Callable[[], bool]) -> None:
        """`store`: where paths lie; nothing is looked at where that is not there. `trusts_builds`: class A or B."""
        self._store = store
        self._readers = readers
        self._trusts_builds = trusts_builds
        self._records: dict[str, PathInfo] = {}
        self._known: dict[str, Identity] = {}
        #: How often each path was touched or changed; only those that ever were.
        self._changes: Counter[str] = Counter()
        self._broken: set[str] = set()
        #: Outputs that must be built again, not found.
        self._spoilt: set[str] = set()
        #: Outputs of builds of this agent's life that nothing spoilt.
        self._vouched: set[str] = set()
        #: Looks so far: each begins at another path, because its budget ends somewhere.
        self._looks = 0
        self._looking = asyncio.Semaphore(2)

    @property
    def trouble(self) -> str:
        """Description of the damage in one sentence, empty while there is none."""
        if not self._broken:
            return ""
        first = min(self._broken)
        more = f" (and {len(self._broken) - 1} more)" if len(self._broken) > 1 else ""
        return f"{first}{more} was changed in the worker's store; it is fetched anew, and nothing is built until then"

    async def begin(self, inputs: Collection[str], outputs: Collection[str], slot: DaemonSession) -> Watch:
        """Look at all that a build of these inputs sees, and make sure that it really builds its outputs.

        Raises `MendingError` while something is broken, `InputChangedError`, `InputCollectedError`, or what a line
        raises.
        """
        if self._broken:
            raise MendingError(self.trouble)
        watched = await self._closure(inputs)
        await self._look(watched, sample=self._looks % SAMPLE_EVERY == 0)
        await self.discard(self._spoilt.intersection(outputs), slot)
        if not self._trusts_builds() and (old := set(outputs) - self._vouched):
            # A build of an earlier life of the agent may have been spoilt, and no look was there to see it.
            with suppress(InputChangedError):
                await self.discard(old, slot)
        return Watch(watched, {path: self._changes[path] for path in watched if path in self._changes})

    async def end(self, watch: Watch, outputs: Collection[str], slot: DaemonSession) -> None:
        """Look again after a build that made these outputs.

        Raises `InputChangedError` or `InputCollectedError` where it is spoilt, or what a line raises.
        """
        spoilt: InputChangedError | InputCollectedError | None = None
        # Until the look says otherwise; it may be cancelled.
        self._spoilt.update(outputs)
        try:
            await self._look(watch.paths, sample=False)
        except (InputChangedError, InputCollectedError) as error:
            spoilt = error
        touched = [path for path in watch.paths if self._changes[path] != watch.changes.get(path, 0)]
        if touched and spoilt is None:
            spoilt = InputChangedError(f"{touched[0]} was changed in the worker's store while the build ran")
        if spoilt is not None:
            self._vouched.difference_update(outputs)
            await self.discard(outputs, slot)
            raise spoilt
        if len(self._vouched) > MAX_KNOWN:
            self._vouched.clear()
        self._vouched.update(outputs)
        self._spoilt.difference_update(outputs)

    def knows(self, infos: Iterable[PathInfo]) -> None:
        """Take records that the store has just got, of what a build made or a transfer added.

        Of a path that came another way meanwhile it has another: the look that finds other contents asks for it.
        """
        if len(self._records) >= MAX_KNOWN:
            self._records.clear()
        for info in infos:
            self._records[info.store_path] = _looked_at(info)

    async def mend(self, sources: Callable[[], FarmSources | None]) -> None:
        """Fetch what is broken over what is there, again and again until all is well; for one caller at a time."""
        outage = Outage(_log, "it is tried again", over="inputs that changed are mended")
        while self._broken:
            farm = sources()
            try:
                if farm is not None:
                    await self._mend(sorted(self._broken), farm)
                    outage.end()
                    continue
            except (DaemonError, DaemonUnreachableError, InputError, NixError) as error:
                outage.begin(f"inputs that changed cannot be mended yet: {error}")
            await asyncio.sleep(MEND_AGAIN_S)

    async def _mend(self, broken: Sequence[str], sources: FarmSources) -> None:
        infos = {info.store_path: info for info in await sources.narinfos(broken)}
        for path in broken:
            info = infos.get(path)
            if info is None:
                raise InputError(f"{path} is not in the farm's cache")
            upload = sources.upload(info, sources.nar(info))
            async with self._readers.use() as connection:
                await connection.add_to_store_nar(upload, dont_check_sigs=True, repair=True)
            # What the farm has may have been built elsewhere.
            self._records.pop(path, None)
            self._known.pop(path, None)
            self._changes[path] += 1
            self._broken.discard(path)
            _log.warning("%s was fetched anew over what it had become", path)

    async def discard(self, outputs: Collection[str], slot: DaemonSession) -> None:
        """Delete outputs that are valid. Raises `InputChangedError` where the store keeps one."""
        if not outputs:
            return
        async with self._readers.use() as connection:
            valid = await connection.query_valid_paths(sorted(outputs))
        if valid:
            # What was built over a connection is kept by it.
            await slot.hang_up()
            try:
                async with self._readers.use() as connection:
                    await connection.collect_garbage(GcAction.DELETE_SPECIFIC, paths=sorted(valid))
            except DaemonOperationError as error:
                raise InputChangedError(f"what a spoilt build made cannot be deleted: {error}") from error
        self._spoilt.difference_update(outputs)

    async def _closure(self, inputs: Collection[str]) -> tuple[str, ...]:
        """Return the inputs and all that they refer to, whose records are known then."""
        found: dict[str, None] = dict.fromkeys(inputs)
        layer = list(found)
        while layer and len(found) <= MAX_CLOSURE:
            below: dict[str, None] = {}
            for record in await self._records_of(layer):
                below.update(dict.fromkeys(path for path in record.reference_paths if path not in found))
            found |= below
            layer = list(below)
        return tuple(found)

    async def _records_of(self, paths: Sequence[str]) -> list[PathInfo]:
        """Return the records of paths; those that are not known are asked for together."""
        known = {path: self._records[path] for path in paths if path in self._records}
        unknown = [path for path in paths if path not in known]
        if not unknown:
            return [known[path] for path in paths]
        async with self._readers.use() as connection:
            answers = await connection.query_path_infos(unknown)
        asked: dict[str, PathInfo] = {}
        for path, info in zip(unknown, answers, strict=True):
            if info is None:
                raise _collected(path)
            asked[path] = _looked_at(info)
        known |= asked
        if len(self._records) + len(asked) > MAX_KNOWN:
            self._records.clear()
        self._records |= asked
        return [known[path] for path in paths]

    async def _look(self, paths: Sequence[str], *, sample: bool) -> None:
        """Look at paths, remember how they are now.

        Raises `InputChangedError` for what has other contents, else `InputCollectedError` for what the store no longer
        holds.
        """
        if not paths:
            return
        looks = self._plan(await self._records_of(paths), sample=sample)
        if sum(look.path.nar_size for look in looks) <= HERE_BYTES:
            found = _look_at(self._store, looks, self._looks, self._budget)
        else:
            async with self._looking:
                found = await asyncio.to_thread(_look_at, self._store, looks, self._looks, self._budget)
        self._looks += 1
        changed = []
        for path, (identity, verdict) in zip(paths, found, strict=True):
            if identity is not None:
                self._known[path] = identity
            if verdict is not Alteration.SAME and not (verdict is Alteration.TOUCHED and self._trusts_builds()):
                self._changes[path] += 1
            if verdict is Alteration.CHANGED:
                changed.append(path)
        if changed:
            await self._tell_apart(changed)

    async def _tell_apart(self, changed: Sequence[str]) -> None:
        """Raise what `_look` raises for paths that are not what they were.

        One that was collected and came back, perhaps built elsewhere, is looked at anew by its new record.
        """
        for path in changed:
            self._known.pop(path, None)
        try:
            async with self._readers.use() as connection:
                found = {path: await connection.query_path_info(path) for path in changed}
        except BaseException:
            # Cancelled with its lease, or no answer: whatever became of them, they are fetched anew.
            self._broken.update(changed)
            raise
        held = {path: _looked_at(info) for path, info in found.items() if info is not None}
        anew = {path: record for path, record in held.items() if record != self._records.get(path)}
        broken = held.keys() - anew.keys()
        collected = [path for path in changed if path not in held]
        self._broken |= broken
        for path in collected:
            # What comes in its place may have another record.
            self._records.pop(path, None)
        self._records |= anew
        if broken:
            raise InputChangedError(f"{min(broken)} was changed in the worker's store")
        if collected:
            raise _collected(collected[0])
        await self._look(list(anew), sample=False)

    @property
    def _budget(self) -> int:
        return DEEP_ENTRIES if self._trusts_builds() else MOST_ENTRIES

    def _plan(self, records: Sequence[PathInfo], *, sample: bool) -> list[_Look]:
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        trusts, first_bytes = self._trusts_builds(), FIRST_BYTES
        looks = []
        for record in records:
            known = self._known.get(record.store_path)
            read = known is None and (not trusts or record.nar_size <= first_bytes)
            first_bytes -= record.nar_size if read else 0
            looks.append(_Look(record, known, read))
        if sample:
            chosen = random.randrange(len(looks))  # noqa: S311 - any will do
            if looks[chosen].path.nar_size <= SAMPLE_BYTES:
                looks[chosen] = replace(looks[chosen], read=True)
        return looks


def _looked_at(info: PathInfo) -> PathInfo:
    """Return what is looked at of a record: there may be MAX_KNOWN of them."""
    return replace(info, deriver="", sigs=(), ca="")


def _collected(path: str) -> InputCollectedError:
    return InputCollectedError(f"{path} is no longer in the worker's store")


def _look_at(store: Path, looks: Sequence[_Look], start: int, budget: int) -> list[tuple[Identity | None, Alteration]]:
    """Look at each path; those from `start` on, in a circle, all below their tops while `budget` entries last."""
    found: dict[int, tuple[Identity | None, Alteration]] = {}
    if not store.is_dir():
        # Another machine's, or not ours to see: its own agent looks after it.
        return [(None, Alteration.SAME)] * len(looks)
    for turn in range(len(looks)):
        number = (start + turn) % len(looks)
        look = looks[number]
        at = str(store / look.path.base_name)
        try:
            # The first is read whole, or a path with more entries than one look has would never be.
            identity, entries = identify(at, budget if turn else MOST_ENTRIES)
            budget -= min(budget, entries)
            found[number] = _judge(look, at, identity)
        except FileNotFoundError:
            found[number] = None, Alteration.CHANGED
        except (OSError, NixError) as error:
            _log.warning("%s cannot be looked at: %s", look.path.store_path, error)
            found[number] = None, Alteration.SAME
    return [found[number] for number in range(len(looks))]


def _judge(look: _Look, at: str, now: Identity) -> tuple[Identity, Alteration]:
    verdict = Alteration.SAME if look.known is None else look.known.compared(now)
    if (look.read or verdict is not Alteration.SAME) and _nar_hash(at) != look.path.nar_hash:
        return now, Alteration.CHANGED
    if look.known is not None and not now.below:
        now = replace(now, below=look.known.below, below_linked=look.known.below_linked)
    return now, verdict or Alteration.SAME


def identify(at: str, budget: int) -> tuple[Identity, int]:
    """Return the identity of what lies there, and how many entries below the top were read.

    Where there are more than `budget` of them, the identity says nothing of what is below. Raises `OSError`.
    """
    top = os.lstat(at)
    is_directory = stat.S_ISDIR(top.st_mode)
    # A file is linked into the sandbox that shows it.
    firm = _numbers(top, linked=is_directory)
    if budget <= 0 or not is_directory:
        # Most paths of a large closure: without reading a directory whose entries are too many by now.
        return Identity(firm, _numbers(top, linked=True)), 0
    entries = 0
    below, below_linked = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    stack = [at]
    while stack:
        with os.scandir(stack.pop()) as directory:
            inside = sorted(directory, key=_name)
        entries += len(inside)
        if entries > budget:
            return Identity(firm, _numbers(top, linked=True)), budget
        for entry in inside:
            status = entry.stat(follow_symlinks=False)
            is_directory = stat.S_ISDIR(status.st_mode)
            name = os.fsencode(entry.path)
            numbers = repr(_numbers(status, linked=True)).encode()
            below_linked.update(numbers)
            if not is_directory and status.st_nlink != 1:
                numbers = repr(_numbers(status, linked=False)).encode()
            below.update(b"%d %b %b" % (len(name), name, numbers))
            if is_directory:
                stack.append(entry.path)
    return Identity(firm, _numbers(top, linked=True), below.digest(), below_linked.digest()), entries


def _numbers(status: os.stat_result, *, linked: bool) -> tuple[int, ...]:
    """Return the numbers that identify a file; with `linked` also those that a link made or removed changes."""
    firm = status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns
    return (*firm, status.st_ctime_ns) if linked else firm


def _nar_hash(at: str) -> str:
    digest = hashlib.sha256()
    try:
        for piece in dump(at, case_hack=sys.platform == "darwin"):
            digest.update(piece)
    except NixError:
        # A device, a socket: no archive holds that.
        return ""
    return sha256_text(digest.digest())
