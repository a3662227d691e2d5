"""Completion of names by shells: asks the farm, and is silent where that does not answer at once.

Nothing slow is imported before a name is completed; a shell waits for each of these programs while a person types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

import click

from coordinator.cli.options import Address
from coordinator.defaults import URL
from coordinator.errors import CoordinatorError
from coordinator.terminal_controls import harmless

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Seconds after which a farm completes nothing.
ANSWER_S: Final = 1.0
SHELLS: Final = ("bash", "zsh", "fish")
#: Values that are offered: what a shell takes as it stands. It puts what it completes into the line unquoted.
_UNQUOTED: Final = re.compile("[A-Za-z0-9+._?=@:/,-]+")
_VARIABLE: Final = "_DROVER_COMPLETE"

Kind = Literal["steps", "submissions", "workers"]


def completes(*kinds: Kind) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what click asks for the completions of an argument that names such things."""

    def complete(context: click.Context, _parameter: click.Parameter, beginning: str) -> list[CompletionItem]:
        import asyncio  # noqa: PLC0415 - slow to import

        words = context.params
        address = Address(words.get("url") or URL, words.get("token_file") or "")
        try:
            return asyncio.run(_ask(address, kinds, beginning))
        except (CoordinatorError, OSError, TimeoutError):
            return []

    return complete


async def _ask(address: Address, kinds: tuple[Kind, ...], beginning: str) -> list[CompletionItem]:
    import asyncio  # noqa: PLC0415 - slow to import

    from click.shell_completion import CompletionItem  # noqa: PLC0415

    async with asyncio.timeout(ANSWER_S), address.client() as client:
        answer = await client.completions(kinds, beginning)
    # One line each: a shell's script reads values and helps line by line.
    return [
        CompletionItem(item.value, help=" ".join(harmless(item.help).split()))
        for item in answer.items
        if _UNQUOTED.fullmatch(item.value)
    ]


def script(command: click.Command, shell: str) -> str:
    """Return what a shell runs once so that it completes `drover`."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - for this command alone

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"{shell} is none of {', '.join(SHELLS)}")
    return kind(command, {}, "drover", _VARIABLE).source()
