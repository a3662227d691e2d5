"""Outbox of the agent: numbers events to the coordinator and keeps each until it is acknowledged.

Every event gets the next sequence number; `take` gives what lies after the last acknowledged one, again and again, so a
lost answer loses nothing. Log lines are put together in chunks of at most `CHUNK_BYTES`, at the latest after
`FLUSH_S`, and always before a stage change or the report of their lease. A stage change that is out of date before it
was ever sent is not sent.

Log that is acknowledged is kept, because a coordinator that takes over has only what the one before had moved to the
object store: all of each lease until it is reported (the limit of its log bounds that), and of reported ones for
`KEEP_S`, at most `MAX_KEPT_BYTES`, those reported first leaving first. `send_again` queues it anew.

In memory lies at most `MEMORY_LOG_BYTES` of log; more is written to a file per lease. When `MAX_LEASE_BYTES` of a lease
wait, or `MAX_LOG_BYTES` in all, the readers of logs wait (`wait_for_room`) until half of them are gone. Reports are
also appended to `reports.jsonl` for a later process to find, and synced when a coordinator does not acknowledge them
soon: while it does, which is nearly always, no build waits for a disk. (This process sweeps what an earlier one left:
the coordinator learns of the new incarnation and gives the leases to others.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from workers.agent.lease_actions import LeaseKey
from workers.errors import WorkerError
from workers.wire.messages import SMALL_BATCH_BYTES, TRANSFERS_EVERY_S, LogChunk, Report, StageChange

_log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024
FLUSH_S = 0.1
#: Log in memory, all leases together.
MEMORY_LOG_BYTES = 4 * 1024 * 1024
#: Log of one lease that waits, beyond which its builder is slowed down. Events leave in order, so the report of a quiet
#: build waits behind so much of each noisy one beside it: a second at full speed.
MAX_LEASE_BYTES = 8 * 1024 * 1024
#: Log in memory and files, all leases together, beyond which all builders are slowed down.
MAX_LOG_BYTES = 256 * 1024 * 1024
#: Seconds for which the log of a reported lease is kept: by then a coordinator has moved it to the object store
#: (`coordinator.engine.log_archiver`, 60 s after the end and a sweep).
KEEP_S = 180.0
#: Log of reported leases that is kept.
MAX_KEPT_BYTES = 128 * 1024 * 1024
#: Size of the file of reports beyond which it is written anew without the acknowledged ones.
MAX_REPORTS_BYTES = 4 * 1024 * 1024
#: Seconds after which a report that is not acknowledged is synced to disk.
SYNC_S = 1.0
#: What an event without log text is counted as in an answer; with each output, and each fetch or phase, of a report.
EVENT_BYTES = 400
OUTPUT_BYTES = 200
MEASURE_BYTES = 120


class OutboxError(WorkerError):
    """The outbox's directory cannot be used."""


@dataclass(slots=True)
class _Entry:
    seq: int
    key: LeaseKey
    #: The event as plain containers; None for a chunk that lies in a file, and for what is out of date.
    event: dict[str, Any] | None
    kind: str
    #: Bytes of log text.
    size: int = 0
    #: Place in the lease's file; -1 where the chunk is in memory.
    at: int = -1


def _open_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True)
class _Log:
    """The unsent log of one lease."""

    #: Lines that are not a chunk yet.
    pending: bytearray
    #: Bytes that are not acknowledged, and the event that is set while the builder may go on printing.
    waiting: int = 0
    room: asyncio.Event = field(default_factory=_open_event)
    #: Bytes of this attempt's log before `pending`.
    offset: int = 0
    #: Open file of spilled chunks, and its size.
    descriptor: int = -1
    spilled: int = 0
    #: Chunks in the queue, and those that were acknowledged.
    entries: int = 0
    kept: list[_Entry] = field(default_factory=list)
    #: The report is queued: nothing comes any more.
    ended: bool = False
    #: When all of it was acknowledged, after the report (loop time).
    settled_at: float = 0.0


class Outbox:
    """See the module's text. Belongs to one event loop; must be closed."""

    def __init__(
        self,
        directory: Path,
        *,
        max_lease_bytes: int = MAX_LEASE_BYTES,
        max_log_bytes: int = MAX_LOG_BYTES,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        """Make the directory, swept. Raises `OutboxError`."""
        self._directory = directory
        self._max_lease_bytes = max_lease_bytes
        self._max_log_bytes = max_log_bytes
        self._max_kept_bytes = max_kept_bytes
        try:
            if directory.exists():
                left = sum(1 for _ in directory.iterdir())
                if left:
                    _log.info("sweeping %d files that an earlier worker left in %s", left, directory)
                shutil.rmtree(directory)
            directory.mkdir(parents=True, mode=0o700)
            self._reports = os.open(directory / "reports.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        except OSError as error:
            raise OutboxError(f"cannot use the outbox directory {directory}: {error.strerror}") from error
        self._reports_bytes = 0
        self._entries: deque[_Entry] = deque()
        self._logs: dict[LeaseKey, _Log] = {}
        #: Logs of reported leases of which nothing is queued, the longest settled first, and their size.
        self._settled: dict[LeaseKey, _Log] = {}
        self._settled_bytes = 0
        #: Queued stage changes that were never in an answer.
        self._stages: dict[LeaseKey, _Entry] = {}
        #: Last number given, last number in an answer, last number acknowledged.
        self._last = self._sent = self._acked = 0
        #: Log text that lies in memory and not on disk.
        self.memory_bytes = 0
        #: Unacknowledged log text, pending lines included.
        self.log_bytes = 0
        #: Set while the builders of leases with room of their own may go on printing.
        self._room = _open_event()
        #: Leases with lines that are not a chunk yet, and the timer that ends that.
        self._unflushed: set[LeaseKey] = set()
        self._flush_timer: asyncio.TimerHandle | None = None
        #: Runs while an unacknowledged report is not synced.
        self._sync_timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Task[None] | None = None
        #: When an answer is due (loop time); None where nothing was queued since the last one.
        self._due: float | None = None
        #: Set when `_due` came nearer or another waiter took the turn.
        self._changed = asyncio.Event()
        self._turn = 0

    @property
    def logs(self) -> int:
        """Number of leases with log text that is not acknowledged."""
        return sum(bool(mine.entries or mine.pending) for mine in self._logs.values())

    def send_again(self) -> None:
        """Queue all log that is kept, before all that waits, for a coordinator that may not have it."""
        again: list[_Entry] = []
        self._acked = self._sent = self._last
        for key, mine in self._logs.items():
            if mine.kept and mine.descriptor < 0 and self._file(key).exists():
                mine.descriptor = os.open(self._file(key), os.O_RDWR | os.O_CLOEXEC)
            kept, mine.kept = mine.kept, []
            mine.entries += len(kept)
            again += kept
            self._count_log(mine, sum(entry.size for entry in kept))
        self._settled.clear()
        self._settled_bytes = 0
        self._entries.extendleft(reversed(again))
        for entry in self._entries:
            self._last += 1
            entry.seq = self._last
        if again:
            self._due_within(0.0)

    def has_room(self, key: LeaseKey) -> bool:
        """Return whether the builder of a lease may go on printing."""
        mine = self._logs.get(key)
        return self._room.is_set() and (mine is None or mine.room.is_set())

    async def wait_for_room(self, key: LeaseKey) -> None:
        """Return once the builder of a lease may go on printing."""
        while not self.has_room(key):
            await self._logs[key].room.wait()
            await self._room.wait()

    def log(self, key: LeaseKey, data: bytes) -> None:
        """Queue log bytes of a lease."""
        mine = self._logs.get(key)
        if mine is None:
            mine = self._logs[key] = _Log(bytearray())
        mine.pending += data
        self._count_log(mine, len(data))
        if len(mine.pending) >= CHUNK_BYTES:
            self._flush(key, mine)
            self._due_within(FLUSH_S)
        elif key not in self._unflushed:
            self._unflushed.add(key)
            if self._flush_timer is None:
                self._flush_timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush_all)

    def stage(self, change: StageChange, *, within_s: float) -> None:
        """Queue a stage change, after the log up to here, to be sent within so many seconds."""
        key = (change.step, change.attempt)
        self._end_chunk(key)
        self._drop_stage(key)
        self._stages[key] = self._append(key, change.dump(), "stage")
        self._due_within(within_s)

    def report(self, report: Report, *, within_s: float) -> None:
        """Queue the end of a lease, after all of its log."""
        key = (report.step, report.attempt)
        self._end_chunk(key)
        self._drop_stage(key)
        mine = self._logs.get(key)
        if mine is not None:
            mine.ended = True
            self._settle(key, mine)
        event = report.dump()
        self._append(key, event, "report")
        self._reports_bytes += self._write_reports(orjson.dumps(event) + b"\n")
        if self._sync_timer is None:
            self._sync_timer = asyncio.get_running_loop().call_later(SYNC_S, self._sync_if_old, self._last)
        self._due_within(within_s)

    def moved(self) -> None:
        """Let an answer be due within TRANSFERS_EVERY_S: bytes of a transfer move, which the answer will say."""
        self._due_within(TRANSFERS_EVERY_S)

    def acknowledge(self, ack: int) -> list[LeaseKey]:
        """Forget events up to `ack`; return the leases whose report was among them. Repeats are no-ops."""
        reported: list[LeaseKey] = []
        if ack > self._sent:
            # Meant for another incarnation of this worker: nothing of that number was ever in an answer.
            return reported
        while self._entries and self._entries[0].seq <= ack:
            entry = self._entries.popleft()
            if entry.kind == "report":
                reported.append(entry.key)
            elif entry.kind == "log":
                self._keep_chunk(entry)
        self._forget_settled()
        self._acked = max(self._acked, ack)
        if self._reports_bytes > MAX_REPORTS_BYTES or (reported and not self._entries):
            self._rewrite_reports()
        return reported

    async def wait(self, wait_s: float) -> None:
        """Return when an answer is due, at the latest after `wait_s`; at once where another call begins to wait."""
        loop = asyncio.get_running_loop()
        self._turn += 1
        turn = self._turn
        self._changed.set()
        # A caller in this process that asks again and again must not keep the builds from going on.
        await asyncio.sleep(0)
        if self._entries and self._due is None:
            # Left over from a bounded answer, or from one that was lost.
            return
        deadline = loop.time() + wait_s
        while turn == self._turn:
            until = deadline if self._due is None else min(deadline, self._due)
            if until <= loop.time():
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._changed.wait()

    def stop_waiting(self) -> None:
        """Let the caller of `wait` return now."""
        self._turn += 1
        self._changed.set()

    def take(self, max_bytes: int) -> tuple[int, list[dict[str, Any]], set[LeaseKey]]:
        """Return the last number, the events after the acknowledged ones that fit, and the leases they end.

        At least one event fits. Answers without log text are kept within `SMALL_BATCH_BYTES`.
        """
        size = 0
        has_log = False
        events: list[dict[str, Any]] = []
        ended: set[LeaseKey] = set()
        last = self._acked
        for entry in self._entries:
            cost = entry.size + EVENT_BYTES
            has_log = has_log or entry.kind == "log"
            if events and size + cost > (max_bytes if has_log else min(max_bytes, SMALL_BATCH_BYTES)):
                break
            last = entry.seq
            if entry.kind == "log":
                events.append(self._chunk(entry))
            elif entry.event is not None:
                events.append(entry.event)
                if entry.kind == "report":
                    ended.add(entry.key)
                    cost += OUTPUT_BYTES * len(entry.event["result"].get("outputs", ()))
                    measures = entry.event["measures"] or {}
                    cost += MEASURE_BYTES * (len(measures.get("fetches", ())) + len(measures.get("phases", ())))
                else:
                    self._stages.pop(entry.key, None)
            else:
                continue
            size += cost
        self._sent = max(self._sent, last)
        self._due = None
        return last, events, ended

    async def close(self) -> None:
        """Sync and close the files. What is unacknowledged stays on disk until the next start."""
        for timer in (self._flush_timer, self._sync_timer):
            if timer is not None:
                timer.cancel()
        if self._syncing is not None:
            await self._syncing
        for mine in self._logs.values():
            if mine.descriptor >= 0:
                os.close(mine.descriptor)
        self._logs.clear()
        os.close(self._reports)

    def _due_within(self, seconds: float) -> None:
        due = asyncio.get_running_loop().time() + seconds
        if self._due is None or due < self._due:
            self._due = due
            self._changed.set()

    def _append(self, key: LeaseKey, event: dict[str, Any] | None, kind: str, size: int = 0, at: int = -1) -> _Entry:
        self._last += 1
        entry = _Entry(self._last, key, event, kind, size, at)
        self._entries.append(entry)
        return entry

    def _drop_stage(self, key: LeaseKey) -> None:
        unsent = self._stages.pop(key, None)
        if unsent is not None:
            unsent.event = None

    def _count_log(self, mine: _Log, change: int) -> None:
        mine.waiting += change
        self.log_bytes += change
        for size, most, room in (
            (mine.waiting, self._max_lease_bytes, mine.room),
            (self.log_bytes, self._max_log_bytes, self._room),
        ):
            if size > most:
                room.clear()
            elif size <= most // 2:
                room.set()

    def _flush_all(self) -> None:
        self._flush_timer = None
        for key in list(self._unflushed):
            self._end_chunk(key)
        self._due_within(0.0)

    def _end_chunk(self, key: LeaseKey) -> None:
        self._unflushed.discard(key)
        mine = self._logs.get(key)
        if mine is not None and mine.pending:
            self._flush(key, mine)

    def _flush(self, key: LeaseKey, mine: _Log) -> None:
        self._unflushed.discard(key)
        data = bytes(mine.pending)
        mine.pending.clear()
        for start in range(0, len(data), CHUNK_BYTES):
            part = data[start : start + CHUNK_BYTES]
            at = -1
            event: dict[str, Any] | None = None
            if self.memory_bytes + len(part) <= MEMORY_LOG_BYTES:
                self.memory_bytes += len(part)
                event = LogChunk(step=key[0], attempt=key[1], offset=mine.offset, data=part).dump()
            else:
                at = self._spill(key, mine, part)
                event = {"offset": mine.offset}
            mine.offset += len(part)
            mine.entries += 1
            self._append(key, event, "log", len(part), at)

    def _file(self, key: LeaseKey) -> Path:
        # A step's key may hold anything: the name is its hash.
        return self._directory / f"{sha256(key[0].encode()).hexdigest()[:32]}-{key[1]}.log"

    def _spill(self, key: LeaseKey, mine: _Log, data: bytes) -> int:
        """Write a chunk to the lease's file (page cache: no slower than a copy); return where it lies."""
        if mine.descriptor < 0:
            mine.descriptor = os.open(self._file(key), os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
            mine.spilled = 0
        at = mine.spilled
        view = memoryview(data)
        while view:
            view = view[os.pwrite(mine.descriptor, view, mine.spilled) :]
            mine.spilled = at + len(data) - len(view)
        return at

    def _chunk(self, entry: _Entry) -> dict[str, Any]:
        if entry.event is None:
            raise RuntimeError("a queued chunk of log has no text")
        if entry.at < 0:
            return entry.event
        data = os.pread(self._logs[entry.key].descriptor, entry.size, entry.at)
        step, attempt = entry.key
        return LogChunk(step=step, attempt=attempt, offset=entry.event["offset"], data=data).dump()

    def _keep_chunk(self, entry: _Entry) -> None:
        mine = self._logs[entry.key]
        mine.entries -= 1
        mine.kept.append(entry)
        self._count_log(mine, -entry.size)
        self._settle(entry.key, mine)

    def _settle(self, key: LeaseKey, mine: _Log) -> None:
        """Count a log among those that may be forgotten, once its lease is reported and nothing of it is queued."""
        if not mine.ended or mine.entries or key in self._settled:
            return
        mine.settled_at = asyncio.get_running_loop().time()
        self._settled[key] = mine
        self._settled_bytes += mine.offset
        if mine.descriptor >= 0:
            os.close(mine.descriptor)
            mine.descriptor = -1

    def _forget_settled(self) -> None:
        """Forget the logs that were kept for long enough, and the oldest beyond the bound."""
        now = asyncio.get_running_loop().time()
        while self._settled:
            key, mine = next(iter(self._settled.items()))
            if now - mine.settled_at < KEEP_S and self._settled_bytes <= self._max_kept_bytes:
                return
            del self._settled[key], self._logs[key]
            self._settled_bytes -= mine.offset
            self.memory_bytes -= sum(entry.size for entry in mine.kept if entry.at < 0)
            self._file(key).unlink(missing_ok=True)

    def _write_reports(self, data: bytes) -> int:
        try:
            return os.write(self._reports, data)
        except OSError as error:
            # The report is delivered from memory all the same; only a later process would miss it.
            _log.warning("a report could not be written to %s: %s", self._directory, error.strerror)
            return 0

    def _rewrite_reports(self) -> None:
        os.ftruncate(self._reports, 0)
        self._reports_bytes = 0
        left = [entry.event for entry in self._entries if entry.kind == "report"]
        if left:
            self._reports_bytes = self._write_reports(b"".join(orjson.dumps(event) + b"\n" for event in left))

    def _sync_if_old(self, number: int) -> None:
        """Sync if event `number`, a report of SYNC_S ago, is still unacknowledged; else look at later ones later."""
        self._sync_timer = None
        loop = asyncio.get_running_loop()
        if self._acked < number:
            self._syncing = loop.create_task(self._sync(), name="sync reports")
        elif any(entry.kind == "report" for entry in self._entries):
            self._sync_timer = loop.call_later(SYNC_S, self._sync_if_old, self._last)

    async def _sync(self) -> None:
        try:
            await asyncio.to_thread(os.fsync, self._reports)
        except OSError as error:
            _log.warning("reports in %s could not be synced: %s", self._directory, error.strerror)
