"""Options of `drover build` that say what a submission is and what becomes of it, and their values as one record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

import click

from coordinator.api.limits import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_BRANCH,
    MAX_COMMIT,
    MAX_IDEMPOTENCY_KEY,
    MAX_PULL,
)
from coordinator.cli.options import Wait
from coordinator.cli.origin import ClaimedOrigin, TagError, origin_of, parse_tags
from infra.records import record

_Command = TypeVar("_Command", bound=Callable[..., Any])


class PlainText(click.ParamType[str]):
    """A text of one line without control characters, of bounded length."""

    name = "text"

    def __init__(self, most: int, *, ascii_only: bool = False) -> None:
        self._most = most
        self._ascii_only = ascii_only

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text; ends the command with a usage error for one that the farm would refuse."""
        text = str(value)
        if len(text) > self._most:
            self.fail(f"it has {len(text)} characters; at most {self._most} are taken", param, ctx)
        if not text.isprintable() or (self._ascii_only and (not text.isascii() or " " in text)):
            self.fail(f"{text[:40]!r} has characters that are not taken, such as control characters", param, ctx)
        return text


class Tags(click.ParamType[tuple[str, str]]):
    """A tag, as `KEY=VALUE`."""

    name = "tag"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return key and value; ends the command with a usage error for a word that is no tag."""
        try:
            ((key, text),) = parse_tags((str(value),)).items()
        except TagError as error:
            self.fail(str(error), param, ctx)
        return key, text


@record(frozen=True, slots=True)
class SubmissionWords:
    """Words of the command line about a submission."""

    label: str = ""
    origin: ClaimedOrigin = field(default_factory=ClaimedOrigin)
    idempotency_key: str = ""
    priority: int = 0
    supersede: bool = False
    deadline_s: int = 0
    fail_fast: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of `SubmitRequest` of the same names."""
        return {
            "label": self.label,
            "branch": self.origin.branch,
            "pull": self.origin.pull,
            "commit": self.origin.commit,
            "tags": dict(self.origin.tags),
            "idempotency_key": self.idempotency_key,
            "priority": self.priority,
            "supersede": self.supersede,
            "deadline_s": self.deadline_s,
            "fail_fast": self.fail_fast,
        }


_OPTIONS = (
    click.option("--label", default="", help="Shown in lists of submissions."),
    click.option("--branch", type=PlainText(MAX_BRANCH), default="", help="Branch of it.  [default: the CI runner's]"),
    click.option("--pull", type=PlainText(MAX_PULL), default="", help="Pull request.  [default: the CI runner's]"),
    click.option("--commit", type=PlainText(MAX_COMMIT), default="", help="Commit.  [default: the CI runner's]"),
    click.option("--tag", "tags", type=Tags(), multiple=True, metavar="KEY=VALUE", help="Free text; repeatable."),
    click.option(
        "--idempotency-key",
        type=PlainText(MAX_IDEMPOTENCY_KEY, ascii_only=True),
        default="",
        metavar="KEY",
        help="A repeat with the same key watches the submission of the first.",
    ),
)


def _terms_options() -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option(
            "--priority",
            type=click.IntRange(LOWEST_PRIORITY, HIGHEST_PRIORITY),
            default=0,
            help="Of one owner's submissions the higher goes first.",
        ),
        click.option("--supersede", is_flag=True, help="End older ones of the same branch or pull request, and label."),
        click.option("--deadline", "deadline_s", type=Wait(), help="End it after this time.  [default: forever]"),
        click.option("--fail-fast/--keep-going", "fail_fast", help="End it with its first failure.  [--keep-going]"),
    )


def describes(command: _Command) -> _Command:
    """Add the options that say what a submission is."""
    for option in reversed((*_OPTIONS, *_terms_options())):
        command = option(command)
    return command


def taken_words(options: dict[str, Any]) -> SubmissionWords:
    """Take the values of these options out of all of a command's; what they leave out the runner's environment says."""
    try:
        tags = parse_tags(tuple(f"{key}={value}" for key, value in options.pop("tags")))
    except TagError as error:
        raise click.UsageError(str(error)) from None
    said = ClaimedOrigin(options.pop("branch"), options.pop("pull"), options.pop("commit"), tags)
    return SubmissionWords(
        label=options.pop("label"),
        origin=said.over(origin_of(os.environ)),
        idempotency_key=options.pop("idempotency_key"),
        priority=options.pop("priority"),
        supersede=options.pop("supersede"),
        deadline_s=options.pop("deadline_s") or 0,
        fail_fast=options.pop("fail_fast"),
    )
