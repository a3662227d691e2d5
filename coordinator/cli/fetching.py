"""Fetching of outputs that the farm has built into a store of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from coordinator.api.models import FarmView
from coordinator.cli.evaluation import show_messages
from coordinator.client.closure import LocalStore
from coordinator.client.errors import ClientError
from infra.process import ProcessError, run

#: Seconds for one `nix-store -r`, and how many paths it is given.
FETCH_S: Final = 24 * 3600.0
FETCH_AT_ONCE: Final = 500
MAX_FETCH_OUTPUT_BYTES: Final = 16 * 1024 * 1024
#: Attempts where Nix fails in the database that it keeps of caches: of several programs that meet a cache for the first
#: time, one takes the row away that another writes for. The next attempt finds the row.
TRIES: Final = 8
_OWN_DATABASE: Final = b"SQLite"


async def realise(farm: FarmView, paths: Sequence[str], store: LocalStore, settings: Sequence[str]) -> None:
    """Realise paths in a local store with the farm's cache as the only substituter, whose signatures Nix verifies.

    Raises:
        ClientError: Nix could not.
    """
    options = {
        "substituters": farm.cache_url,
        "trusted-public-keys": " ".join(farm.public_keys),
        "require-sigs": "true",
        "narinfo-cache-negative-ttl": "0",
        "max-jobs": "0",
    }
    words = [word for name, value in options.items() for word in ("--option", name, value)]
    for start in range(0, len(paths), FETCH_AT_ONCE):
        command = ["nix-store", "-r", *paths[start : start + FETCH_AT_ONCE], *store.flags, *settings, *words]
        try:
            tries = 1
            done = await run(command, env=os.environ, timeout_s=FETCH_S, max_output_bytes=MAX_FETCH_OUTPUT_BYTES)
            while done.returncode != 0 and _OWN_DATABASE in done.stderr and tries < TRIES:
                tries += 1
                done = await run(command, env=os.environ, timeout_s=FETCH_S, max_output_bytes=MAX_FETCH_OUTPUT_BYTES)
        except ProcessError as error:
            raise ClientError(f"the outputs are built but could not be fetched: {error}") from None
        if done.returncode != 0:
            show_messages(done.stderr.decode(errors="replace").strip())
            raise ClientError(
                f"the outputs are built but could not be fetched from {farm.cache_url} (Nix's messages are above); "
                "if this machine's Nix daemon does not trust you, add the cache to its nix.conf"
            )
