"""Messages of Nix, read for people: the line that counts, the place that it names, and what is no news."""

from __future__ import annotations

import re
from typing import Final

#: What Nix says that is no news here: the graph is sent before a collector could take it, nothing is built on this
#: machine, two evaluators wait for each other at the store's database, and no person sits before the evaluator.
_NOISE = re.compile(
    r"(?:warning: (?:you did not specify '--add-root'|the group '\w+' specified in 'build-users-group'"
    r"|(?:error: )?SQLite database '[^\n]*' is busy|Git tree '[^\n]*' (?:is dirty|has uncommitted changes))"
    r"|Welcome to Nix |(?:Nix|Lix) \d[^\n]*\nType :\? for help).*\n*"
)
_ERROR_LINE: Final = re.compile(r"^[ \t]*error:[ \t]+(\S.*)$", re.MULTILINE)
_POSITION: Final = re.compile(r"^[ \t]*at (\S.*?:\d+:\d+):?$", re.MULTILINE)
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
#: The evaluator's own file, which is no place of the user's.
_OWN_FILE: Final = "/evaluation/tree.nix:"


def without_noise(text: str) -> str:
    """Return what Nix printed without what is no news."""
    return _NOISE.sub("", text)


def plain(text: str) -> str:
    """Return text without colours."""
    return _ESCAPES.sub("", text)


def error_line(text: str) -> str:
    """Return the first line of Nix's error without its word for it; empty where there is none.

    Newer Nix prints the error last, after an `error:` that stands alone and the trace.
    """
    match = _ERROR_LINE.search(plain(text))
    return match[1].strip().rstrip(".") if match else ""


def last_error_line(text: str) -> str:
    """Return the last line of an error, which is the one that a program ends with; empty where there is none."""
    found = _ERROR_LINE.findall(plain(text))
    return found[-1].strip().rstrip(".") if found else ""


def position(text: str) -> str:
    """Return the first `FILE:LINE:COLUMN` that Nix names and that is not the evaluator's own; empty: it names none."""
    return next((each for each in _POSITION.findall(plain(text)) if _OWN_FILE not in each), "")


def advice(file: str, attr: str, error: str) -> str:
    """Return one sentence: Nix's first error line, and what to do about it."""
    where = f"{attr} of {file}" if attr else file
    if not error:
        return f"the evaluation of {where} failed; Nix's messages are above"
    if re.search("requires lock file changes", error):
        return f"{where} has inputs that its flake.lock lacks; make it with `nix flake lock`, and add it to git"
    if re.search(r"in selection path|attribute .* missing", error):
        return f"{error}; check the names after -A against {file}"
    return f"{error}; correct {where} (Nix's whole message is above)"
