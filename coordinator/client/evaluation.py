"""Nix evaluation on the client: a file and attributes in, derivations out.

One `nix-instantiate` does it, in a process of its own: `roots.nix` finds the derivations as `nix-instantiate` itself
would, writes each to the store, and says with each the attribute that it came from and what its `meta` says of limits.
So a root has its attribute's name and limits whichever way it came about: named with `-A`, a member of a set or of a
list, what a function returns, or the whole file.

`meta.timeout` and `meta.maxSilent` are Hydra's names (seconds); `meta.drover` is an attribute set of `logBytes`,
`outputBytes` and `memoryBytes`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from coordinator.api.limits import MAX_LIMIT
from coordinator.api.requests import RootLimits
from coordinator.errors import CoordinatorError
from infra.nix.store_path import drv_name_of
from infra.process import Completed, ProcessError, ProcessNotFound, ProcessOutputTooLarge, ProcessTimeout, run

#: The expression that finds the derivations of attributes.
ROOTS = Path(__file__).with_name("roots.nix")
TIMEOUT_S = 3600.0
#: Attributes that a sentence names; it counts the rest.
MAX_NAMED = 8
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
#: What nix-instantiate says that is no news here: the graph is sent before a collector could take it, and nothing is
#: built on this machine.
_NOISE = re.compile(
    r"warning: (?:you did not specify '--add-root'|the group '\w+' specified in 'build-users-group').*\n?"
)
_ATTR_NAME = re.compile(r'(?:"[^"]*"|[^."])+')
#: What Nix prints of an attribute's name without quotes.
_BARE_NAME = re.compile(r"[A-Za-z_][-A-Za-z0-9_+]*|[0-9]+")
_PLACE = TypeAdapter(list[int | str])
_ERROR_LINE = re.compile(r"^[ \t]*error:[ \t]+(\S.*)$", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DRV = re.compile(r"(/[^!]+/[0-9a-z]{32}-[^/!]+\.drv)(?:!([^!]+))?")


class EvaluationError(CoordinatorError):
    """There is no derivation to build; the sentence has Nix's own first error line and what to do."""

    code: ClassVar[str] = "evaluation"


@dataclass(frozen=True, slots=True)
class EvaluatedRoot:
    """One derivation that an attribute stands for; `outputs` empty: all of them."""

    #: The attribute's path as `-A` takes it; the derivation's name where the whole file is that derivation.
    attr: str
    #: Full store path.
    drv: str
    outputs: tuple[str, ...] = ()
    #: What its `meta` says; None where it says nothing.
    limits: RootLimits | None = None


def parse_drv(text: str) -> EvaluatedRoot | None:
    """Read `/nix/store/….drv` or `/nix/store/….drv!out,dev`; None if it is neither."""
    match = _DRV.fullmatch(text)
    if match is None:
        return None
    outputs = tuple(match[2].split(",")) if match[2] else ()
    return EvaluatedRoot(drv_name_of(match[1]), match[1], outputs)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An attribute that nothing was built of, though it may hold derivations, as Nix leaves it out."""

    attr: str
    #: Whether it is a set that does not ask to be entered; else its name has characters that Nix passes over.
    is_set: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation of attributes of a file."""

    #: At least one.
    wanted: tuple[EvaluatedRoot, ...]
    left_out: tuple[LeftOut, ...] = ()


class _Row(BaseModel):
    """One entry of what `roots.nix` answers."""

    at: int
    path: tuple[str, ...]
    drv: str = ""
    output: str = ""
    left: str = ""
    limits: RootLimits = RootLimits()

    @field_validator("limits", mode="before")
    @classmethod
    def _bounded(cls, limits: dict[str, int]) -> dict[str, int]:
        """Take a limit that no build can reach for the largest that may be named."""
        return {name: min(limit, MAX_LIMIT) for name, limit in limits.items()}


_ROWS = TypeAdapter(list[_Row])


async def evaluate(
    file: str,
    attrs: Sequence[str],
    *,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    on_stderr: Callable[[str], None] = lambda _text: None,
    timeout_s: float = TIMEOUT_S,
) -> Evaluation:
    """Evaluate `attrs` of `file` (the whole file if there are none) with `nix-instantiate`.

    Args:
        file: Path of the file or its directory, or anything else nix-instantiate takes for one, such as `<nixpkgs>`.
        attrs: Attribute paths.
        flags: Further arguments, such as `--option NAME VALUE` and `--store DIR`.
        env: Environment of the evaluation; ours if None.
        on_stderr: Is given what Nix printed for people, if anything.
        timeout_s: Seconds of wall time.

    Raises:
        EvaluationError: No derivation came of it.
    """
    if not file.startswith("<") and not _is_url(file) and not _exists(file):
        raise EvaluationError(f"{file} does not exist; name the Nix file to evaluate")
    wanted_attrs = list(attrs) or [""]
    token = f"drover-{secrets.token_hex(8)}"
    done = await _run(file, wanted_attrs, token, flags, os.environ if env is None else env, timeout_s)
    places, messages = _split_places(token, _NOISE.sub("", done.stderr.decode(errors="replace")))
    if messages.strip():
        on_stderr(messages)
    if done.returncode != 0:
        raise EvaluationError(explain(file, messages, done.returncode, _place(wanted_attrs, places)))
    try:
        rows = _ROWS.validate_json(done.stdout)
    except ValidationError:
        raise EvaluationError(f"nix-instantiate answered {done.stdout[:200]!r}, which names no derivations") from None
    return _evaluation(file, wanted_attrs, rows)


def _evaluation(file: str, attrs: Sequence[str], rows: Sequence[_Row]) -> Evaluation:
    # One derivation under two names in one set is one root, as for Nix.
    wanted: dict[tuple[int, str, str, RootLimits | None], EvaluatedRoot] = {}
    left_out: dict[str, LeftOut] = {}
    for row in rows:
        attr = _attr(attrs, row)
        if row.left:
            left_out[attr] = LeftOut(attr, row.left == "set")
            continue
        drv = parse_drv(row.drv)
        if drv is None:
            raise EvaluationError(f"{attr or file} has the derivation {row.drv[:200]!r}, which is no path of one")
        outputs = () if row.output == "out" else (row.output,)
        limits = row.limits if row.limits != RootLimits() else None
        root = EvaluatedRoot(attr or drv.attr, drv.drv, outputs, limits)
        wanted.setdefault((row.at, drv.drv, row.output, limits), root)
    if not wanted:
        given = ", ".join(attr for attr in attrs if attr) or "the file"
        names = _some(list(left_out))
        inside = f"; not looked into: {names}" if names else ""
        raise EvaluationError(f"{given} of {file} holds no derivation{inside}; choose an attribute that does with -A")
    return Evaluation(tuple(wanted.values()), tuple(left_out.values()))


def _some(names: Sequence[str]) -> str:
    """Return the first of `names` as one text, with how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def left_out_text(file: str, left_out: Sequence[LeftOut]) -> str:
    """Return the message about attributes that were left out; empty where there are none."""
    if not left_out:
        return ""
    advice = f"-A '{left_out[0].attr}'" if '"' in left_out[0].attr else f"-A {left_out[0].attr}"
    if any(each.is_set for each in left_out):
        advice += " or with recurseForDerivations = true in the set"
    names = _some([each.attr for each in left_out])
    return f"left out of {file}, as Nix leaves them out: {names}; build them with {advice}"


def _attr(attrs: Sequence[str], row: _Row) -> str:
    """Return the attribute path of a row; names with other characters than Nix prints bare stand in quotes."""
    names = [name if _BARE_NAME.fullmatch(name) else f'"{name}"' for name in row.path]
    return ".".join(([attrs[row.at]] if attrs[row.at] else []) + names)


def _split_places(token: str, messages: str) -> tuple[list[str], str]:
    """Take the lines that say which attribute comes next out of what Nix printed."""
    places = re.compile(rf"^trace: {token} (\[.*\])\n?", re.MULTILINE)
    return places.findall(messages), places.sub("", messages)


def _place(attrs: Sequence[str], places: Sequence[str]) -> str:
    """Return the attribute that was being evaluated last."""
    if not places:
        return ""
    try:
        at, *path = _PLACE.validate_json(places[-1])
        return _attr(attrs, _Row(at=int(at), path=tuple(map(str, path))))
    except (ValueError, IndexError):
        return ""


def _is_url(file: str) -> bool:
    return "://" in file or file.startswith("channel:")


def _exists(file: str) -> bool:
    return Path(file).exists()


async def _run(  # noqa: PLR0917 - what one process takes
    file: str, attrs: Sequence[str], token: str, flags: Sequence[str], env: Mapping[str, str], timeout_s: float
) -> Completed:
    arguments = ["--argstr", "drover_token", token]
    arguments += ["--arg", "drover_file", _nix_file(file), "--arg", "drover_attrs", _nix_paths(attrs)]
    try:
        return await run(
            # What it evaluates to is written to the store, as if it were instantiated.
            ["nix-instantiate", "--eval", "--read-write-mode", "--strict", "--json", str(ROOTS), *flags, *arguments],
            env=env,
            timeout_s=timeout_s,
            max_output_bytes=MAX_OUTPUT_BYTES,
        )
    except ProcessNotFound:
        raise EvaluationError("nix-instantiate is not on PATH; install Nix on this machine to evaluate files") from None
    except ProcessTimeout:
        raise EvaluationError(
            f"the evaluation of {file} did not end within {timeout_s:g} s; choose fewer attributes with -A"
        ) from None
    except ProcessOutputTooLarge:
        raise EvaluationError(
            f"the evaluation of {file} printed more than {MAX_OUTPUT_BYTES} bytes; choose fewer attributes with -A"
        ) from None
    except ProcessError as error:
        raise EvaluationError(f"the evaluation of {file} could not be run: {error}") from None


def _nix_file(file: str) -> str:
    """Write what nix-instantiate takes for a file as a Nix expression; `import` refuses a URL."""
    if file.startswith("<"):
        return file
    if _is_url(file):
        return f"(builtins.fetchTarball {_nix_text(file)})"
    return f"(/. + {_nix_text(str(Path(file).absolute()))})"


def _nix_paths(attrs: Sequence[str]) -> str:
    lists = ("[ " + " ".join(_nix_text(name) for name in _split(attr)) + " ]" for attr in attrs)
    return "[ " + " ".join(lists) + " ]"


def _split(attr: str) -> list[str]:
    """Split an attribute path as Nix does: at dots outside double quotes."""
    return [name.replace('"', "") for name in _ATTR_NAME.findall(attr) if name]


def _nix_text(text: str) -> str:
    """Write a string as Nix reads it back."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def explain(file: str, messages: str, status: int, attr: str = "") -> str:
    """Return one sentence: the attribute if it is known, Nix's first error line, and what to do about it."""
    where = f"{attr} of {file}" if attr else file
    match = _ERROR_LINE.search(_ESCAPES.sub("", messages))
    if match is None:
        return f"the evaluation of {where} failed with status {status}; Nix's messages are above"
    line = match[1].strip().rstrip(".")
    if re.search(r"in selection path|attribute .* missing", line):
        return f"{line}; check the names after -A against {file}"
    return f"{line}; correct {where} (Nix's whole message is above)"
