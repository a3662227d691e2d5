"""Options that commands share, and one call of the API against the coordinator that they name.

Nothing slow is imported here before a command runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from coordinator.api.limits import MAX_WAIT_S
from coordinator.cli.ci import Ci
from coordinator.defaults import URL
from infra.records import record

if TYPE_CHECKING:
    from coordinator.client.api_client import ApiClient

_Command = TypeVar("_Command", bound=Callable[..., Any])

_BYTES_SHIFT: Final = {"M": 20, "G": 30, "T": 40}
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


class Wait(click.ParamType[int]):
    """A time to wait in seconds, said as `90`, `15m`, `36h`, `7d`; 0 for `forever`."""

    name = "wait"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002  click's
        """Return what help shows in the place of the value."""
        return "DURATION|forever"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the seconds; ends the command with a usage error for anything else."""
        if value == "forever":
            return 0
        match = re.fullmatch(r"([0-9]{1,12})([smhd]?)", str(value), re.ASCII)
        wait_s = int(match[1]) * _UNITS_S[match[2]] if match else 0
        if not 0 < wait_s <= MAX_WAIT_S:
            self.fail(f"{value!r} is no time to wait: say seconds (90), 15m, 36h, 7d or forever", param, ctx)
        return wait_s


class Bytes(click.ParamType[int]):
    """A number of bytes, said as `500M`, `10G`, `1T`."""

    name = "bytes"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002  click's
        """Return what help shows in the place of the value."""
        return "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes; ends the command with a usage error for anything else."""
        match = re.fullmatch(r"([0-9]{1,6})([MGT])", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no size: say 500M, 10G or 1T", param, ctx)
        return int(match[1]) << _BYTES_SHIFT[match[2]]


class Systems(click.ParamType[tuple[str, ...]]):
    """Names of systems, as `x86_64-linux,aarch64-darwin` or `all`."""

    name = "systems"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return each system once; ends the command with a usage error for a word that is none."""
        from coordinator.evaluation.systems import parse_systems  # noqa: PLC0415 - only for this option

        if not value:
            return ()
        try:
            return parse_systems(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Name(click.ParamType[str]):
    """A name that is not empty: the API has other answers at the address without one."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; ends the command with a usage error for an empty one."""
        text = str(value)
        if not text.strip():
            self.fail("the name is empty; `drover status` lists submissions, `drover workers` workers", param, ctx)
        return text


@record(frozen=True, slots=True)
class Address:
    """Address of the coordinator and the file that holds its token; empty: the default."""

    url: str
    token_file: str

    def client(self) -> ApiClient:
        """Return a client, not yet connected."""
        from coordinator.client.api_client import ApiClient  # noqa: PLC0415 - slow to import
        from coordinator.client.token import find_token  # noqa: PLC0415

        client = ApiClient(self.url, find_token(self.token_file))
        client.on_lost = lambda why: click.echo(f"drover: {why}; trying again", err=True)
        return client


def addressed(command: _Command) -> _Command:
    """Add the options that say where the coordinator is."""
    url = click.option(
        "--coordinator",
        "url",
        envvar="DROVER_URL",
        default=URL,
        show_default=True,
        help="Address of the coordinator (DROVER_URL).",
    )
    token = click.option(
        "--token-file",
        default="",
        help="File with the API token (DROVER_TOKEN_FILE; the token itself: DROVER_TOKEN); usually api-token in the "
        "state directory.",
    )
    return url(token(command))


#: Names of what `evaluated` adds.
EVALUATION_OPTIONS = ("evaluators", "memory_mib", "timeout_s", "evaluator", "eval_cache", "no_ifd", "impure")


def evaluated(command: _Command) -> _Command:
    """Add the options that say how something is evaluated, and what that may take of this machine."""
    options = (
        click.option("--eval-workers", "evaluators", type=click.IntRange(1, 256), help="Evaluators side by side."),
        click.option(
            "--eval-memory",
            "memory_mib",
            type=click.IntRange(64),
            metavar="MIB",
            help="Memory of all evaluators together.",
        ),
        click.option(
            "--eval-timeout",
            "timeout_s",
            type=Wait(),
            default="30m",
            help="How long one attribute may take.  [30m]",
        ),
        click.option(
            "--evaluator",
            type=click.Choice(["auto", "nix-eval-jobs", "own"]),
            default="auto",
            show_default=True,
            help="Program that evaluates; auto: nix-eval-jobs if it is on PATH.",
        ),
        click.option("--eval-cache/--no-eval-cache", default=True, help="Use and keep findings.  [default: yes]"),
        click.option("--no-ifd", is_flag=True, help="Refuse imports from derivations, which else the farm builds."),
        click.option(
            "--impure", is_flag=True, help="Let a flake see the environment and files outside of it; kept nowhere."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def sectioned(command: _Command) -> _Command:
    """Add the options that say how a job of continuous integration shows what happens."""
    summary = click.option(
        "--summary",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="GITHUB_STEP_SUMMARY",
        help="Add a summary in Markdown to this file at the end (GITHUB_STEP_SUMMARY).",
    )
    sections = click.option(
        "--ci",
        type=click.Choice(Ci, case_sensitive=False),
        envvar="DROVER_CI",
        help="Fold logs of failed steps as this runner does (DROVER_CI).  [default: the one that runs this command]",
    )
    return sections(summary(command))


def run_with_client(url: str, token_file: str, ask: Callable[[ApiClient], Coroutine[Any, Any, int]]) -> int:
    """Ask the coordinator one thing and return the exit status."""
    import asyncio  # noqa: PLC0415 - slow to import, and help asks nothing

    async def run() -> int:
        async with Address(url, token_file).client() as client:
            return await ask(client)

    return asyncio.run(run())
