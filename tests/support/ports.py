"""Free TCP ports of 127.0.0.1, for servers that listen a moment later and perhaps again after a restart."""

from __future__ import annotations

import secrets
import socket

#: Below the ports that Linux and macOS give to connections, of which Ray opens hundreds: nothing takes one of these
#: between the choice and the server's start. Processes of tests that run side by side choose at random.
PORTS = range(20_000, 32_768)
_given: set[int] = set()


def free_port() -> int:
    """Return a port that is free now and was not returned to this process before."""
    while True:
        port = secrets.choice(PORTS)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
