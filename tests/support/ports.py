"""Free TCP ports of 127.0.0.1, for servers that listen a moment later and perhaps again after a restart."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import tempfile
from pathlib import Path

#: Below the ports that Linux and macOS give to connections, of which Ray opens hundreds: nothing takes one of these
#: between the choice and the server's start.
PORTS = range(20_000, 32_768)
#: Ports that a process takes at one time. Those of its blocks are its own until it ends, so that tests that run side by
#: side never choose one port before either of them listens: with a thousand choices in a run that happens.
BLOCK = 64
#: Locks of blocks, which end with the process that holds them, however it ends.
LOCKS = Path(tempfile.gettempdir(), f"drover-test-ports-{os.getuid()}")
#: Ports of this process's blocks that were not returned yet.
_left: list[int] = []
#: Descriptors of the locks.
_locks: list[int] = []
_of: list[int] = []


def free_port() -> int:
    """Return a port that is free now, was not returned to this process before, and is no other process's."""
    if _of != [os.getpid()]:
        # A copy of the process that chose, whose ports they are.
        _of[:] = [os.getpid()]
        _left.clear()
    while True:
        if not _left:
            _left.extend(_take_block())
        port = _left.pop()
        # What an earlier run left may listen.
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _take_block() -> list[int]:
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    starts = list(PORTS[::BLOCK])
    while starts:
        start = starts.pop(secrets.randbelow(len(starts)))
        lock = os.open(LOCKS / str(start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _locks.append(lock)
        return [port for port in range(start, start + BLOCK) if port in PORTS]
    raise RuntimeError(f"processes of tests hold all blocks of ports; see {LOCKS}")
