"""The loop: events in, facts to the journal, effects out. The only owner of the `Farm` and of its time.

One turn: take everything that waits, ask the core once, append the durable facts in one commit, fold all facts into the
views, hand the effects to dispatch, tell those who waited that their event is safe. The order is the promise: nothing
is shown, acknowledged or done before its facts are durable. A turn that concerns many steps gives the event loop to
others again and again (`slices`); the next one begins when it has ended.

An append waits for a database that is away, for a bounded time. If it fails the engine stops with that error and the
process ends: the core has already moved on, and only a replay brings memory and journal together again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.errors import IntakeError, UnavailableError
from coordinator.journal.codec import StoredNote, SubmissionNote, decode_notes, encode_note
from coordinator.journal.journal import Journal
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.derivations import DerivationStore, StepInfo
from infra.clock import Clock
from infra.slices import in_slices
from scheduler.effects import Effect
from scheduler.events import Event, SubmissionCancelled, SubmissionReceived, TimePassed
from scheduler.facts import Fact
from scheduler.farm import Farm
from scheduler.model import Instant, SubmissionId, SubmissionRefusedError

#: Letters that may wait; whoever sends more waits at the door.
INBOX_LETTERS = 4096
#: Letters of one turn: bounds how long the loop keeps others from running.
TURN_LETTERS = 1024
#: Keys in one question for step details at the start: some 10 ms, which others must wait.
_DETAILS_ASKED = 2_000
#: Facts of one turn from which on what it made is kept from the cycle collector for good, as what a replay made is.
_FROZEN_FACTS = 5_000

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Letter:
    """Events that belong together, what to note with them, and who waits for it."""

    events: tuple[Event, ...]
    notes: Mapping[SubmissionId, SubmissionNote] = field(default_factory=dict)
    infos: Sequence[StepInfo] = ()
    safe: asyncio.Future[None] | None = None
    #: It holds a submission, which the core may refuse.
    alone: bool = False
    refused: bool = False


class Engine:
    """Runs one farm. `recover`, then `run` until cancelled; all other methods from the same event loop."""

    def __init__(
        self, farm: Farm, journal: Journal, views: Views, clock: Clock, hand: Callable[[Sequence[Effect]], None]
    ) -> None:
        self._farm = farm
        self._journal = journal
        self._views = views
        self._clock = clock
        self._hand = hand
        self._inbox: asyncio.Queue[_Letter] = asyncio.Queue(INBOX_LETTERS)
        self._running = False
        self._stopped = False

    @property
    def running(self) -> bool:
        """Whether events are being taken."""
        return self._running

    def now(self) -> Instant:
        """Return the engine's time."""
        return Instant(self._clock.now())

    async def recover(self) -> int:
        """Replay the journal, from its newest snapshot on, into core and views. Raises `JournalError`.

        Returns the number of facts. What people want to know of the steps is left to `recall`.
        """
        count = 0
        with _collector_paused():
            async for piece in self._journal.load():
                self._farm.replay(piece.facts)
                self._views.fold(piece.facts, settle=False)
                if piece.records:
                    self._views.restore(piece.records)
                count += len(piece.facts)
                # A long replay must not keep signals and supervisors waiting.
                await asyncio.sleep(0)
            self._views.settle()
            notes = decode_notes(await self._journal.notes())
            self._views.know({}, notes)
            # Nearly all of this stays: no collection need ever look at it.
            gc.freeze()
        return count

    async def recall(self, derivations: DerivationStore) -> None:
        """Learn what people want to know of the steps, while the engine runs. Raises `DerivationsError`."""
        keys = self._views.nameless()
        for start in range(0, len(keys), _DETAILS_ASKED):
            self._views.know(await derivations.steps(keys[start : start + _DETAILS_ASKED]))
            await asyncio.sleep(0)
        # It stays too, as do Ray and the routes, which came after the journal: a full collection of the 44,000 objects
        # of an empty farm holds the loop for 20 ms.
        gc.freeze()

    async def run(self) -> None:
        """Serve until cancelled. Raises `JournalError` where facts cannot be stored; then nothing was acted on."""
        self._running = True
        try:
            self._hand(self._farm.resume(self.now()))
            while True:
                await self._turn(await self._letters())
        finally:
            self._running, self._stopped = False, True
            while not self._inbox.empty():
                _refuse(self._inbox.get_nowait())

    async def offer(self, *events: Event) -> None:
        """Give events to the core; returns once what follows from them is durable. Raises `UnavailableError`."""
        await self._send(_Letter(events))

    async def post(self, events: Sequence[Event]) -> None:
        """Give events to the core without waiting for the journal."""
        if events and not self._stopped:
            await self._inbox.put(_Letter(tuple(events)))

    async def submit(
        self,
        event: Callable[[SubmissionId], SubmissionReceived],
        infos: Sequence[StepInfo],
        note: SubmissionNote | None = None,
    ) -> SubmissionRow:
        """Take a planned submission; returns its row once it is durable.

        `event` makes the core's event, for the name that is chosen here or for a known one that runs again; `note` is
        of a new one. Raises `UnavailableError`, `IntakeError`.
        """
        # In a thread: it lists the steps of a large graph.
        received = await asyncio.to_thread(event, SubmissionId(secrets.token_hex(5)))
        notes = {} if note is None else {received.submission: note}
        await self._send(_Letter((received,), notes, infos, alone=True))
        return self._views.submission(received.submission)

    async def cancel(self, submission: str) -> SubmissionRow:
        """Withdraw a submission; a repeat changes nothing. Raises `NotFoundError`, `UnavailableError`."""
        row = self._views.submission(submission)
        if not row.ended and not row.withdrawn:
            await self.offer(SubmissionCancelled(row.id))
        return row

    async def _send(self, letter: _Letter) -> None:
        letter.safe = asyncio.get_running_loop().create_future()
        await self._inbox.put(letter)
        if self._stopped:
            _refuse(letter)
        await letter.safe

    async def _letters(self) -> list[_Letter]:
        """Wait for a letter or the core's next deadline; return all letters that wait, at most one turn's."""
        letters: list[_Letter] = []
        if self._inbox.empty():
            deadline = self._farm.deadline()
            wait_s = None if deadline is None else max(0.0, deadline - self.now())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    letters.append(await self._inbox.get())
        while len(letters) < TURN_LETTERS and not self._inbox.empty():
            letters.append(self._inbox.get_nowait())
        return letters

    async def _turn(self, letters: Sequence[_Letter]) -> None:
        try:
            await self._take(letters)
        except BaseException:
            for letter in letters:
                _refuse(letter)
            raise
        for letter in letters:
            if letter.safe is not None and not letter.safe.done():
                letter.safe.set_result(None)

    async def _take(self, letters: Sequence[_Letter]) -> None:
        with _collector_paused():
            facts, effects = await self._ask(letters)
            if len(facts) > _FROZEN_FACTS:
                gc.freeze()
        durable = [fact for fact in facts if fact.durable]
        notes = {name: note for letter in letters if not letter.refused for name, note in letter.notes.items()}
        if durable or notes:
            # Those of a large graph take long to compress.
            encoded = await asyncio.to_thread(_encoded, notes) if notes else {}
            await self._journal.append(durable, encoded)
        for letter in letters:
            await in_slices(self._views.knowing(letter.infos, letter.notes))
        with _collector_paused():
            await in_slices(self._views.folding(facts))
            if len(facts) > _FROZEN_FACTS:
                gc.freeze()
        self._hand(effects)

    async def _ask(self, letters: Sequence[_Letter]) -> tuple[list[Fact], list[Effect]]:
        """Let the core decide. A submission is asked about alone: the core may refuse it, and only it."""
        facts: list[Fact] = []
        effects: list[Effect] = []

        async def handle(events: Sequence[Event]) -> None:
            more_facts, more_effects = await in_slices(self._farm.handling(events, self.now()))
            facts.extend(more_facts)
            effects.extend(more_effects)

        plain: list[Event] = []
        for letter in letters:
            if not letter.alone:
                plain.extend(letter.events)
                continue
            await handle(plain)
            plain = []
            try:
                await handle(letter.events)
            except SubmissionRefusedError as error:
                _log.warning("a submission was refused: %s", error)
                letter.refused = True
                if letter.safe is not None and not letter.safe.done():
                    letter.safe.set_exception(IntakeError(f"the graph of this submission cannot be built: {error}."))
        await handle(plain or [TimePassed()])
        return facts, effects


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the cycle collector out while many objects are made that stay: it would walk them again and again.

    A submission of 100,000 steps and a replay are twice as fast; what cycles arise are collected afterwards.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _encoded(notes: Mapping[SubmissionId, SubmissionNote]) -> dict[SubmissionId, StoredNote]:
    return {name: encode_note(note) for name, note in notes.items()}


def _refuse(letter: _Letter) -> None:
    if letter.safe is not None and not letter.safe.done():
        letter.safe.set_exception(UnavailableError("the coordinator is stopping; try again once it runs."))
