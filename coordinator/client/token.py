"""The API token of a client: from a file that is named, or from the default state directory."""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.client.errors import BadArgumentError
from coordinator.defaults import state_dir


def find_token(token: str | None = None) -> str:
    """Return the API token from the file `token`, `DROVER_TOKEN_FILE`, or the default state directory; "" if none.

    Raises:
        ClientError: A file that was named cannot be read.
    """
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
