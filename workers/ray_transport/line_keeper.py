"""The coordinator's line to one agent, kept up beside the calls, which go through Ray while there is none."""

from __future__ import annotations

import asyncio
import logging

from infra.retry import Outage
from workers.ray_transport.line import Line, LineLostError, LineOffer

_log = logging.getLogger(__name__)

#: Seconds from the end of a line, or a try, to the next try.
AGAIN_S = 60.0


class LineKeeper:
    """Has a line, again and again, to where the agent's latest greeting said. Must be closed."""

    def __init__(self) -> None:
        #: None while there is none.
        self.line: Line | None = None
        self._offer: LineOffer | None = None
        self._keeping: asyncio.Task[None] | None = None

    def offered(self, offer: LineOffer | None) -> None:
        """Keep a line to this offer from now on; none: no line."""
        if offer == self._offer and self.line is not None:
            return
        self._offer = offer
        if self._keeping is not None:
            self._keeping.cancel()
        self._keeping = (
            None if offer is None else asyncio.create_task(self._keep(offer), name="keep a line to an agent")
        )

    async def close(self) -> None:
        """End the line."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait((self._keeping,))

    async def _keep(self, offer: LineOffer) -> None:
        outage = Outage(_log, "its calls go through Ray until then", over=f"the line to {offer.host} is back")
        while True:
            try:
                line = await Line.connect(offer)
            except LineLostError as error:
                outage.begin(f"no line to a worker: {error}")
            else:
                outage.end()
                self.line = line
                try:
                    await asyncio.wait((line.ended,))
                finally:
                    self.line = None
                    line.hang_up()
                _log.info("the line to the worker at %s has ended: %s", offer.host, line.ended.result())
            await asyncio.sleep(AGAIN_S)
