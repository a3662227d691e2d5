"""Calls that may block for ever, in daemon threads with a deadline: how an event loop talks to a library that waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from workers.wire.fleet import FleetError
from workers.wire.polling import AgentUnavailable

_T = TypeVar("_T")


class BlockingCalls:
    """At most `most` threads may be inside such calls at one time, stuck ones included."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocked = 0

    async def run(self, subject: str, deadline_s: float, call: Callable[[], _T]) -> _T:
        """Return what `call` gives, or raise the `FleetError` that it raises.

        Raises `AgentUnavailable` where it fails otherwise, takes longer, or too many others are stuck already.
        """
        if self._blocked >= self._most:
            raise AgentUnavailable(f"{subject}: {self._blocked} calls are stuck already")
        loop = asyncio.get_running_loop()
        result: asyncio.Future[_T] = loop.create_future()

        def deliver(settle: Callable[[], None]) -> None:
            self._blocked -= 1
            if not result.done():
                settle()

        def work() -> None:
            settle: Callable[[], None]
            try:
                value = call()
            except Exception as error:  # noqa: BLE001 - handed to the waiting task
                failure = error
                settle = lambda: result.set_exception(failure)  # noqa: E731
            else:
                settle = lambda: result.set_result(value)  # noqa: E731
            # The loop may be closed when a stuck call comes back at last.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deliver, settle)

        self._blocked += 1
        threading.Thread(target=work, name=subject, daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s):
                return await result
        except FleetError:
            raise
        except TimeoutError:
            raise AgentUnavailable(f"{subject} took more than {deadline_s:.0f} s") from None
        except Exception as error:
            raise AgentUnavailable(f"{subject}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return an error's first sentence: Ray appends logs and tracebacks."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
