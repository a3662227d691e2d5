"""SIGINT and SIGTERM as events: the first asks for an orderly stop, the second for an end at once."""

from __future__ import annotations

import asyncio
import signal


class StopSignals:
    """The handler of both signals, from `install` on for as long as the running loop lives."""

    def __init__(self) -> None:
        #: Set by the first signal.
        self.stop = asyncio.Event()
        #: Set by the second.
        self.at_once = asyncio.Event()

    @classmethod
    def install(cls) -> StopSignals:
        """Handle the signals of this process from now on; called in a running loop."""
        signals = cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, signals.receive)
        return signals

    def receive(self) -> None:
        """Count one signal."""
        (self.at_once if self.stop.is_set() else self.stop).set()
