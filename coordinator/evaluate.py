"""Nix evaluation on the client: a file and attributes in, derivations out.

`nix-instantiate` does it, in a process of its own, once for all attributes. Its output has one line for each derivation
and does not say which attribute it came from; attributes that stand for several derivations are told apart by asking
once for each attribute, which happens only when the numbers do not match.

Limits that packages set for themselves are asked for after it, in a process that instantiates nothing; where that fails
there are none. `meta.timeout` and `meta.maxSilent` are Hydra's names (seconds); `meta.drover` is an attribute set of
`logBytes`, `outputBytes` and `memoryBytes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import orjson

from coordinator.errors import CoordinatorError
from coordinator.limits import MAX_LIMIT, StepLimits
from infra.process import ProcessError, ProcessNotFound, ProcessOutputTooLarge, ProcessTimeout, run

#: The expression that finds the limits.
META = Path(__file__).with_name("meta.nix")
TIMEOUT_S = 3600.0
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
#: What nix-instantiate says that is no news here: the graph is sent before anybody could collect it, and nothing is
#: built on this machine.
_NOISE = re.compile(
    r"warning: (?:you did not specify '--add-root'|the group '\w+' specified in 'build-users-group').*\n?"
)
_ATTR_NAME = re.compile(r'(?:"[^"]*"|[^."])+')
_ERROR_LINE = re.compile(r"^[ \t]*error:[ \t]+(\S.*)$", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DRV = re.compile(r"(/[^!]+/[0-9a-z]{32}-[^/!]+\.drv)(?:!([^!]+))?")


class EvaluationError(CoordinatorError):
    """There is no derivation to build; the sentence has Nix's own first error line and what to do."""

    code: ClassVar[str] = "evaluation"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One derivation that an attribute stands for; `outputs` empty: all of them."""

    attr: str
    #: Full store path.
    drv: str
    outputs: tuple[str, ...] = ()
    #: What its `meta` says; None where it says nothing.
    limits: StepLimits | None = None


def parse_drv(text: str) -> Wanted | None:
    """Read `/nix/store/….drv` or `/nix/store/….drv!out,dev`; None if it is neither."""
    match = _DRV.fullmatch(text)
    if match is None:
        return None
    outputs = tuple(match[2].split(",")) if match[2] else ()
    return Wanted(drv_name(match[1]), match[1], outputs)


def drv_name(drv: str) -> str:
    """Return the name in a .drv path: without directory, hash and `.drv`."""
    return drv.rpartition("/")[2][33:].removesuffix(".drv")


async def evaluate(
    file: str,
    attrs: Sequence[str],
    *,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    on_stderr: Callable[[str], None] = lambda _text: None,
    timeout_s: float = TIMEOUT_S,
) -> list[Wanted]:
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
    if not file.startswith("<") and "://" not in file and not _exists(file):
        raise EvaluationError(f"{file} does not exist; name the Nix file to evaluate")
    how = _How(file, tuple(flags), os.environ if env is None else env, timeout_s)
    wanted = await _instantiate(how, attrs, on_stderr)
    # One after the other: two Nix processes that make a new store at the same time fail at it.
    limits = await _limits(how, attrs or [""])
    if len(wanted) == len(limits):
        # Only then it is known which derivation an attribute's `meta` belongs to.
        pairs = zip(wanted, limits, strict=True)
        wanted = [replace(each, limits=said if said != StepLimits() else None) for each, said in pairs]
    if len(attrs) <= 1 or len(wanted) == len(attrs):
        return _named(wanted, attrs)
    named: list[Wanted] = []
    for attr in attrs:
        again = await _instantiate(how, [attr], lambda _text: None)
        named += _named(again, [attr])
    return named


def _named(wanted: Sequence[Wanted], attrs: Sequence[str]) -> list[Wanted]:
    """Call each derivation by its attribute; several of one attribute get a number, those of none keep their name."""
    if not attrs:
        return list(wanted)
    if len(attrs) == len(wanted):
        return [replace(each, attr=attr) for attr, each in zip(attrs, wanted, strict=True)]
    return [replace(each, attr=f"{attrs[0]}.{number}") for number, each in enumerate(wanted, 1)]


@dataclass(frozen=True, slots=True)
class _How:
    file: str
    flags: tuple[str, ...]
    env: Mapping[str, str]
    timeout_s: float


def _exists(file: str) -> bool:
    return Path(file).exists()


async def _instantiate(how: _How, attrs: Sequence[str], on_stderr: Callable[[str], None]) -> list[Wanted]:
    file = how.file
    selection = [word for attr in attrs for word in ("-A", attr)]
    # A file called "-A" must not become an option.
    name = f"./{file}" if file.startswith("-") else file
    try:
        done = await run(
            ["nix-instantiate", name, *selection, *how.flags],
            env=how.env,
            timeout_s=how.timeout_s,
            max_output_bytes=MAX_OUTPUT_BYTES,
        )
    except ProcessNotFound:
        raise EvaluationError("nix-instantiate is not on PATH; install Nix on this machine to evaluate files") from None
    except ProcessTimeout:
        raise EvaluationError(
            f"the evaluation of {file} did not end within {how.timeout_s:g} s; choose fewer attributes with -A"
        ) from None
    except ProcessOutputTooLarge:
        raise EvaluationError(
            f"the evaluation of {file} printed more than {MAX_OUTPUT_BYTES} bytes; choose fewer attributes with -A"
        ) from None
    except ProcessError as error:
        raise EvaluationError(f"the evaluation of {file} could not be run: {error}") from None
    messages = _NOISE.sub("", done.stderr.decode(errors="replace"))
    if messages.strip():
        on_stderr(messages)
    if done.returncode != 0:
        raise EvaluationError(explain(file, messages, done.returncode))
    wanted = []
    for line in done.stdout.decode(errors="replace").splitlines():
        each = parse_drv(line.strip())
        if each is None:
            raise EvaluationError(f"nix-instantiate printed {line[:200]!r}, which names no derivation")
        wanted.append(each)
    if not wanted:
        what = ", ".join(attrs) or "the file"
        raise EvaluationError(f"{what} of {file} holds no derivation; choose an attribute that does with -A")
    return wanted


async def _limits(how: _How, attrs: Sequence[str]) -> list[StepLimits]:
    """Return what the `meta` of each attribute says; an empty list where that cannot be had."""
    told = ["--arg", "drover_file", _nix_file(how.file), "--arg", "drover_attrs", _nix_paths(attrs)]
    flags = [*how.flags, *told]
    try:
        done = await run(
            ["nix-instantiate", "--eval", "--strict", "--json", str(META), *flags],
            env=how.env,
            timeout_s=how.timeout_s,
            max_output_bytes=MAX_OUTPUT_BYTES,
        )
        rows = orjson.loads(done.stdout) if done.returncode == 0 else []
        return [StepLimits(**{name: min(int(value), MAX_LIMIT) for name, value in row.items()}) for row in rows]
    except (ProcessError, ValueError, KeyError, TypeError):
        # The evaluation itself says what is wrong; a limit is not worth a second error.
        return []


def _nix_file(file: str) -> str:
    """Write what nix-instantiate takes for a file as a Nix expression; `import` refuses a URL."""
    if file.startswith("<"):
        return file
    return _nix_text(file) if "://" in file else f"(/. + {_nix_text(str(Path(file).absolute()))})"


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


def explain(file: str, messages: str, status: int) -> str:
    """Return one sentence: Nix's first error line and what to do about it."""
    match = _ERROR_LINE.search(_ESCAPES.sub("", messages))
    if match is None:
        return f"the evaluation of {file} failed with status {status}; Nix's messages are above"
    line = match[1].strip().rstrip(".")
    if re.search(r"attribute .* (in selection path|missing)", line):
        return f"{line}; check the names after -A against {file}"
    return f"{line}; correct {file} (Nix's whole message is above)"
