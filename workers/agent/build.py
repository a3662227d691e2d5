"""One build in one slot: a derivation's bytes become a request, its events become log and phases.

No .drv file is needed on the machine: the daemon is sent a BasicDerivation, whose inputs are the full paths that the
coordinator resolved.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from infra.daemon import (
    BasicDerivation,
    BasicOutput,
    BuildEvent,
    BuildInOneGo,
    BuildResult,
    DaemonConnection,
    DaemonError,
    DaemonGone,
    DaemonOperationError,
    Message,
    Options,
    Phase,
    PrintedLines,
)
from infra.daemon.usage import BuildersUse
from infra.nix import aterm
from infra.nix.derivation import options_from_env
from infra.nix.errors import FormatError
from workers.agent.attempt_record import BuildUse
from workers.agent.daemon_pool import DaemonSession
from workers.agent.lease_machine import Trouble
from workers.errors import WorkerError
from workers.wire.messages import BuildLimits

#: Of a log that is too long, this part of the limit is its tail, at most so many bytes (they wait in memory).
TAIL_PART = 4
TAIL_BYTES = 256 * 1024
#: Bytes of log after which Nix itself ends a build. Only a builder that runs away prints so much; what is beyond the
#: log's own limit is left out of the log long before.
RUNAWAY_LOG_BYTES = 1024 * 1024 * 1024
#: Memory that one daemon may take while its builder runs. Nix holds each line of a log in memory, several times.
MAX_DAEMON_BYTES = 1024 * 1024 * 1024
#: Seconds until the first look at that memory and between two: a builder prints some 200 MB a second.
LOOK_EVERY_S = 0.25
#: Looks at the daemon's memory for each at the memory of all processes of the build, but for the first.
LOOKS_PER_PEAK = 4
#: Longest derivation that is parsed on the event loop, some milliseconds.
PARSE_HERE_BYTES = 256 * 1024
#: How the exceptions of Nix's JSON library begin. All the JSON that Nix reads for a build comes from its recipe.
JSON_EXCEPTION = "[json.exception."
#: Longest phase name that is passed on; a builder may print anything as one.
MAX_PHASE_CHARACTERS = 100


class ConnectionLostError(WorkerError):
    """The connection to the Nix daemon broke after it had taken up the build; the builder may be what broke it."""

    trouble: ClassVar[Trouble] = Trouble.CONNECTION_LOST


class RecipeBrokeDaemonError(WorkerError):
    """Root of the ways in which a recipe, not the machine, ends its connection to the daemon."""

    trouble: ClassVar[Trouble]


class UnreadableLogError(RecipeBrokeDaemonError):
    """The builder printed an `@nix` line that Nix cannot read, and Nix (before 2.26) gave the connection up."""

    trouble = Trouble.LOG_UNREADABLE


class UnreadableRecipeError(RecipeBrokeDaemonError):
    """The derivation holds JSON that Nix cannot read, and Nix gave the connection up before the builder ran."""

    trouble = Trouble.DERIVATION_UNREADABLE


class EndlessLineError(RecipeBrokeDaemonError):
    """The builder printed a line that took more of the daemon's memory than one build may."""

    trouble = Trouble.LOG_ENDLESS


def basic_derivation(derivation: bytes, inputs: Sequence[str]) -> BasicDerivation:
    """Parse the .drv's bytes. Raises `infra.nix.errors.FormatError`."""
    found = aterm.parse(derivation)
    return BasicDerivation(
        outputs=tuple(BasicOutput(out.name, out.path, out.hash_algo, out.hash) for out in found.outputs),
        inputs=tuple(inputs),
        system=found.system,
        builder=found.builder.encode(),
        args=found.args,
        env=found.env,
    )


async def parsed(derivation: bytes, inputs: Sequence[str]) -> BasicDerivation:
    """Parse the .drv's bytes, many in a thread. Raises `infra.nix.errors.FormatError`."""
    if len(derivation) <= PARSE_HERE_BYTES:
        return basic_derivation(derivation, inputs)
    return await asyncio.to_thread(basic_derivation, derivation, inputs)


def required_features(derivation: BasicDerivation) -> tuple[str, ...]:
    """Return the features that a build asks for; none where they cannot be read, for that is Nix's to refuse."""
    try:
        return options_from_env(dict(derivation.env)).required_system_features
    except FormatError:
        return ()


class LogGate:
    """Lets log bytes through up to a limit, then keeps the latest and counts the rest; the build goes on.

    The head goes out as it comes, note and tail at the end, so the log is one stream of bytes without gaps: offsets,
    and with them repeats, mean the same to everybody.
    """

    def __init__(self, limit_bytes: int, write: Callable[[bytes], None]) -> None:
        self._tail_bytes = min(limit_bytes // TAIL_PART, TAIL_BYTES)
        self._head_left = limit_bytes - self._tail_bytes
        self._limit_bytes = limit_bytes
        self._write = write
        #: Lines behind the head, latest last; at most `_tail_bytes` of them.
        self._tail: deque[bytes] = deque()
        self._tail_held = 0
        self._over = False
        self._lines = 0
        self.dropped_bytes = 0

    @property
    def next_line(self) -> int:
        """Number in the log, from 1, of the line that comes next; 0 where it may be left out."""
        return 0 if self._over else self._lines + 1

    def lines(self, data: bytes, count: int) -> None:
        """Take so many lines, each with its newline."""
        if not self._over and len(data) <= self._head_left:
            self._head_left -= len(data)
            self._lines += count
            self._write(data)
            return
        for line in data[:-1].split(b"\n") if count > 1 else (data[:-1],):
            self._line(line + b"\n")

    def _line(self, line: bytes) -> None:
        if not self._over and len(line) <= self._head_left:
            self._head_left -= len(line)
            self._lines += 1
            self._write(line)
            return
        self._over = True
        if len(line) > self._tail_bytes:
            self.dropped_bytes += len(line) - self._tail_bytes
            line = line[-self._tail_bytes :] if self._tail_bytes else b""
        self._tail.append(line)
        self._tail_held += len(line)
        while self._tail_held > self._tail_bytes:
            dropped = len(self._tail.popleft())
            self._tail_held -= dropped
            self.dropped_bytes += dropped

    def finish(self) -> None:
        """Say what was dropped, if anything was, and let the tail through. Idempotent."""
        if self.dropped_bytes:
            limit, dropped = self._limit_bytes, self.dropped_bytes
            self._write(b"drover: the log is longer than %d bytes; %d bytes are left out here\n" % (limit, dropped))
            self.dropped_bytes = 0
        while self._tail:
            self._write(self._tail.popleft())
        self._tail_held = 0


def _options(limits: BuildLimits, cores: int) -> Options:
    """Return the settings of a connection that keep the limits of time."""
    return Options(
        build_cores=cores,
        max_silent_s=limits.silence_s,
        # The log's limit is kept here, by counting, because the daemon's own would end the build.
        overrides={"timeout": str(limits.timeout_s), "max-build-log-size": str(RUNAWAY_LOG_BYTES)},
    )


async def build_in_slot(
    slot: DaemonSession,
    drv_path: str,
    derivation: BasicDerivation,
    *,
    limits: BuildLimits,
    cores: int,
    gate: LogGate,
    on_phase: Callable[[str, int], None],
    pause: Callable[[], Awaitable[object] | None],
    use: BuildUse,
) -> BuildInOneGo:
    """Build and return the daemon's verdict and what it knows of the outputs.

    `use` gets what the build used, as far as the machine measures it. `pause` is called after each event; what it
    returns is awaited before the daemon is read on, so a builder that prints faster than its log is taken away is
    slowed down. Cancelling hangs up, which kills the builder. A daemon that is found gone before it took the request up
    (it died while the slot was idle) is replaced once. Raises `ConnectionLostError` where the builder may have begun,
    else `infra.daemon.DaemonError` or `DaemonUnreachableError`; where the recipe broke the connection, a
    `RecipeBrokeDaemonError`.
    """

    def on_event(event: BuildEvent) -> Awaitable[object] | None:
        match event:
            case PrintedLines(data=data, count=count):
                gate.lines(data, count)
            case Phase(name=name):
                on_phase(name[:MAX_PHASE_CHARACTERS], gate.next_line)
            case Message():
                # Text beside the log, which builders can inject too: nothing to decide on and not part of the log.
                pass
        return pause()

    async def attempt() -> BuildInOneGo:
        async with slot.use() as connection:
            try:
                with _bounded_memory(connection, use):
                    built = await slot.build(drv_path, derivation, on_event, _options(limits, cores))
            except DaemonOperationError as error:
                # A build that fails is a result. An error instead of one (say, a phase that Nix 2.8 cannot parse)
                # is often the last thing that a daemon sends before it hangs up.
                connection.abort(str(error))
                if JSON_EXCEPTION in str(error):
                    reading = UnreadableLogError if error.builder_ran else UnreadableRecipeError
                    raise reading(str(error)) from error
                raise
            _settle(use, connection.builders_use(), built.result)
            # Before another lease gets the slot: what its next build leaves to the owner is that build's.
            await connection.end_orphans()
            return built

    try:
        with _told_from_idle_loss():
            try:
                return await attempt()
            except DaemonError as error:
                if not _is_unanswered(error):
                    raise
                return await attempt()
    finally:
        gate.finish()


def _settle(use: BuildUse, used: BuildersUse | None, result: BuildResult) -> None:
    """Complete `use`; what the daemon itself has measured (with cgroups, since Nix 2.20) is more exact."""
    if used is not None:
        use.cpu_s, use.read_bytes, use.written_bytes = used.cpu_s, used.read_bytes, used.written_bytes
        use.peak_memory_bytes = used.peak_memory_bytes or use.peak_memory_bytes
    if result.cpu_user_us is not None and result.cpu_system_us is not None:
        use.cpu_s = (result.cpu_user_us + result.cpu_system_us) / 1e6


@contextmanager
def _bounded_memory(connection: DaemonConnection, use: BuildUse) -> Iterator[None]:
    """Hang up where the daemon of a running builder takes more than `MAX_DAEMON_BYTES`. Raises `EndlessLineError`.

    Only the daemon sees a line without an end: it waits for the rest of it.
    The memory of the build's processes is looked at too, and bounded by nothing here.
    """
    loop = asyncio.get_running_loop()
    taken = looks = 0
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal taken, looks, timer
        now = connection.memory_of_building()
        if looks % LOOKS_PER_PEAK == 0:
            use.saw_memory(connection.memory_of_builders())
        looks += 1
        if now > MAX_DAEMON_BYTES:
            taken = now
            connection.abort("the log takes too much memory")
        else:
            timer = loop.call_later(LOOK_EVERY_S, look)

    # Most builds of a large graph end before the first look.
    timer = loop.call_later(LOOK_EVERY_S, look)
    try:
        yield
    except DaemonError as error:
        if taken:
            raise EndlessLineError(f"the daemon took {taken >> 20} MiB to hold it") from error
        raise
    finally:
        timer.cancel()


@contextmanager
def _told_from_idle_loss() -> Iterator[None]:
    """Give the loss of a daemon that had taken up the build a name of its own."""
    try:
        yield
    except DaemonError as error:
        if isinstance(error, DaemonOperationError) or _is_unanswered(error):
            raise
        raise ConnectionLostError(str(error)) from error


def _is_unanswered(error: DaemonError) -> bool:
    """Return whether the daemon was gone before it took the request up, so that nothing has run."""
    return isinstance(error, DaemonGone) and error.unanswered
