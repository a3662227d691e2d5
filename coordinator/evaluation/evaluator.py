"""One evaluator: a `nix repl` that visits places of a value, one after the other.

It is a process that keeps what it has evaluated and survives an error of an attribute, as no other command of Nix
does. Nix's own tests drive it through a pipe as well. What it is asked goes to its standard input a line each; what it
finds, what Nix prints of it and the end of each answer come on its standard error, in that order.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson

from coordinator.api.limits import MAX_LIMIT
from coordinator.api.root_limits import NO_LIMITS, RootLimits
from coordinator.errors import CoordinatorError
from coordinator.evaluation.long_lines import READ_BYTES, LongLines
from coordinator.evaluation.messages import error_line, without_noise
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, FailedAttr, parse_drv
from coordinator.evaluation.source import NixValue, visit
from infra.decoding import decoder
from infra.process import ChildProcess, ProcessError, run
from infra.records import record

#: Most bytes of one answer: a set of a hundred thousand names has three million.
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
#: Most bytes that are kept of what Nix prints during one visit, from its start and its end each.
MAX_MESSAGE_BYTES: Final = 32 * 1024
#: Seconds in which Nix is to fail once more where it is asked for the whole of an error.
WHOLE_ERROR_S: Final = 600.0
_GUARD: Final = "drover_end = null\n"
#: What Nix prints where a line that goes on ends in the guard.
_ENDED_EARLY: Final = "syntax error, unexpected '='"
#: What an evaluator's collector, allocator or Nix itself says of it.
_OUT_OF_MEMORY: Final = re.compile(r"out of memory|bad_alloc|failed to expand heap", re.IGNORECASE)
#: Bytes that the kernel lets an evaluator have at least, and beside its part: the collector reserves some at once.
_HEAP_BYTES: Final = 1024 * 1024 * 1024
#: Steps of niceness: it gets a third of a processor that it shares, and all of one that is free.
NICER: Final = 5
_PAGE: Final = resource.getpagesize()
_PS_S: Final = 5.0


class EvaluatorFailed(CoordinatorError):  # noqa: N818 - named for what happened
    """The evaluator ended, or says what no evaluator says.

    Attributes:
        messages: What Nix printed last.
        out_of_memory: Whether it wanted more memory than it may have.
    """

    code: ClassVar[str] = "evaluation"

    def __init__(self, messages: str) -> None:
        self.messages = messages
        self.out_of_memory = bool(_OUT_OF_MEMORY.search(messages))
        super().__init__(error_line(messages) or "the evaluator ended in the middle of an evaluation")


@record(frozen=True, slots=True, kw_only=True)
class PlaceAnswer:
    """Finding of `tree.nix` at a place; all empty where nothing is there that could be built."""

    PASSES_OVER: ClassVar[bool] = True

    drv: str = ""
    output: str = ""
    limits: RootLimits = NO_LIMITS
    maintainers: tuple[str, ...] = ()
    #: Names of a set that is entered.
    names: tuple[str, ...] = ()
    #: Length of a list that is entered.
    elements: int = 0
    #: It is a set that does not ask to be entered.
    left: bool = False

    @classmethod
    def read(cls, data: bytes) -> PlaceAnswer:
        """Read an answer. Raises `ValueError`, `TypeError` or `KeyError` where it is none."""
        kind: Any = cls
        answer: PlaceAnswer = decoder(kind)(orjson.loads(data))
        return answer

    def root(self, attr: str) -> EvaluatedRoot | FailedAttr:
        """Return the derivation that was found, as the finding of an attribute."""
        drv = parse_drv(self.drv)
        if drv is None:
            return FailedAttr(attr, f"its derivation is {self.drv[:200]!r}, which is no path of one")
        outputs = () if self.output == "out" else (self.output,)
        limits = _bounded(self.limits) if self.limits != NO_LIMITS else None
        return EvaluatedRoot(attr or drv.attr, drv.drv, outputs, limits, self.maintainers)


def _bounded(limits: RootLimits) -> RootLimits:
    """Take a limit that no build can reach for the largest that may be named."""
    return RootLimits(**{name: min(limit, MAX_LIMIT) for name, limit in asdict(limits).items()})


class Evaluator:
    """A running `nix repl` of one source. Make it with `start`; end it with `close`."""

    def __init__(self, source: NixValue, child: ChildProcess, token: str, env: Mapping[str, str]) -> None:
        self._source = source
        self._child = child
        self._env = env
        #: Places that are asked for and not answered yet.
        self._places: deque[AttrPlace] = deque()
        self._token = token.encode()
        self._lines = LongLines(child.stderr, MAX_ANSWER_BYTES)
        self._asked = 0
        self._answered = 0
        self._drain = asyncio.create_task(_drop(child.stdout))

    @classmethod
    async def start(cls, source: NixValue, *, token: str, env: Mapping[str, str], memory_bytes: int) -> Evaluator:
        """Start an evaluator.

        Args:
            source: What it evaluates.
            token: What nothing that is evaluated can guess; it marks our own lines.
            env: Its whole environment.
            memory_bytes: Most bytes that its heap may have, kept by the kernel where it can.

        Raises:
            ProcessNotFound: There is no Nix on this machine.
            EvaluatorFailed: Its start failed, as with an unknown option or an expression that cannot be read.
        """
        child = await ChildProcess.start(
            ["nix", "--extra-experimental-features", "nix-command flakes", "repl", *source.all_flags],
            env={**env, "TERM": "dumb", "NO_COLOR": "1"},
        )
        evaluator = cls(source, child, token, env)
        limit_heap(child.pid, memory_bytes)
        give_way(child.pid)
        try:
            await evaluator._bind(source)
        except BaseException:
            await evaluator.close()
            raise
        return evaluator

    async def _bind(self, source: NixValue) -> None:
        await self._send(self._question(source.prelude(self._token.decode())))
        _, messages = await self._receive()
        if error_line(messages):
            raise EvaluatorFailed(messages)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def visit(self, places: Sequence[AttrPlace]) -> None:
        """Ask for places; `answer` is to be called once for each, in their order."""
        self._places.extend(places)
        await self._send("".join(self._question(visit(place)) for place in places))

    async def answer(self) -> tuple[PlaceAnswer | None, str]:
        """Wait for the answer to the next visit.

        Returns what is there, and what Nix printed for people; None where it is an error, which Nix printed.

        Raises:
            EvaluatorFailed: The evaluator ended.
        """
        place = self._places.popleft()
        found, messages = await self._receive()
        if found is None:
            return None, await self._whole_error(place) if _ENDED_EARLY in messages else messages
        try:
            return PlaceAnswer.read(found), messages
        except (ValueError, TypeError, KeyError):
            raise EvaluatorFailed(f"error: the evaluator answered {found[:200]!r}, which is no answer") from None

    def kill(self) -> None:
        """Kill it, as the kernel would; the visit that goes on fails."""
        self._child.signal(signal.SIGKILL)

    async def close(self) -> None:
        """End it. Nothing of it stays, nor does it write its lines to the history of the user's own repl."""
        self._drain.cancel()
        await self._child.kill()
        with suppress(asyncio.CancelledError):
            await self._drain

    def _question(self, lines: str) -> str:
        """Return lines, and after them what marks the end of what they print.

        A `nix repl` before 2.24 takes a file that ends too early for a line that goes on, and waits for the rest of it
        without a word. A binding after the line is silent by itself and an error as that rest.
        """
        self._asked += 1
        return f'{lines}{_GUARD}builtins.trace "{self._token.decode()} end {self._asked}" null\n'

    async def _whole_error(self, place: AttrPlace) -> str:
        """Return what Nix prints of a place whose file ends too early, which `nix repl` keeps for itself."""
        command = ["nix-instantiate", "--eval", *self._source.all_flags, "-E", self._source.alone(place)]
        try:
            done = await run(command, env=self._env, timeout_s=WHOLE_ERROR_S, max_output_bytes=READ_BYTES)
        except ProcessError as error:
            return f"error: syntax error, unexpected end of file ({error})"
        return without_noise(done.stderr.decode(errors="replace"))

    async def _send(self, text: str) -> None:
        # An evaluator that ended is seen where its answer is read, which has what it printed before.
        with suppress(OSError):
            self._child.stdin.write(text.encode())
            await self._child.stdin.drain()

    async def _receive(self) -> tuple[bytes | None, str]:
        self._answered += 1
        end = f"end {self._answered}".encode()
        found: bytes | None = None
        messages = _Messages()
        ours = b"trace: " + self._token + b" "
        while True:
            line = await self._lines.next()
            if line is None:
                raise EvaluatorFailed(without_noise(messages.text()))
            if not line.startswith(ours):
                messages.add(line)
            elif line[len(ours) :] == end:
                return found, without_noise(messages.text())
            else:
                found = line[len(ours) :]


class _Messages:
    """Lines that Nix prints during a visit: their start and their end, as far as they are kept."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, line: bytes) -> None:
        """Take a line."""
        if len(self._head) + len(line) < MAX_MESSAGE_BYTES and not self._tail:
            self._head += line + b"\n"
            return
        self._tail += line[-MAX_MESSAGE_BYTES:] + b"\n"
        if len(self._tail) > 2 * MAX_MESSAGE_BYTES:
            # One byte more than is shown, so that it is seen to be cut.
            del self._tail[: -MAX_MESSAGE_BYTES - 1]

    def text(self) -> str:
        """Return all of it."""
        middle = b"[...]\n" if len(self._tail) > MAX_MESSAGE_BYTES else b""
        return (self._head + middle + self._tail[-MAX_MESSAGE_BYTES:]).decode(errors="replace")


async def _drop(reader: asyncio.StreamReader) -> None:
    """Read and forget what the repl prints for people, so that the evaluator never waits for a reader."""
    while await reader.read(READ_BYTES):
        pass


def limit_heap(pid: int, memory_bytes: int) -> None:
    """Let the kernel refuse an evaluator more memory than it may have, where it can be asked to."""
    if sys.platform == "linux":
        with suppress(OSError, ValueError):
            most = memory_bytes + _HEAP_BYTES
            resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))


def give_way(pid: int) -> None:
    """Have an evaluator leave the processor to all else that wants it, as what sends and builds its findings."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + NICER)


async def resident_bytes(pids: Sequence[int]) -> dict[int, int]:
    """Return the bytes of memory that processes have, without those that ended."""
    found = _from_proc(pids) if sys.platform == "linux" else await _from_ps()
    return {pid: size for pid, size in found.items() if pid in pids}


def _from_proc(pids: Sequence[int]) -> dict[int, int]:
    found = {}
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            found[pid] = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    return found


async def _from_ps() -> dict[int, int]:
    try:
        done = await run(
            ["ps", "-axo", "pid=,rss="],
            env={"PATH": "/bin:/usr/bin"},
            timeout_s=_PS_S,
            max_output_bytes=READ_BYTES * 16,
        )
    except ProcessError:
        return {}
    rows = (line.split() for line in done.stdout.decode().splitlines())
    return {int(row[0]): int(row[1]) * 1024 for row in rows if len(row) == len(("pid", "rss"))}
