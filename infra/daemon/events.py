"""Events of a running build, picked out of all messages of a daemon.

A connection reports all activities of the daemon process that serves it; only those of the build that was requested
count. Builders can inject free text and activities of their own, so none of this may decide anything: the verdict is
the BuildResult alone.
"""

from collections.abc import Awaitable, Callable

from infra.daemon.values import plain_text
from infra.daemon.wire import (
    ACTIVITY_BUILD,
    RESULT_BUILD_LOG_LINE,
    RESULT_SET_PHASE,
    ActivityStarted,
    LineRun,
    Result,
    Text,
)
from infra.daemon.wire import Message as WireMessage
from infra.records import record


@record(frozen=True, slots=True)
class PrintedLines:
    """So many lines that a builder printed, each with a newline behind it, byte for byte as the daemon gave them.

    How many come at one time is chance. Nix itself applies a carriage return before sending: the text after it
    overwrites the line from its start.
    """

    data: bytes
    count: int


@record(frozen=True, slots=True)
class Phase:
    """The builder entered a phase."""

    name: str


@record(frozen=True, slots=True)
class Message:
    """Text of the daemon, or injected by a builder, beside the log; without terminal escapes and final newline."""

    text: str


BuildEvent = PrintedLines | Phase | Message


class BuildListener:
    """Turns the messages of a connection into the events of one build."""

    __slots__ = ("_activities", "_drv_path", "_on_event")

    def __init__(self, drv_path: str, on_event: Callable[[BuildEvent], Awaitable[object] | None]) -> None:
        self._drv_path = drv_path.encode()
        self._on_event = on_event
        #: Activities that are builds of the derivation; ids are not reused within a connection.
        self._activities: set[int] = set()

    @property
    def began(self) -> bool:
        """True if the daemon has reported that the builder runs."""
        return bool(self._activities)

    def __call__(self, message: WireMessage) -> Awaitable[object] | None:
        """Look at one message and pass on the event that it is, if any; return what the listener wants awaited."""
        if isinstance(message, LineRun):
            if message.activity in self._activities:
                return self._on_event(PrintedLines(message.data, message.count))
        elif isinstance(message, Result):
            if message.activity in self._activities:
                return self._on_result(message)
        elif isinstance(message, Text):
            return self._on_event(Message(plain_text(message.data).rstrip("\n")))
        elif (
            isinstance(message, ActivityStarted)
            and message.type == ACTIVITY_BUILD
            and message.fields[:1] == (self._drv_path,)
        ):
            self._activities.add(message.activity)
        return None

    def _on_result(self, result: Result) -> Awaitable[object] | None:
        text = result.fields[0] if result.fields else None
        if isinstance(text, bytes):
            if result.type == RESULT_BUILD_LOG_LINE:
                return self._on_event(PrintedLines(text + b"\n", 1))
            if result.type == RESULT_SET_PHASE:
                return self._on_event(Phase(plain_text(text)))
        return None
