"""The API token of a client: from a file that is named, from the environment, or from the default state directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from coordinator.client.errors import BadArgumentError
from coordinator.defaults import state_dir

TOKEN: Final = "DROVER_TOKEN"  # noqa: S105 - the name of a variable
#: The token that was in the environment.
_taken: list[str] = []


def find_token(token: str | None = None) -> str:
    """Return the API token from the file `token`, DROVER_TOKEN, the file DROVER_TOKEN_FILE, or the state directory.

    Returns "" if there is none. DROVER_TOKEN is taken out of the environment: what this program starts would have it
    too, and an evaluation reads its environment with `builtins.getEnv`.

    Raises:
        BadArgumentError: A file that was named cannot be read.
    """
    if itself := os.environ.pop(TOKEN, "").strip():
        _taken[:] = [itself]
    if _taken and not token:
        return _taken[0]
    named = token or os.environ.get("DROVER_TOKEN_FILE", "")
    if named:
        try:
            return Path(named).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text"
            raise BadArgumentError(f"cannot read the token file {named}: {why}") from None
    try:
        return (state_dir() / "api-token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        # Not an error yet: if the coordinator is down, that is the better thing to say.
        return ""
