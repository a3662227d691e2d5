"""Evaluation by nix-eval-jobs: one run for each source, whose lines are findings.

It goes through the tree that `tree.nix` makes for it, so that its findings are those of our own evaluators. Its wire
format is one JSON object a line (src/worker.cc and src/drv.cc of nix-eval-jobs); `attrPath` is the key.

Rules:

1. An attribute's error is a line and costs the others nothing. What ends the whole run (a worker that overflows its
   stack, a line that is none) is `JobsEnded`.
2. Memory: `--max-memory-size` times one more than its workers is our ceiling. It looks at a worker between two
   attributes only, so one share is left for what they have beyond it. Above the ceiling the run is ended.
3. It knows no deadline for an attribute: a run without a finding for as long as an attribute may take is ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import ClassVar, Final

import orjson

from coordinator.errors import CoordinatorError
from coordinator.evaluation.evaluator import MAX_ANSWER_BYTES, PlaceAnswer, give_way, limit_heap, resident_bytes
from coordinator.evaluation.long_lines import LongLines
from coordinator.evaluation.messages import error_line, last_error_line, plain, position, without_noise
from coordinator.evaluation.model import AttrPlace, FailedAttr, Finding, LeftOut, join_attr
from coordinator.evaluation.pool import ENDLESS, MEMORY_EVERY_S, shown_above
from coordinator.evaluation.pool_limits import PROGRAM, PoolLimits
from coordinator.evaluation.source import NixValue
from infra.decoding import decoder
from infra.process import ChildProcess, ProcessNotFound
from infra.records import record

#: Bytes of what it prints for people that are passed on, and that are kept of its end.
MAX_MESSAGE_BYTES: Final = 256 * 1024
TAIL_BYTES: Final = 32 * 1024
_LINE_BYTES: Final = 16 * 1024
_MIB: Final = 1024 * 1024


class JobsEnded(CoordinatorError):  # noqa: N818 - named for what happened
    """nix-eval-jobs ended before it had all findings."""

    code: ClassVar[str] = "evaluation"


@record(frozen=True, slots=True)
class _MarkedFinding:
    """Words of `tree.nix` in the place of an error."""

    PASSES_OVER: ClassVar[bool] = True

    left: bool = False
    endless: bool = False
    names: tuple[str, ...] = ()


@record(frozen=True, slots=True)
class _JobLine:
    """One line of nix-eval-jobs, as far as it is read."""

    PASSES_OVER: ClassVar[bool] = True

    attrPath: tuple[str, ...]  # noqa: N815 - its name there
    drvPath: str = ""  # noqa: N815
    error: str = ""
    meta: PlaceAnswer = field(default_factory=PlaceAnswer)


async def findings_of_jobs(
    number: int, source: NixValue, limits: PoolLimits, *, env: Mapping[str, str], on_messages: Callable[[str], None]
) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate one source; gives each finding with its place as soon as it is there.

    Raises:
        JobsEnded: It did not get to the end.
    """
    token = f"drover-{os.urandom(16).hex()}"
    try:
        child = await ChildProcess.start(
            [PROGRAM, *_flags(limits), *source.all_flags, "--expr", source.jobs(token)],
            env={**env, "TERM": "dumb", "NO_COLOR": "1"},
        )
    except ProcessNotFound as error:
        raise JobsEnded(str(error)) from None
    limit_heap(child.pid, limits.memory_bytes)
    give_way(child.pid)
    child.stdin.close()
    run = _JobsRun(child, token, limits, on_messages)
    printed = asyncio.create_task(run.pass_on_messages())
    memory = asyncio.create_task(run.watch_memory())
    try:
        lines = LongLines(child.stdout, MAX_ANSWER_BYTES)
        while (line := await run.line(lines)) is not None:
            for place, finding in _findings(number, source, token, line):
                yield place, finding
        await printed
        await run.check_end()
    finally:
        memory.cancel()
        printed.cancel()
        await child.kill()
        await asyncio.gather(memory, printed, return_exceptions=True)


def _flags(limits: PoolLimits) -> list[str]:
    share = max(1, limits.memory_bytes // (limits.evaluators + 1) // _MIB)
    return [
        "--workers",
        str(limits.evaluators),
        "--max-memory-size",
        str(share),
        "--meta",
        "--option",
        "extra-experimental-features",
        "nix-command flakes",
    ]


class _JobsRun:
    """One run: what it prints for people, the memory it takes, and its end."""

    def __init__(self, child: ChildProcess, token: str, limits: PoolLimits, on_messages: Callable[[str], None]) -> None:
        self._child = child
        self._token = token
        self._limits = limits
        self._on_messages = on_messages
        self._tail = ""
        self._too_large = False

    async def line(self, lines: LongLines) -> bytes | None:
        """Return its next line, None at its end.

        Raises:
            JobsEnded: There was none for as long as an attribute may take.
        """
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await lines.next()
        except TimeoutError:
            raise JobsEnded(f"{PROGRAM} found nothing for {self._limits.timeout_s:g} s") from None

    async def pass_on_messages(self) -> None:
        """Pass on what the evaluated files print. Errors are not: they come as findings, and the last stays."""
        lines = LongLines(self._child.stderr, _LINE_BYTES)
        room = MAX_MESSAGE_BYTES
        while (line := await lines.next()) is not None:
            text = line.decode(errors="replace")
            self._tail = (self._tail + text + "\n")[-TAIL_BYTES:]
            if not text.startswith(("trace:", "warning:")) or not without_noise(text).strip():
                continue
            if room > 0:
                self._on_messages(text)
                room -= len(text)
                if room <= 0:
                    self._on_messages("[...]")

    async def watch_memory(self) -> None:
        """Kill it whenever it and its workers have more memory together than they may."""
        while True:
            await asyncio.sleep(MEMORY_EVERY_S)
            sizes = await resident_bytes([self._child.pid, *_workers(self._child.pid)])
            if sum(sizes.values()) > self._limits.memory_bytes:
                self._too_large = True
                await self._child.kill()
                return

    async def check_end(self) -> None:
        """Wait for its end, after its last line.

        Raises:
            JobsEnded: It did not end well.
        """
        status = await self._child.wait()
        if self._too_large:
            raise JobsEnded(f"{PROGRAM} needs more than {self._limits.memory_bytes // _MIB} MiB")
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise JobsEnded(f"{PROGRAM} ended early ({last_error_line(self._tail) or how})")


def _findings(number: int, source: NixValue, token: str, line: bytes) -> list[tuple[AttrPlace, Finding]]:
    try:
        job: _JobLine = decoder(_JobLine)(orjson.loads(line))
        at, *names = job.attrPath
        place = AttrPlace(number, int(at.removeprefix("#")), tuple(name.removeprefix("#") for name in names))
        label = source.asked[place.at].label
    except (ValueError, TypeError, LookupError):
        text = line[:100].decode(errors="replace")
        raise JobsEnded(f"{PROGRAM} printed {text!r}, which is none of its lines") from None
    attr = join_attr(label, place.path)
    if job.drvPath:
        return [(place, replace(job.meta, drv=job.drvPath).root(attr))]
    message = plain(job.error)
    marked = _marked(token, message)
    if marked is None:
        return [(place, FailedAttr(attr, error_line(message), without_noise(message), position(message)))]
    if marked.endless:
        above = shown_above(place)
        return [(above, FailedAttr(join_attr(label, above.path), ENDLESS))]
    if marked.left:
        return [(place, LeftOut(attr, is_set=True))]
    above = AttrPlace(number, place.at, place.path[:-1], asked=False)
    below = [above.below(name, asked=False) for name in marked.names]
    return [(each, LeftOut(join_attr(label, each.path), is_set=False)) for each in below]


def _marked(token: str, message: str) -> _MarkedFinding | None:
    """Return what `tree.nix` says in the place of an error; None where it is one."""
    _, found, text = message.partition(f"{token} ")
    with suppress(ValueError, TypeError, LookupError):
        if found:
            marked: _MarkedFinding = decoder(_MarkedFinding)(orjson.loads(text.splitlines()[0]))
            return marked
    return None


def _workers(pid: int) -> list[int]:
    """Return the processes that one has forked, where the kernel says."""
    found: list[int] = []
    if sys.platform == "linux":
        with suppress(OSError, ValueError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found
