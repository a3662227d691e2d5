"""Program of a remote evaluation, run in its sandbox: unpacks a tree, evaluates it, sends what it found.

It is a client of the coordinator that speaks frames over its standard streams. Nothing that it says is believed.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from coordinator.api.models import IntakeMissing
from coordinator.api.requests import IntakeQuery, RootRequest
from coordinator.api.sent_streams import SourceHeader, encode_derivations, encode_sources, in_thread
from coordinator.api.trees import TreeBounds, TreeReader
from coordinator.client.closure import LocalStore, describe_sources, read_closure
from coordinator.errors import CoordinatorError
from coordinator.evaluation import source as evaluation_source
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.findings import RootKey, gathered, root_key
from coordinator.evaluation.inputs import Inputs, findings_asked, require_some
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding, left_out_text
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source_plan import EvaluationMeans, EvaluatorChoice
from coordinator.remote_evaluation.frames import MAX_FRAME_BYTES, FrameKind, frame, read_frame
from coordinator.remote_evaluation.jobs import (
    AT_ONCE,
    MAX_MESSAGE,
    EvaluationJob,
    FailedAttrs,
    FailedJobAttr,
    FoundRoots,
    MissingNames,
)
from coordinator.remote_evaluation.sandboxes import ENVIRONMENT, GATEWAY, GATEWAY_PORT, STORE, TREE
from infra.nar_files import NarUnpacker
from infra.nix.store_path import base_name_of

#: Names of one intake query; so many fit a frame.
QUERY_NAMES: Final = 8_000
#: Seconds from one batch of roots to the next while there are fewer than a frame holds.
BATCH_EVERY_S: Final = 1.0
#: What Nix says of an address outside of `allowed-uris`.
_FORBIDDEN_HOST: Final = re.compile(r"access to URI '[a-z+]+://([^/']+)[^']*' is forbidden in restricted mode")
#: Characters of a name or a sentence.
_SHORT: Final = 1024


class Pipe:
    """The program's side of the frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def opened(cls) -> Pipe:
        """Return the pipe over standard input and output."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_FRAME_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        transport, _ = await loop.connect_write_pipe(lambda: protocol, sys.stdout.buffer)
        return cls(reader, asyncio.StreamWriter(transport, protocol, None, loop))

    async def receive(self, *kinds: FrameKind) -> tuple[FrameKind, bytes]:
        """Return the next frame, one of `kinds`."""
        found = await read_frame(self._reader)
        if found is None or found[0] not in kinds:
            raise EvaluationError("the coordinator ended the evaluation")
        return found

    async def send(self, kind: FrameKind, data: bytes = b"") -> None:
        """Send a frame."""
        self._writer.write(frame(kind, data))
        await self._writer.drain()

    async def stream(self, kind: FrameKind, end: FrameKind, pieces: Iterator[bytes]) -> None:
        """Send a stream in pieces."""
        async for piece in in_thread(pieces):
            await self.send(kind, piece)
        await self.send(end)

    async def missing(self, query: IntakeQuery) -> IntakeMissing:
        """Ask which members of a closure must be sent, in parts."""
        derivations: list[str] = []
        sources: list[str] = []
        for start in range(0, max(len(query.derivations), len(query.sources)), QUERY_NAMES):
            part = slice(start, start + QUERY_NAMES)
            asked = query.model_copy(update={"derivations": query.derivations[part], "sources": query.sources[part]})
            await self.send(FrameKind.QUERY, asked.model_dump_json().encode())
            _, data = await self.receive(FrameKind.MISSING)
            answer = MissingNames.model_validate_json(data)
            derivations += answer.derivations
            sources += answer.sources
        return IntakeMissing(derivations=tuple(derivations), sources=tuple(sources))


async def evaluate(pipe: Pipe) -> None:
    """Do the job that comes over the pipe. Raises `CoordinatorError`."""
    _, data = await pipe.receive(FrameKind.JOB)
    job = EvaluationJob.model_validate_json(data)
    await unpack(pipe, job)
    try:
        os.chdir(f"{TREE}/{job.directory}")
    except OSError as error:
        raise EvaluationError(f"the tree has no directory {job.directory}: {error.strerror}") from None
    limits = PoolLimits(job.evaluators, job.memory_bytes, job.timeout_s or None)
    env = {**ENVIRONMENT, **({"all_proxy": f"socks5h://127.0.0.1:{GATEWAY_PORT}"} if job.allowed_uris else {})}
    async with gateway_of(job):
        try:
            found = await StreamedFindings(pipe, _inputs(job), limits, env).run()
        except EvaluationError as error:
            raise EvaluationError(_with_lock(_with_host(str(error)), job)) from None
    for start in range(0, len(found.failed), AT_ONCE):
        some = FailedAttrs(failed=tuple(map(_failed, found.failed[start : start + AT_ONCE])))
        await pipe.send(FrameKind.FAILED, some.model_dump_json().encode())
    left_out = left_out_text(job.file or "the expression", found.left_out)
    await pipe.send(FrameKind.LEFT_OUT, left_out.encode()[:_SHORT])


class StreamedFindings:
    """An evaluation whose roots are sent while it goes on: the first at once, further ones in batches of a second."""

    def __init__(self, pipe: Pipe, inputs: Inputs, limits: PoolLimits, env: dict[str, str]) -> None:
        self._pipe = pipe
        self._inputs = inputs
        self._messages: list[str] = []
        self._means = EvaluationMeans(limits, env, self._messages.append, EvaluatorChoice.OWN)
        self._found: list[tuple[AttrPlace, Finding]] = []
        self._waiting: list[EvaluatedRoot] = []
        self._arrived = asyncio.Event()
        #: Full paths of what was sent, or is known to be there.
        self._sent: set[str] = set()

    async def run(self) -> Evaluation:
        """Evaluate and send roots; returns all findings. Raises `CoordinatorError`."""
        finding = asyncio.create_task(self._find())
        finding.add_done_callback(lambda _: self._arrived.set())
        try:
            while self._waiting or not finding.done():
                await self._arrived.wait()
                self._arrived.clear()
                batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                if batch:
                    await self._send(batch)
                    await asyncio.wait({finding}, timeout=0 if self._waiting else BATCH_EVERY_S)
                if self._waiting or finding.done():
                    self._arrived.set()
            await finding
            evaluation = gathered(self._found)
            require_some(self._inputs, evaluation, self._messages.append)
            return evaluation
        finally:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
            for text in map(_shown, self._messages):
                for start in range(0, len(text), MAX_MESSAGE):
                    await self._pipe.send(FrameKind.MESSAGES, text[start : start + MAX_MESSAGE].encode())

    async def _find(self) -> None:
        keys: set[RootKey] = set()
        async with aclosing(findings_asked(self._inputs, self._means)) as findings:
            async for place, finding in findings:
                self._found.append((place, finding))
                if isinstance(finding, EvaluatedRoot) and (key := root_key(place, finding)) not in keys:
                    keys.add(key)
                    self._waiting.append(finding)
                    self._arrived.set()

    async def _send(self, batch: Sequence[EvaluatedRoot]) -> None:
        await send_closure(self._pipe, LocalStore(root=STORE), batch, dict(self._means.env), self._sent)
        roots = FoundRoots(roots=tuple(map(_root, batch)))
        await self._pipe.send(FrameKind.ROOTS, roots.model_dump_json().encode())


async def unpack(pipe: Pipe, job: EvaluationJob) -> None:
    """Unpack the tree that comes over the pipe. Raises `CoordinatorError`."""
    reader = TreeReader(TreeBounds(job.tree_bytes, job.tree_entries))
    with NarUnpacker(TREE) as unpacker:
        while True:
            kind, data = await pipe.receive(FrameKind.TREE, FrameKind.TREE_END)
            if kind is FrameKind.TREE_END:
                break
            for piece in reader.feed(data):
                try:
                    unpacker.feed(piece)
                except OSError as error:
                    raise EvaluationError(f"the tree has no room in the evaluation: {error.strerror}") from None
        reader.finish()
        unpacker.close()


@asynccontextmanager
async def gateway_of(job: EvaluationJob) -> AsyncIterator[None]:
    """Lead a port of the sandbox's loopback to the gateway, where the job has one, for as long as the block runs."""
    if not job.allowed_uris:
        yield
        return
    async with relaying():
        yield


@asynccontextmanager
async def relaying() -> AsyncIterator[None]:
    """Lead a port of the sandbox's loopback to the gateway for as long as the block runs."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(writer.close)
            theirs = await asyncio.open_unix_connection(GATEWAY)
            stack.callback(theirs[1].close)
            await asyncio.gather(_copy(reader, theirs[1]), _copy(theirs[0], writer), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1", GATEWAY_PORT):
        yield


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(64 * 1024):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def _inputs(job: EvaluationJob) -> Inputs:
    own = str(evaluation_source.TREE.parent)
    flags = (*job.flags, "--store", STORE, "-I", f"tree={TREE}", "-I", f"drover={own}")
    if job.expression:
        return Inputs(expression=job.expression, attrs=job.attrs, systems=job.systems, flags=flags)
    file, mark, attr = job.file.partition("#")
    if mark:
        return Inputs((f"path:{TREE}{_below(file, '?dir=')}#{attr}",), "", job.attrs, job.systems, flags)
    return Inputs((TREE + _below(file, "/"),), "", job.attrs, job.systems, flags)


def _below(file: str, mark: str) -> str:
    name = file.removeprefix("./").rstrip("/")
    return "" if name in {"", "."} else f"{mark}{name}"


async def send_closure(
    pipe: Pipe, store: LocalStore, wanted: Sequence[EvaluatedRoot], env: dict[str, str], sent: set[str]
) -> None:
    """Send what the coordinator lacks of the closure of roots, but for what was `sent`. Raises `CoordinatorError`."""
    closure = await asyncio.to_thread(read_closure, store, [each.drv for each in wanted], sent)
    found = await describe_sources(store, [path for path in closure.sources if path not in sent], env)
    if found.built:
        raise EvaluationError(f"the input {next(iter(found.built))} was built, and a remote evaluation builds nothing")
    names = {base_name_of(drv): drv for drv in closure.derivations}
    query = IntakeQuery(
        store_dir=store.store_dir, derivations=tuple(names), sources=tuple(each.path for each in found.headers)
    )
    missing = await pipe.missing(query)
    lacking, absent = set(missing.derivations), set(missing.sources)
    if lacking:
        members = ((name, store.read(drv)) for name, drv in names.items() if name in lacking)
        await pipe.stream(FrameKind.DERIVATIONS, FrameKind.DERIVATIONS_END, encode_derivations(members))
    if absent:
        nars = ((header, _nar(store, header)) for header in found.headers if header.path in absent)
        await pipe.stream(FrameKind.SOURCES, FrameKind.SOURCES_END, encode_sources(nars))
    sent.update(closure.derivations, closure.sources)


def _nar(store: LocalStore, header: SourceHeader) -> Callable[[], Any]:
    return lambda: store.dump(f"{store.store_dir}/{header.path}")


def _shown(text: str) -> str:
    """Return a text for people, in which files have their names in the tree."""
    return text.replace(f"{TREE}/", "")


def _with_host(error: str) -> str:
    """Return an error of Nix with what to do about a host that is not allowed."""
    match = _FORBIDDEN_HOST.search(error)
    if match is None:
        return error
    return (
        f"{error[: match.end()]} (this farm does not fetch from {match[1]}; ask its operator for it in "
        f"remote_evaluation.allowed_hosts, or evaluate on the client){error[match.end() :]}"
    )


def _with_lock(error: str, job: EvaluationJob) -> str:
    """Return an error of a flake that could not be read with the one cause that people can mend."""
    file, mark, _ = job.file.partition("#")
    if not mark or "could not be read" not in error or Path(TREE, file, "flake.lock").exists():
        return error
    return f"{error}; it has no flake.lock: make it with `nix flake lock`, and add it to git"


def _failed(attr: FailedAttr) -> FailedJobAttr:
    return FailedJobAttr(
        attr=attr.attr[:_SHORT],
        error=_with_host(_shown(attr.error))[:_SHORT],
        text=_shown(attr.text)[:MAX_MESSAGE],
        position=_shown(attr.position)[:_SHORT],
    )


def _root(root: EvaluatedRoot) -> RootRequest:
    return RootRequest(attr=root.attr, drv=root.drv, outputs=root.outputs, limits=root.limits)


async def run(work: Callable[[Pipe], Any]) -> None:
    """Do the work, and send how it ended."""
    pipe = await Pipe.opened()
    try:
        await work(pipe)
    except CoordinatorError as error:
        await pipe.send(FrameKind.ERROR, _shown(str(error)).encode()[: 4 * _SHORT])
    else:
        await pipe.send(FrameKind.DONE)


def main() -> None:
    """Evaluate."""
    Path(STORE).mkdir()
    asyncio.run(run(evaluate))


if __name__ == "__main__":
    main()
