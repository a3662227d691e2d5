"""Event loop of the core: events in, facts to the journal, effects out. The only owner of the `Farm` and of its time.

One turn: take everything that waits, ask the core once, append the durable facts in one commit, fold all facts into the
views, hand the effects to dispatch, wake those who wait for their event to be durable. The order is the promise:
nothing is shown, acknowledged or done before its facts are durable. A turn that concerns many steps gives the event
loop to others again and again (`slices`); the next one begins when it has ended.

An append waits for a database that is away, for a bounded time. If it fails the engine stops with that error and the
process ends: the core has already moved on, and only a replay brings memory and journal together again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.engine.meter import EngineMeter
from coordinator.engine.replay import replay
from coordinator.errors import UnavailableError
from coordinator.journal.codec import SubmissionNote
from coordinator.journal.journal import Journal
from coordinator.journal.notes import Note
from coordinator.readmodel.views import Views
from infra.clock import Clock
from infra.collector import collector_paused
from infra.slices import in_slices
from scheduler.effects import Effect
from scheduler.events import Event, SealAsked, SubmissionGrown, SubmissionReceived, TimePassed
from scheduler.facts import Fact
from scheduler.farm import Farm
from scheduler.model import Instant, SubmissionId, SubmissionRefusedError

#: Capacity of the inbox in messages; `offer`, `submit` and `post` block while it is full.
INBOX_MESSAGES = 4096
#: Messages of one turn: bounds how long the loop keeps others from running.
TURN_MESSAGES = 1024

#: Events that have a note, and that the core may refuse.
SubmissionEvent = SubmissionReceived | SubmissionGrown | SealAsked

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Message:
    """Events that belong together, and the future of the sender that waits for them."""

    events: tuple[Event, ...]
    safe: asyncio.Future[None] | None = None
    #: Its only event, which the core may refuse, and what the journal keeps beside the facts where it does not.
    submission: SubmissionEvent | None = None
    note: Note | None = None
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
        self._inbox: asyncio.Queue[_Message] = asyncio.Queue(INBOX_MESSAGES)
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
                await self._turn(await self._next_messages())
        finally:
            self._running, self._stopped = False, True
            while not self._inbox.empty():
                _refuse(self._inbox.get_nowait())

    async def offer(self, *events: Event) -> None:
        """Give events to the core; returns once what follows from them is durable. Raises `UnavailableError`."""
        await self._send(_Message(events))

    async def post(self, events: Sequence[Event]) -> None:
        """Give events to the core without waiting for the journal."""
        if events and not self._stopped:
            await self._inbox.put(_Message(tuple(events)))

    async def submit(self, event: SubmissionEvent, note: Note | None = None) -> None:
        """Hand a submission or its growth to the core; returns once what follows from it, and its note, are durable.

        Raises `UnavailableError`, and `SubmissionRefusedError` where the core does not take the graph.
        """
        await self._send(_Message((event,), submission=event, note=note))

    async def _send(self, message: _Message) -> None:
        message.safe = asyncio.get_running_loop().create_future()
        await self._inbox.put(message)
        if self._stopped:
            _refuse(message)
        await message.safe

    async def _next_messages(self) -> list[_Message]:
        """Wait for a message or the core's next deadline; return all messages that wait, at most one turn's."""
        messages: list[_Message] = []
        if self._inbox.empty():
            deadline = self._farm.deadline()
            wait_s = None if deadline is None else max(0.0, deadline - self.now())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    messages.append(await self._inbox.get())
        while len(messages) < TURN_MESSAGES and not self._inbox.empty():
            messages.append(self._inbox.get_nowait())
        return messages

    async def _turn(self, messages: Sequence[_Message]) -> None:
        try:
            await self._take(messages)
        except BaseException:
            for message in messages:
                _refuse(message)
            raise
        for message in messages:
            if message.safe is not None and not message.safe.done():
                message.safe.set_result(None)

    async def _take(self, messages: Sequence[_Message]) -> None:
        meter = self.meter
        with collector_paused(), meter.timing("core"):
            facts, effects = await self._ask(messages)
        durable = [fact for fact in facts if fact.durable]
        notes = {
            message.submission.submission: message.note
            for message in messages
            if message.submission is not None and message.note is not None and not message.refused
        }
        if durable or notes:
            with meter.timing("journal"):
                await self._journal.append(durable, notes)
        with collector_paused(), meter.timing("views"):
            await in_slices(self._views.folding(facts))
        meter.events += sum(len(message.events) for message in messages)
        meter.durable_facts += len(durable)
        meter.count(durable)
        self._hand(effects)

    async def _ask(self, messages: Sequence[_Message]) -> tuple[list[Fact], list[Effect]]:
        """Let the core decide. A submission goes to the core alone: the core may refuse it, and only it."""
        facts: list[Fact] = []
        effects: list[Effect] = []

        async def handle(events: Sequence[Event]) -> None:
            more_facts, more_effects = await in_slices(self._farm.handling(events, self.now()))
            facts.extend(more_facts)
            effects.extend(more_effects)

        plain: list[Event] = []
        for message in messages:
            if message.submission is None:
                plain.extend(message.events)
                continue
            await handle(plain)
            plain = []
            try:
                await handle(message.events)
            except SubmissionRefusedError as error:
                _log.warning("a submission was refused: %s", error)
                message.refused = True
                if message.safe is not None and not message.safe.done():
                    message.safe.set_exception(error)
        await handle(plain or [TimePassed()])
        return facts, effects


def _refuse(message: _Message) -> None:
    if message.safe is not None and not message.safe.done():
        message.safe.set_exception(UnavailableError("the coordinator is stopping; try again once it runs."))
