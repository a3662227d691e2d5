"""Inbox of the engine: messages in order of arrival, submissions apart from all else; bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from coordinator.errors import UnavailableError
from coordinator.journal.notes import Note
from scheduler.events import Event, SealAsked, SubmissionGrown, SubmissionReceived

#: Capacity in messages; `put` blocks while it is full.
INBOX_MESSAGES: Final = 4096
#: Steps from which on a submission is taken in beside the ends of builds: some 20 ms of the core.
LARGE_STEPS: Final = 512

#: Events that have a note, and that the core may refuse.
SubmissionEvent = SubmissionReceived | SubmissionGrown | SealAsked


@dataclass(slots=True, eq=False)
class EngineMessage:
    """Events that belong together, and the future of the sender that waits for them."""

    events: tuple[Event, ...]
    safe: asyncio.Future[None] | None = None
    #: Its only event, which the core may refuse, and what the journal keeps beside the facts where it does not.
    submission: SubmissionEvent | None = None
    note: Note | None = None
    refused: bool = False

    @property
    def is_large(self) -> bool:
        """True for a submission of many steps."""
        event = self.submission
        return isinstance(event, SubmissionReceived | SubmissionGrown) and (
            len(event.steps) + len(event.held) + len(event.roots) > LARGE_STEPS
        )

    def done(self) -> None:
        """Answer its sender: all that follows from it is durable."""
        if self.safe is not None and not self.safe.done():
            self.safe.set_result(None)

    def fail(self, error: Exception) -> None:
        """It was not taken in."""
        if self.safe is not None and not self.safe.done():
            self.safe.set_exception(error)

    def refuse(self) -> None:
        """The engine takes nothing in any more."""
        self.fail(UnavailableError("the coordinator is stopping; try again once it runs."))


class EngineInbox:
    """Messages that wait for the engine."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(INBOX_MESSAGES)
        self._plain: deque[EngineMessage] = deque()
        self._submissions: deque[EngineMessage] = deque()
        self._arrived = asyncio.Event()

    async def put(self, message: EngineMessage) -> None:
        """Queue a message, once there is room."""
        await self._room.acquire()
        (self._plain if message.submission is None else self._submissions).append(message)
        self._arrived.set()

    async def filled(self, wait_s: float | None) -> None:
        """Wait until there is a message, at most so many seconds."""
        if self._plain or self._submissions:
            return
        self._arrived.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._arrived.wait()

    async def arrival(self) -> None:
        """Wait for a message that `has_where` has not seen."""
        await self._arrived.wait()

    def has_where(self, passes: Callable[[EngineMessage], bool]) -> bool:
        """Return whether a message but a submission passes."""
        self._arrived.clear()
        return any(map(passes, self._plain))

    def take(self, most: int) -> list[EngineMessage]:
        """Return and forget the oldest messages but submissions."""
        return [self._taken(self._plain.popleft()) for _ in range(min(most, len(self._plain)))]

    def take_where(self, passes: Callable[[EngineMessage], bool], most: int) -> list[EngineMessage]:
        """Return and forget the oldest messages that pass, but submissions."""
        found: list[EngineMessage] = []
        for message in self._plain:
            if len(found) < most and passes(message):
                found.append(message)
        if found:
            gone = set(map(id, found))
            self._plain = deque(message for message in self._plain if id(message) not in gone)
        return list(map(self._taken, found))

    @property
    def has_submission(self) -> bool:
        """True if a submission waits."""
        return bool(self._submissions)

    def take_submission(self) -> EngineMessage | None:
        """Return and forget the oldest submission."""
        return self._taken(self._submissions.popleft()) if self._submissions else None

    def take_all(self) -> list[EngineMessage]:
        """Return and forget everything."""
        messages = self.take(len(self._plain))
        while (message := self.take_submission()) is not None:
            messages.append(message)
        return messages

    def _taken(self, message: EngineMessage) -> EngineMessage:
        self._room.release()
        return message
