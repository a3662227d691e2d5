"""Requests of a person for builds, as sources of an evaluation or as derivations that are there already."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from coordinator.evaluation.cache import EvaluationCache
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.findings import findings_of, gathered
from coordinator.evaluation.import_store import ImportBuilds
from coordinator.evaluation.lines import findings_of_line, read_attrs
from coordinator.evaluation.messages import advice, error_line, without_noise
from coordinator.evaluation.model import (
    MAX_NAMED,
    AttrPlace,
    EvaluatedRoot,
    Evaluation,
    FailedAttr,
    Finding,
    parse_drv,
    some,
)
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source import NixValue, TreeOrigin, file_expression, is_flake, is_url, sources_of
from coordinator.evaluation.source_plan import EvaluationMeans, EvaluatorChoice
from infra.process import ProcessError, ProcessNotFound, run
from infra.records import record

if TYPE_CHECKING:
    from io import BufferedReader

#: Name of standard input among files and attributes.
STDIN: Final = "-"
#: A hundred thousand lines of nix-eval-jobs.
MAX_STDIN_BYTES: Final = 256 * 1024 * 1024
#: Bytes of standard input that are read at one time, at most.
_STDIN_PIECE_BYTES: Final = 64 * 1024
#: Seconds for Nix to read an expression, and for it to say which system this is.
_PARSE_S: Final = 60.0
_MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024


@record(frozen=True, slots=True)
class Inputs:
    """A request: either `files` (a file, a flake's output, derivations, or standard input) or `expression`."""

    files: tuple[str, ...] = ()
    expression: str = ""
    attrs: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    #: For the evaluation: `--arg`, `--argstr`, `-I`, `--option`, `--store`.
    flags: tuple[str, ...] = ()
    #: Whether a flake may look at more than itself, as with `nix build --impure`.
    impure: bool = False

    @property
    def name(self) -> str:
        """The name that people call it by."""
        return self.files[0] if self.files else "the expression"


async def evaluation_of(
    inputs: Inputs,
    limits: PoolLimits,
    *,
    env: Mapping[str, str],
    on_messages: Callable[[str], None],
    choice: EvaluatorChoice = EvaluatorChoice.AUTO,
    cache: EvaluationCache | None = None,
    imports: ImportBuilds | None = None,
) -> Evaluation:
    """Evaluate what is asked for, with the means that `EvaluationMeans` describes.

    Raises:
        EvaluationError: There is no derivation to build.
    """
    means = EvaluationMeans(limits, env, on_messages, choice, cache, imports)
    async with aclosing(findings_asked(inputs, means)) as findings:
        given = gathered([each async for each in findings])
    require_some(inputs, given, on_messages)
    return given


def require_some(inputs: Inputs, given: Evaluation, on_messages: Callable[[str], None]) -> None:
    """Raise `EvaluationError` where there is no derivation to build."""
    if not given.wanted:
        for each in given.failed[:MAX_NAMED]:
            on_messages(each.text)
        raise EvaluationError(_nothing(inputs, given))


async def findings_asked(inputs: Inputs, means: EvaluationMeans) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate what is asked for; gives each finding with its place as soon as it is there, in no order.

    Raises:
        EvaluationError: What is asked for is not there, or no evaluator can be started.
    """
    if inputs.files == (STDIN,):
        findings = _findings_of_stdin()
    elif (drvs := _given(inputs)) is not None:
        for number, root in enumerate(drvs):
            yield AttrPlace(0, number), root
        return
    else:
        findings = findings_of(await _sources(inputs, means.env, means.on_messages), means)
    async with aclosing(findings):
        async for each in findings:
            yield each


async def _findings_of_stdin() -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Read standard input, each line as it comes; what came before under its name does not come again."""
    seen: set[Finding] = set()
    number = 0
    async with aclosing(_lines_of_stdin()) as lines:
        async for line in lines:
            number += 1
            for finding in findings_of_line(number, line.decode(errors="replace")):
                if finding not in seen:
                    seen.add(finding)
                    yield AttrPlace(0, number), finding


async def _lines_of_stdin() -> AsyncGenerator[bytes]:
    """Read lines, as many at one time as are there. Raises `EvaluationError` where there are too many bytes."""
    read_bytes = 0
    begun: list[bytes] = []
    while piece := await _next_piece():
        read_bytes += len(piece)
        if read_bytes > MAX_STDIN_BYTES:
            raise _too_much()
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = b"".join([*begun, lines[0]])
            begun.clear()
        begun.append(rest)
        for line in lines:
            yield line
    if any(begun):
        yield b"".join(begun)


def _settle(piece: asyncio.Future[bytes], data: bytes) -> None:
    if not piece.done():
        piece.set_result(data)


async def _next_piece() -> bytes:
    """Read what is there in a thread that ends with the program, however long standard input says nothing."""
    loop = asyncio.get_running_loop()
    piece: asyncio.Future[bytes] = loop.create_future()
    stdin = cast("BufferedReader", sys.stdin.buffer)

    def read() -> None:
        data = stdin.read1(_STDIN_PIECE_BYTES)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, piece, data)

    threading.Thread(target=read, daemon=True).start()
    return await piece


def _nothing(inputs: Inputs, evaluation: Evaluation) -> str:
    """Return why there is nothing to build."""
    if evaluation.failed:
        failed: FailedAttr = evaluation.failed[0]
        others = len(evaluation.failed) - 1
        more = f" ({others} other attribute{'s' * (others > 1)} failed too)" if others else ""
        return advice(inputs.name, failed.attr, failed.error) + more
    asked = ", ".join(inputs.attrs) or "the value"
    names = some([each.attr for each in evaluation.left_out])
    inside = f"; not looked into: {names}" if names else ""
    return f"{asked} of {inputs.name} holds no derivation{inside}; choose an attribute that does with -A"


def _given(inputs: Inputs) -> list[EvaluatedRoot] | None:
    """Return the derivations that are named themselves; None where something is to be evaluated."""
    drvs = [each for each in map(parse_drv, inputs.files) if each is not None]
    if drvs and len(drvs) == len(inputs.files):
        return drvs
    for file in inputs.files:
        if file.partition("!")[0].endswith(".drv"):
            raise EvaluationError(f"{file} is not the full path of a derivation in a Nix store")
    if len(inputs.files) > 1:
        raise EvaluationError(f"{inputs.files[1]} is one file too many; choose several things to build with -A")
    return None


def _stdin_lines() -> list[str]:
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise _too_much()
    return data.decode(errors="replace").splitlines()


def _too_much() -> EvaluationError:
    return EvaluationError(f"standard input has more than {MAX_STDIN_BYTES} bytes; build it in several parts")


async def _sources(inputs: Inputs, env: Mapping[str, str], on_messages: Callable[[str], None]) -> list[NixValue]:
    if inputs.files and is_flake(inputs.files[0]) and not await asyncio.to_thread(Path(inputs.files[0]).exists):
        from coordinator.evaluation.flakes import flake_sources  # noqa: PLC0415 - slow to import

        systems = inputs.systems or (await _this_system(inputs.flags, env),)
        flakes = await flake_sources(inputs.files[0], systems, flags=inputs.flags, env=env, on_messages=on_messages)
        return [replace(each, origin=None) for each in flakes] if inputs.impure else flakes
    attrs = inputs.attrs
    if STDIN in attrs:
        named = read_attrs(await asyncio.to_thread(_stdin_lines))
        attrs = tuple(attr for each in attrs for attr in (named if each == STDIN else (each,)))
    expressions = [inputs.flags[at + 2] for at, word in enumerate(inputs.flags) if word == "--arg"]
    for text in (inputs.expression, *expressions):
        if text:
            await _parse(text, env)
    origin: TreeOrigin | None = None
    if inputs.expression:
        expression, origin = inputs.expression, TreeOrigin(Path.cwd())
    else:
        file = inputs.files[0]
        if not file.startswith("<") and not is_url(file) and not await asyncio.to_thread(Path(file).exists):
            raise EvaluationError(f"{file} does not exist; name the Nix file to evaluate")
        expression = await asyncio.to_thread(file_expression, file)
        if not file.startswith("<") and not is_url(file):
            origin = TreeOrigin(await asyncio.to_thread(_directory, file))
    return sources_of(inputs.name, expression, attrs, flags=inputs.flags, systems=inputs.systems, origin=origin)


def _directory(file: str) -> Path:
    path = Path(file).absolute()
    return path if path.is_dir() else path.parent


async def _parse(expression: str, env: Mapping[str, str]) -> None:
    """Refuse an expression that cannot be read, before it could swallow what an evaluator is asked after it."""
    await _nix(["nix-instantiate", "--parse", "-E", expression], env)


async def _this_system(flags: Sequence[str], env: Mapping[str, str]) -> str:
    answer = await _nix(["nix-instantiate", "--eval", "-E", "builtins.currentSystem", *flags], env)
    return answer.strip().strip('"')


async def _nix(command: Sequence[str], env: Mapping[str, str]) -> str:
    try:
        done = await run(command, env=env, timeout_s=_PARSE_S, max_output_bytes=_MAX_OUTPUT_BYTES)
    except ProcessNotFound:
        raise EvaluationError(f"{command[0]} is not on PATH; install Nix on this machine to evaluate files") from None
    except ProcessError as error:
        raise EvaluationError(f"{command[0]} could not be run: {error}") from None
    if done.returncode != 0:
        text = without_noise(done.stderr.decode(errors="replace"))
        raise EvaluationError(f"{error_line(text) or text.strip()[:200]}; correct the expression")
    return done.stdout.decode(errors="replace")
