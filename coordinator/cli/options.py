"""What commands share: where the coordinator is, and asking it one thing.

Nothing slow is imported here before a command runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from coordinator.client import ApiClient

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Address:
    """Where the coordinator is and which file holds its token; empty: the usual place."""

    url: str
    token_file: str

    def client(self) -> ApiClient:
        """Return a client, not yet connected."""
        from coordinator.client import ApiClient, find_token  # noqa: PLC0415 - slow to import

        return ApiClient(self.url, find_token(self.token_file))


def addressed(command: _Command) -> _Command:
    """Add the options that say where the coordinator is."""
    url = click.option(
        "--coordinator",
        "url",
        envvar="DROVER_URL",
        default="http://127.0.0.1:7878",
        show_default=True,
        help="Address of the coordinator (DROVER_URL).",
    )
    token = click.option(
        "--token-file",
        default="",
        help="File with the API token (DROVER_TOKEN_FILE); usually api-token in the state directory.",
    )
    return url(token(command))


def asked(url: str, token_file: str, ask: Callable[[ApiClient], Coroutine[Any, Any, int]]) -> int:
    """Ask the coordinator one thing and return the exit status."""

    async def run() -> int:
        async with Address(url, token_file).client() as client:
            return await ask(client)

    return asyncio.run(run())
