"""Growth of open submissions: further roots while a client evaluates, until it seals them or falls silent.

A batch is planned down to what the submission has been planned with before, so it costs what is new. Batches of one
submission are taken one after the other. Their roots are counted once by attribute and derivation, so that a client may
send a batch again whose answer it has lost. What is remembered for that is made anew from the submission's note after
a restart; the first batch then is planned as a whole.

Of several clients with one idempotency key one grows the submission: the one that opened it, as long as it gives signs
of life. The others may name what it has named. Where one names an attribute that stands for another derivation there,
it is refused; where one names more, or is done before, it waits. Silence of the first lets another one go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.api.requests import GrowRequest, RootRequest, SealRequest, SubmitRequest
from coordinator.engine.engine import Engine
from coordinator.errors import ConflictError, HeldError, OtherWishError
from coordinator.intake.client_meter import placed
from coordinator.intake.idempotency import contradicting
from coordinator.intake.intake import Intake
from coordinator.intake.submissions import Submissions
from coordinator.journal.codec import NoteGrowth, encode_growth, encode_note
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from infra.collector import collector_paused
from infra.slices import free_in_slices
from scheduler.events import SealAsked, SubmissionGrown
from scheduler.model import StepKey, SubmissionId

#: Seconds between two looks for silent clients, at most.
LOOK_S: Final = 15.0
#: Seconds of silence after which another client may go on, at most; a client gives a sign in a third of it.
TURN_S: Final = 45.0


@dataclass(slots=True, eq=False)
class _Growing:
    """Memory of one open submission."""

    #: Attribute and derivation of each root.
    roots: set[tuple[str, str]]
    #: Steps that it stood on when this was made.
    members: frozenset[StepKey]
    #: Name of the client that grows it, and when that was last heard of.
    client: str
    heard_at: float
    #: Base names of derivations that it was planned with since.
    planned: set[str] = field(default_factory=set)
    #: Held while it grows or is sealed.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Growth:
    """The ways into the core for open submissions, and their end where a client falls silent."""

    def __init__(
        self, engine: Engine, views: Views, intake: Intake, submissions: Submissions, silence_s: float
    ) -> None:
        self._engine = engine
        self._views = views
        self._intake = intake
        self._submissions = submissions
        self._silence_s = silence_s
        self._open: dict[SubmissionId, _Growing] = {}

    async def grow(self, submission: str, wish: GrowRequest) -> SubmissionRow:
        """Take further roots; returns the row once they are durable. Roots that are there already change nothing.

        Raises:
            NotFoundError: There is no such submission.
            ConflictError: It is not open any more, or wishes something else than this client (`OtherWishError`).
            HeldError: Another client grows it.
            IntakeError: The roots or their graph are not what the farm takes.
        """
        row = self._views.submission(submission)
        growing = self._growing(row)
        async with growing.lock:
            is_first = self._has_turn(row, growing, wish.client)
            wanted = (root for root in dict.fromkeys(wish.roots) if (root.attr, root.drv) not in growing.roots)
            fresh = tuple(wanted)
            if not is_first:
                await self._require_named(row, growing, wish)
            elif fresh:
                _require_open(row, wish.client)
                with collector_paused():
                    await self._grow(row, growing, fresh, wish)
        return row

    async def _grow(
        self, row: SubmissionRow, growing: _Growing, fresh: tuple[RootRequest, ...], wish: GrowRequest
    ) -> None:
        asked_at = self._engine.now()
        request = SubmitRequest(roots=fresh, makers=wish.makers)
        planned = await self._intake.submit(request, known=growing.planned)
        note = self._views.note(row.id)
        new = sum(step not in growing.members for step in planned.planned.values())
        growth = NoteGrowth(planned.roots, new)
        stored = await asyncio.to_thread(encode_growth, growth, len(note.roots))
        received = await asyncio.to_thread(planned.event, row.id)
        event = SubmissionGrown(
            row.id,
            received.roots,
            planned.steps,
            planned.held,
            asked_at,
            wish.retry_failed,
            received.limits,
            planned.held_bytes,
        )
        await self._submissions.hand_over(planned, event, stored)
        growing.roots.update((root.attr, root.drv) for root in fresh)
        growing.planned.update(planned.planned)
        grown = replace(note, roots=(*note.roots, *planned.roots), derivations=note.derivations + new)
        self._views.add_details({}, {row.id: grown})
        objects = planned.objects()
        del planned, received, event
        await free_in_slices(objects)

    async def seal(self, submission: str, wish: SealRequest) -> SubmissionRow:
        """End the growth of a submission; a repeat changes nothing.

        Raises `NotFoundError`, `HeldError` and `OtherWishError` as `grow`.
        """
        row = self._views.submission(submission)
        growing = self._growing(row)
        async with growing.lock:
            is_first = self._has_turn(row, growing, wish.client)
            if row.is_open and not is_first:
                raise _held(row)
            if row.is_open:
                await self._seal(row, wish)
        count = len({drv for _, drv in growing.roots})
        if not (is_first or row.incomplete or row.withdrawn) and wish.drv_count not in {None, count}:
            raise OtherWishError(
                f"submission {row.id} of the same idempotency key has {count} derivations as roots, and not the "
                f"{wish.drv_count} of this client; use a new key for a new wish."
            )
        return row

    def _has_turn(self, row: SubmissionRow, growing: _Growing, client: str) -> bool:
        """Return whether a client may grow the submission; it may from now on where the one before is silent."""
        now = self._engine.now()
        is_first = not client or client == growing.client
        if not is_first and row.is_open and now - growing.heard_at >= min(TURN_S, self._silence_s / 2):
            growing.client, is_first = client, True
        if is_first:
            growing.heard_at = now
        return is_first

    @staticmethod
    async def _require_named(row: SubmissionRow, growing: _Growing, wish: GrowRequest) -> None:
        """Raise where the submission lacks roots of a client that does not grow it."""
        # One derivation may have several names, of which each evaluation sends the one that it found first.
        named = await asyncio.to_thread(lambda: {drv for _, drv in growing.roots})
        if all(root.drv in named for root in wish.roots):
            return
        _require_open(row, wish.client)
        other = await asyncio.to_thread(contradicting, wish.roots, growing.roots)
        if other is not None:
            raise OtherWishError(
                f"{other.attr} is another derivation in submission {row.id} of the same idempotency key; "
                "use a new key for a new wish."
            )
        raise _held(row)

    async def _seal(self, row: SubmissionRow, wish: SealRequest) -> None:
        given = self._views.note(row.id)
        stages = placed(wish.stages, self._engine.now())
        not_evaluated = tuple((each.attr, each.kind, each.message) for each in wish.not_evaluated)
        note = replace(
            given,
            not_evaluated=not_evaluated,
            unevaluated=max(wish.unevaluated, len(not_evaluated)),
            stages=(*given.stages, *stages),
        )
        stored = await asyncio.to_thread(encode_note, note)
        # Before the fact, after which watchers see the last of it.
        self._views.add_details({}, {row.id: note})
        await self._engine.submit(SealAsked(row.id, wish.incomplete), stored)
        self._submissions.meter.count(SubmitRequest(roots=(), open=True, stages=wish.stages), note.derivations)

    def _growing(self, row: SubmissionRow) -> _Growing:
        growing = self._open.get(row.id)
        if growing is None:
            note = self._views.note(row.id)
            roots = {(root.attr, root.drv) for root in note.roots}
            growing = _Growing(roots, frozenset(row.members), note.origin.client, self._engine.now())
            if row.is_open:
                self._open[row.id] = growing
        return growing

    async def run(self) -> None:
        """Seal what silent clients left open, until cancelled. Raises `UnavailableError` once the engine stops."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._silence_s / 4))
            await self.look(self._views.submission_rows())

    async def look(self, rows: Collection[SubmissionRow]) -> None:
        """Seal those of the submissions whose clients have been silent for too long. Raises `UnavailableError`."""
        opened = [row for row in rows if row.is_open]
        for gone in self._open.keys() - {row.id for row in opened}:
            del self._open[gone]
        for row in opened:
            growing = self._growing(row)
            silent_s = self._engine.now() - growing.heard_at
            if silent_s >= self._silence_s and not growing.lock.locked():
                why = f"its client has sent nothing for {silent_s / 60:.0f} min, before all was evaluated"
                await self.seal(row.id, SealRequest(incomplete=why))


def _held(row: SubmissionRow) -> HeldError:
    return HeldError(f"submission {row.id} still grows by another client with the same idempotency key; try again.")


def _require_open(row: SubmissionRow, client: str) -> None:
    if row.is_open:
        return
    if client and not (row.incomplete or row.withdrawn):
        raise OtherWishError(
            f"submission {row.id} of the same idempotency key is complete and lacks roots of this client; "
            "use a new key for a new wish."
        )
    what = f"was closed ({row.incomplete})" if row.incomplete else "is complete"
    if row.withdrawn:
        what = "was cancelled"
    raise ConflictError(f"submission {row.id} {what} and takes no further roots; build them with `drover build`.")
