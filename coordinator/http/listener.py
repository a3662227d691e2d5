"""The listening socket of the coordinator, and the address under which clients on this machine find it."""

from __future__ import annotations

import socket
from typing import Final

from coordinator.config import ConfigError

#: Connections that the kernel keeps until they are accepted.
BACKLOG: Final = 512


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --listen."
        ) from None


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL of a socket that listens on `host`."""
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
