"""Default address and state directory of a coordinator, by which clients find it too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: Loopback only.
HOST: Final = "127.0.0.1"
PORT: Final = 7878
#: Owner of what is submitted with the farm's own token.
OPERATOR: Final = "api"
URL: Final = f"http://{HOST}:{PORT}"


def state_dir() -> Path:
    """Return the state directory: `DROVER_STATE_DIR`, or below the user's own (XDG)."""
    named = os.environ.get("DROVER_STATE_DIR", "")
    return Path(named).expanduser() if named else default_state_dir()


def default_state_dir() -> Path:
    """Return the state directory of a user who names none."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "drover"
