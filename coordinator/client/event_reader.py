"""Reader of server-sent events."""

from __future__ import annotations

from coordinator.client.errors import ClientError

#: One server-sent event; a snapshot names every running and failed step.
MAX_EVENT_BYTES = 256 * 1024 * 1024
MAX_ID_LENGTH = 64


class EventReader:
    """Cuts a `text/event-stream` into the data of its events; comments and other fields are passed over."""

    def __init__(self, last_id: str = "") -> None:
        #: The newest `id:`, with which a broken stream goes on behind what has come.
        self.last_id = last_id
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of the events that `chunk` completes."""
        self._buffer += chunk
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ClientError(f"the coordinator sent an event of more than {MAX_EVENT_BYTES} bytes")
        whole, mark, rest = bytes(self._buffer).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        if not mark:
            return []
        self._buffer = bytearray(rest)
        events = []
        for block in whole.split(b"\n\n"):
            lines = block.split(b"\n")
            data = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
            for line in lines:
                if line.startswith(b"id:"):
                    self.last_id = line[3:].removeprefix(b" ").decode(errors="replace")[:MAX_ID_LENGTH]
            if data:
                events.append(data)
        return events
