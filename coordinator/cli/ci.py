"""Output for the logs of continuous integration: folded sections, annotations, and nothing that a runner would obey.

Runners read commands out of what a program prints: GitHub's (and Gitea's and Forgejo's) those at the beginning of a
line (`::endgroup::`) and anywhere in it (`##[group]`), Azure's and TeamCity's likewise. A build's log, a name and a
message are written by strangers; `defused` keeps their text and breaks the commands in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

#: A command at the beginning of a line, behind white space too; and those that are found anywhere.
_AT_START: Final = re.compile(r"^(\s*)::", re.MULTILINE)
_ANYWHERE: Final = re.compile(r"##(?=\[|vso\[|teamcity\[)", re.IGNORECASE)
_NO_SECTION_NAME: Final = re.compile(r"[^A-Za-z0-9_]")


class Ci(StrEnum):
    """Kinds of runners whose logs fold."""

    GITHUB = "github"
    GITLAB = "gitlab"
    NONE = "none"


def detected(environment: Mapping[str, str]) -> Ci:
    """Return the runner that this program is started by."""
    if environment.get("GITHUB_ACTIONS") == "true":
        return Ci.GITHUB
    return Ci.GITLAB if environment.get("GITLAB_CI") else Ci.NONE


def defused(text: str) -> str:
    """Return text in which no runner finds a command; without one it is the same."""
    if "::" in text:
        text = _AT_START.sub(r"\1: :", text)
    return _ANYWHERE.sub("# #", text) if "##" in text else text


def verdict(ci: Ci, title: str, sentence: str) -> str:
    """Return the line that says that something failed, as an annotation where the runner has such."""
    if ci is Ci.GITHUB:
        return f"::error title={_property(title)}::{_data(sentence)}"
    return sentence


def section(ci: Ci, key: str, title: str, text: str, now: float) -> str:
    """Return lines (each with its newline) as a section that the runner folds; `key` distinguishes sections."""
    match ci:
        case Ci.GITHUB:
            return f"::group::{_data(title)}\n{text}::endgroup::\n"
        case Ci.GITLAB:
            name = _NO_SECTION_NAME.sub("_", key)
            start = f"\x1b[0Ksection_start:{now:.0f}:{name}\r\x1b[0K{title}\n"
            return f"{start}{text}\x1b[0Ksection_end:{now:.0f}:{name}\r\x1b[0K\n"
        case Ci.NONE:
            return text


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
