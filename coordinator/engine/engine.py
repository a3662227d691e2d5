"""Event loop of the core: events in, facts to the journal, effects out. The only owner of the `Farm` and of its time.

One turn: take everything that waits, ask the core once, append the durable facts in one commit, fold all facts into the
views, hand the effects to dispatch, wake those who wait for their event to be durable. The order is the promise:
nothing is shown, acknowledged or done before its facts are durable. A turn that concerns many steps gives the event
loop to others again and again (`slices`); the next one begins when it has ended.

A submission has a turn of its own. While a large one is decided and encoded, the ends of builds *pass* it in small
turns, where the core lets them (`scheduler.opening`): their facts go to the journal before or after those of the
submission, and to the views before, after or between them. Not between are ends of its own steps, which would count as
done before it came, and after a replay as done since. Its leases are granted in the turn after it.

An append waits for a database that is away, for a bounded time. If it fails the engine stops with that error and the
process ends: the core has already moved on, and only a replay brings memory and journal together again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

from coordinator.engine.inbox import EngineInbox, EngineMessage, SubmissionEvent
from coordinator.engine.meter import EngineMeter
from coordinator.engine.replay import replay
from coordinator.journal.codec import SubmissionNote
from coordinator.journal.frames import FrameBody
from coordinator.journal.journal import Journal
from coordinator.journal.notes import Note
from coordinator.readmodel.views import Views
from infra.clock import Clock
from infra.collector import collector_paused
from infra.slices import going_first, in_slices
from scheduler.effects import Effect
from scheduler.events import Event, OutputsPublished, TimePassed
from scheduler.facts import Fact, SubmissionAccepted, SubmissionGrew
from scheduler.farm import Farm
from scheduler.model import Instant, StepKey, SubmissionId, SubmissionRefusedError

#: Messages of one turn, and of one that passes a submission: bounds how long the loop keeps others from running.
TURN_MESSAGES = 1024
PASSING_MESSAGES = 64
#: Facts of a large submission that go to the views at one time, some 2 ms; ends of builds come between.
SHOWN_FACTS = 512

_log = logging.getLogger(__name__)


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
        self._inbox = EngineInbox()
        #: Held by the turn whose facts go to journal and views.
        self._committing = asyncio.Lock()
        #: Members of the large submission whose facts are stored and not yet shown.
        self._shown: frozenset[StepKey] = frozenset()
        self._running = False
        self._stopped = False
        self.meter = EngineMeter()

    @property
    def running(self) -> bool:
        """True if events are being taken."""
        return self._running

    def now(self) -> Instant:
        """Return the engine's time."""
        return Instant(self._clock.now())

    async def recover(self, notes: Mapping[SubmissionId, SubmissionNote]) -> int:
        """Replay the journal, from its newest snapshot on, into core and views; returns the number of facts.

        Names are left to `coordinator.readmodel.recall`; for `notes` see `replay`. Raises `JournalError`.
        """
        with collector_paused():
            count = await replay(self._journal, self._farm, self._views, notes)
            # Nearly all of this stays: no collection need ever look at it.
            gc.freeze()
        return count

    async def run(self) -> None:
        """Serve until cancelled. Raises `JournalError` where facts cannot be stored; then nothing was acted on."""
        self._running = True
        try:
            self._hand(self._farm.resume(self.now()))
            while True:
                deadline = self._farm.deadline()
                await self._inbox.filled(None if deadline is None else max(0.0, deadline - self.now()))
                plain = self._inbox.take(TURN_MESSAGES)
                if plain or not self._inbox.has_submission:
                    await self._turn(plain)
                # Only now, because what was taken is answered by its turn.
                if (submission := self._inbox.take_submission()) is not None:
                    await (self._take_large(submission) if submission.is_large else self._turn([submission]))
                # The next message may be hours away.
                del plain, submission
        finally:
            self._running, self._stopped = False, True
            for message in self._inbox.take_all():
                message.refuse()

    async def offer(self, *events: Event) -> None:
        """Give events to the core; returns once what follows from them is durable. Raises `UnavailableError`."""
        await self._send(EngineMessage(events))

    async def post(self, events: Sequence[Event]) -> None:
        """Give events to the core without waiting for the journal."""
        if events and not self._stopped:
            await self._inbox.put(EngineMessage(tuple(events)))

    async def submit(self, event: SubmissionEvent, note: Note | None = None) -> None:
        """Hand a submission or its growth to the core; returns once what follows from it, and its note, are durable.

        Raises `UnavailableError`, and `SubmissionRefusedError` where the core does not take the graph.
        """
        await self._send(EngineMessage((event,), submission=event, note=note))

    async def _send(self, message: EngineMessage) -> None:
        message.safe = asyncio.get_running_loop().create_future()
        await self._inbox.put(message)
        if self._stopped:
            message.refuse()
        await message.safe

    async def _turn(self, messages: Sequence[EngineMessage]) -> None:
        """Take in messages, or one submission, and what the time has decided; grant leases."""
        with _answering(messages), collector_paused(), going_first():
            facts, effects = await self._ask(messages)
            async with self._committing:
                await self._commit(messages, facts)
            self._hand(effects)

    async def _take_large(self, submission: EngineMessage) -> None:
        """Take in a large submission, and the ends of builds that pass it meanwhile; then grant leases."""
        messages = [submission]

        async def turn() -> None:
            with _answering(messages), collector_paused():
                facts, effects = await self._ask(messages, grant=False)
                encoded = await self._journal.encoded([fact for fact in facts if fact.durable])
                # Ends of builds wait for this.
                async with self._committing:
                    with going_first():
                        await self._store(messages, facts, encoded)
                self._shown = members_of(facts)
                try:
                    for start in range(0, len(facts), SHOWN_FACTS):
                        await self._show_part(facts, start)
                finally:
                    self._shown = frozenset()
                self._hand(effects)

        work = asyncio.create_task(turn(), name="large submission")
        try:
            while not work.done():
                await self._let_pass(work)
        finally:
            work.cancel()
            await asyncio.wait((work,))
            # A turn that was ended before it began has not answered it.
            submission.refuse()
        await work
        await self._turn(self._inbox.take(TURN_MESSAGES))

    async def _let_pass(self, work: asyncio.Task[None]) -> None:
        """Take in what may pass a submission, or wait for more of that, or for the end of the submission's turn."""
        now = self.now()

        def passes(message: EngineMessage) -> bool:
            return self._farm.may_pass(message.events, now) and not ends_any(message.events, self._shown)

        async with self._committing:
            messages = self._inbox.take_where(passes, PASSING_MESSAGES) if self._farm.lets_pass else []
            if messages:
                with _answering(messages), going_first():
                    with self.meter.timing("core"):
                        facts, effects = self._farm.passing([each for one in messages for each in one.events], now)
                    await self._commit(messages, facts)
                    self._hand(effects)
                return
        if self._inbox.has_where(passes):
            # None may pass at this place of the submission, which is not long.
            await asyncio.sleep(0)
            return
        arrival = asyncio.ensure_future(self._inbox.arrival())
        try:
            await asyncio.wait((work, arrival), return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrival.cancel()

    async def _commit(self, messages: Sequence[EngineMessage], facts: Sequence[Fact]) -> None:
        """Make what follows from messages durable, and show it."""
        await self._store(messages, facts)
        with self.meter.timing("views"):
            await in_slices(self._views.folding(facts))

    async def _show_part(self, facts: Sequence[Fact], start: int) -> None:
        """Show some of what a large submission has made durable: what each fact leaves is whole."""
        part = facts[start : start + SHOWN_FACTS]
        async with self._committing:
            with going_first(), self.meter.timing("views"):
                await in_slices(self._views.folding(part, settle=start + len(part) == len(facts)))

    async def _store(
        self, messages: Sequence[EngineMessage], facts: Sequence[Fact], encoded: Sequence[FrameBody] | None = None
    ) -> None:
        """Make what follows from messages durable."""
        meter = self.meter
        durable = [fact for fact in facts if fact.durable]
        notes = {
            message.submission.submission: message.note
            for message in messages
            if message.submission is not None and message.note is not None and not message.refused
        }
        if durable or notes:
            with meter.timing("journal"):
                await self._journal.append(durable, notes, encoded)
        meter.events += sum(len(message.events) for message in messages)
        meter.durable_facts += len(durable)
        meter.count(durable)

    async def _ask(self, messages: Sequence[EngineMessage], *, grant: bool = True) -> tuple[list[Fact], list[Effect]]:
        """Let the core decide. A submission goes to the core alone: the core may refuse it, and only it."""
        events = [event for message in messages for event in message.events]
        with self.meter.timing("core"):
            try:
                work = self._farm.handling(events or [TimePassed()], self.now(), grant=grant)
                # Without grants it is a large submission, which ends of builds pass.
                return await in_slices(work, can_wait=not grant)
            except SubmissionRefusedError as error:
                _log.warning("a submission was refused: %s", error)
                for message in messages:
                    message.refused = True
                    message.fail(error)
                return [], []


def members_of(facts: Sequence[Fact]) -> frozenset[StepKey]:
    """Return the members that a submission has, or has got, by these facts."""
    found = [fact.members for fact in facts if isinstance(fact, SubmissionAccepted | SubmissionGrew)]
    return frozenset(chain.from_iterable(found))


def ends_any(events: Iterable[Event], steps: frozenset[StepKey]) -> bool:
    """Return whether one of these steps is done by these events."""
    return any(isinstance(event, OutputsPublished) and event.lease.step in steps for event in events)


@contextmanager
def _answering(messages: Sequence[EngineMessage]) -> Iterator[None]:
    """Answer the senders of messages by the end of the block: they are in, or the engine stops."""
    try:
        yield
    except BaseException:
        for message in messages:
            message.refuse()
        raise
    for message in messages:
        message.done()
