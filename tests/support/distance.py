"""A distance in front of a TCP server: bytes take a while each way, as they would over a long line.

`python -m tests.support.distance PORT ONE_WAY_MS` prints the port of the relay and serves until it is ended. A new
connection costs a round trip before its first byte, and a window that begins with ten packets and grows with what was
taken bounds what is under way in each direction (slow start). Nothing is lost and the line itself is not bounded. It
stands in for netem, which a kernel may lack.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from functools import partial

import uvloop

#: Ten packets. Source: RFC 6928.
WINDOW_BYTES = 14_600
MAX_WINDOW_BYTES = 4 * 1024 * 1024


class Direction:
    """One direction of one connection."""

    def __init__(self, writer: asyncio.StreamWriter, one_way_s: float) -> None:
        self._writer = writer
        self._one_way_s = one_way_s
        self._window = WINDOW_BYTES
        self._under_way = 0
        self._room = asyncio.Event()
        self._room.set()

    async def pump(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while True:
                await self._room.wait()
                data = await reader.read(min(65536, self._window - self._under_way))
                if not data:
                    break
                self._under_way += len(data)
                if self._under_way >= self._window:
                    self._room.clear()
                loop.call_later(self._one_way_s, self._arrive, data)
        # The end takes as long as what was sent before it.
        await asyncio.sleep(self._one_way_s)
        self._writer.close()

    def _arrive(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)
        asyncio.get_running_loop().call_later(self._one_way_s, self._taken, len(data))

    def _taken(self, size: int) -> None:
        self._under_way -= size
        self._window = min(self._window + size, MAX_WINDOW_BYTES)
        self._room.set()


async def relay(port: int, one_way_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # The client's first bytes leave it only once the server's answer to its greeting has come.
    await asyncio.sleep(2 * one_way_s)
    try:
        upstream, downstream = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(Direction(downstream, one_way_s).pump(reader), Direction(writer, one_way_s).pump(upstream))


async def serve(port: int, one_way_s: float) -> None:
    server = await asyncio.start_server(partial(relay, port, one_way_s), "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
