"""Directory of a fleet, with the undertaker that removes it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.fleet import undertaker
from tests.support.patience import PATIENCE_S

PREFIX = "drover-fleet-"
#: Short, because a socket's path has at most 107 bytes.
BASE = Path("/tmp")  # noqa: S108 - what is made in it has a random name
#: Held by the keeper and by the undertaker; where nothing holds it, both were killed.
LOCK = "lock"
#: Seconds that the undertaker may take at the end; only ends a keeper that hangs.
CLEARED_WITHIN_S = PATIENCE_S
CHECKOUT = Path(__file__).resolve().parents[2]


class FleetError(Exception):
    """The fleet cannot start, or does not do what it should; the text is one sentence."""


def clear_dead(base: Path = BASE) -> list[Path]:
    """Clear fleets of this user whose keeper and undertaker were both killed; returns their directories."""
    cleared = []
    for root in sorted(base.glob(f"{PREFIX}*")):
        with suppress(OSError), ExitStack() as stack:
            if root.is_symlink() or root.stat().st_uid != os.geteuid():
                continue
            lock = os.open(root / LOCK, os.O_RDWR)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            undertaker.clear(root)
            cleared.append(root)
    return cleared


@contextmanager
def place(base: Path = BASE) -> Iterator[Path]:
    """A directory for a fleet. It and all processes of the fleet are gone after the block, or after this process.

    Raises `FleetError` where something is left.
    """
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # PostgreSQL, which runs as a user of its own where this one is root, has a directory in it.
    root.chmod(0o711)
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Its words and its environment hold no mark of the fleet.
    buried = subprocess.Popen(
        [sys.executable, "-m", undertaker.__name__, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
        pass_fds=(lock,),
        start_new_session=True,
    )
    os.close(lock)
    try:
        yield root
    finally:
        # The end is bounded, and what would interrupt it would only leave more behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        said, _ = buried.communicate(timeout=CLEARED_WITHIN_S)
        left = json.loads(said or b'["its undertaker was killed"]')
        if left:
            raise FleetError(f"something of the fleet is left: {'; '.join(left)}")
