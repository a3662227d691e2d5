"""A client of the Nix worker protocol: one connection, one request at a time.

The client announces 1.38 without features and works with servers from 1.32 (Nix 2.4) on; field differences follow the
smaller of the two versions. Concurrent calls wait for each other in order.

A request that ends in `DaemonOperationError` leaves the connection usable. Anything else that interrupts a request (a
cancelled task, nonsense from the peer, the end of the stream, a NAR that is not read to its end) leaves the stream at
an unknown place, so the connection is hung up at once and every later call raises `DaemonGone`. Hanging up is also how
a build is stopped: the daemon notices within about 20 ms and kills the builder.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from infra.daemon.conversation import Conversation, ignore
from infra.daemon.errors import DaemonOperationError, DaemonProtocolError
from infra.daemon.events import BuildEvent, BuildListener
from infra.daemon.framed import Upload, checked_nar, many_paths
from infra.daemon.values import (
    BasicDerivation,
    BuildMode,
    BuildResult,
    Collected,
    GcAction,
    Options,
    decode_path_info,
    encode_path_info,
)
from infra.daemon.wire import MAX_LIST_ITEMS, Encoder, Inbox, Operation
from infra.nix.path_info import PathInfo
from infra.records import record

#: Questions that are asked before the first answer is read. A pipe holds them all, and the answers so far.
QUESTIONS: Final = 128
#: Largest piece of a NAR that nar_from_path yields.
NAR_CHUNK_BYTES: Final = 1024 * 1024
#: How often a root is requested that a collector which ends at that moment refuses, and seconds between two requests.
ROOT_TRIES = 5
ROOT_PAUSE_S = 0.05
#: Roots requested before the first answer is read: the answers fit into a pipe.
ROOTS_AT_ONCE = 256
#: Outputs that are looked at in one go with their build: the requests fit into a pipe beside it.
LOOKS_AT_ONCE = 16
#: What such a refusal names (libstore, LocalStore::addTempRoot).
COLLECTOR_SOCKET = "gc-socket"
#: Garbage collection without a limit.
NO_LIMIT: Final = (1 << 64) - 1

_NAR_BEGINNING: Final = b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0"
_NAR_END: Final = b"\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0"


@record(frozen=True, slots=True)
class BuildInOneGo:
    """Answers to all that `build_in_one_go` requests.

    Attributes:
        result: The verdict.
        infos: What the store then knows of the outputs, by path; an output that is not here may be asked for.
        refused: Roots that were not taken.
    """

    result: BuildResult
    infos: Mapping[str, PathInfo]
    refused: tuple[str, ...]


class DaemonConnection(Conversation):
    """One connection to a Nix daemon. Open it with `infra.daemon.opening`; close it with `close`.

    Every request may raise DaemonOperationError (the daemon refused or failed it), DaemonGone or DaemonProtocolError.

    Attributes:
        version: (major, minor) that both sides speak.
        nix_version: What the daemon reports of itself, such as "2.8.0"; "" before protocol 1.33.
    """

    async def set_options(self, options: Options) -> None:
        """Set the settings for the requests that follow."""
        async with self._request(_options_request(options)):
            pass

    async def query_valid_paths(self, paths: Iterable[str], *, substitute: bool = False) -> frozenset[str]:
        """Return those of the paths that the store has, after trying to download the rest if `substitute`."""
        wanted = sorted(set(paths))
        if not wanted:
            return frozenset()
        request = Encoder().integer(Operation.QUERY_VALID_PATHS).strings(wanted).integer(substitute)
        async with self._request(request):
            return frozenset(await self._channel.words("valid paths", len(wanted)))

    async def query_path_info(self, path: str) -> PathInfo | None:
        """Return what the store knows of a path, or None if it does not have it."""
        try:
            async with self._request(Encoder().integer(Operation.QUERY_PATH_INFO).string(path)):
                return await self._read_path_info(path)
        except DaemonOperationError:
            # Nix 2.32.0-2.32.5 and 2.33.0-2.33.2 report a missing path as an error: ask in a way they answer.
            if await self._is_valid(path):
                raise
            return None

    async def query_path_infos(self, paths: Sequence[str]) -> list[PathInfo | None]:
        """Return the same of many paths; up to QUESTIONS are asked before the first of their answers is read."""
        found: list[PathInfo | None] = []
        for at in range(0, len(paths), QUESTIONS):
            found += await self._path_infos(paths[at : at + QUESTIONS])
        return found

    async def _path_infos(self, paths: Sequence[str]) -> list[PathInfo | None]:
        request = Encoder()
        for path in paths:
            request.integer(Operation.QUERY_PATH_INFO).string(path)
        found: list[PathInfo | None] = []
        refused: list[int] = []
        async with self._guarded():
            async with self._noticing_silence():
                await self._channel.send(request.getvalue())
            for number, path in enumerate(paths):
                try:
                    await self._until_last(ignore)
                except DaemonOperationError:
                    refused.append(number)
                    found.append(None)
                else:
                    found.append(await self._read_path_info(path))
        for number in refused:
            found[number] = await self.query_path_info(paths[number])
        return found

    async def is_trusted(self, valid_path: str = "") -> bool | None:
        """Return whether the daemon trusts this client; None when it cannot be known.

        Before protocol 1.35 nothing says so; then a request that changes nothing but needs trust is tried on
        `valid_path`, which must be in the store ("" or an absent path gives None).
        """
        if self.version[1] >= 35:
            return {1: True, 2: False}.get(self._trust)
        if not valid_path or not await self._is_valid(valid_path):
            return None
        try:
            async with self._request(Encoder().integer(Operation.ADD_SIGNATURES).string(valid_path).strings(())):
                await self._channel.decode(Inbox.read_int)
        except DaemonOperationError:
            return False
        return True

    async def add_temp_roots(self, paths: Iterable[str]) -> None:
        """Keep paths, present or not, from garbage collection for as long as this connection lives."""
        left = list(paths)
        for tries in reversed(range(ROOT_TRIES)):
            refused: dict[str, DaemonOperationError] = {}
            for first in range(0, len(left), ROOTS_AT_ONCE):
                refused |= await self._add_temp_roots(left[first : first + ROOTS_AT_ONCE])
            if not refused:
                return
            left = list(refused)
            for error in refused.values():
                # Nix 2.8 sends the root to a running collector over a socket; after its end none listens there.
                if not tries or COLLECTOR_SOCKET not in str(error):
                    raise error
            await asyncio.sleep(ROOT_PAUSE_S)

    async def _add_temp_roots(self, paths: Sequence[str]) -> dict[str, DaemonOperationError]:
        """Request all before the first is answered; return those that were refused."""
        refused: dict[str, DaemonOperationError] = {}
        async with self._guarded():
            async with self._noticing_silence():
                await self._channel.send(_roots_request(paths))
            for path in paths:
                try:
                    async with self._noticing_silence():
                        await self._until_last(ignore)
                        await self._channel.decode(Inbox.read_int)
                except DaemonOperationError as error:
                    refused[path] = error
        return refused

    async def root_valid_paths(self, paths: Iterable[str]) -> frozenset[str]:
        """Do `add_temp_roots`, then `query_valid_paths`; up to ROOTS_AT_ONCE paths are requested all together."""
        wanted = sorted(set(paths))
        if not wanted or len(wanted) > ROOTS_AT_ONCE:
            await self.add_temp_roots(wanted)
            return await self.query_valid_paths(wanted)
        question = Encoder().integer(Operation.QUERY_VALID_PATHS).strings(wanted).integer(0).getvalue()
        async with self._guarded():
            async with self._noticing_silence():
                await self._channel.send(_roots_request(wanted) + question)
                refused = [path for path in wanted if not await self._is_root_taken()]
                await self._until_last(ignore)
            valid = frozenset(await self._channel.words("valid paths", len(wanted)))
        if not refused:
            return valid
        # They may be collected until they are kept: what was said of them before that counts for nothing.
        await self.add_temp_roots(refused)
        return valid.difference(refused) | await self.query_valid_paths(refused)

    async def build_derivation(
        self,
        drv_path: str,
        derivation: BasicDerivation,
        on_event: Callable[[BuildEvent], Awaitable[object] | None],
        *,
        mode: BuildMode = BuildMode.NORMAL,
    ) -> BuildResult:
        """Build, and wait for the verdict.

        The .drv need not exist; its name gives logs and fixed outputs their names. Input-addressed builds need a
        trusted connection (an untrusted one has its drv_path rewritten, so its log lines are not attributed).
        Cancelling the caller hangs up: the builder is killed and the connection is unusable.

        Args:
            drv_path: Full path that ends in `.drv`.
            derivation: What to build.
            on_event: Called in order for each log line, phase and message. What it returns, if anything, is awaited
                before the next is read, so a builder that prints too much can be slowed down. If it raises, the
                build is aborted and the error goes to the caller.
            mode: What to do with valid outputs.

        Raises:
            ValueError: drv_path is not the path of a derivation (2.8 would abort by an assertion).
        """
        request = _build_request(drv_path, derivation, mode)
        listener = BuildListener(drv_path, on_event)
        try:
            async with self._request(request, listener):
                return await self._read_build_result(drv_path)
        except DaemonOperationError as error:
            error.builder_ran = listener.began
            raise

    async def build_in_one_go(
        self,
        drv_path: str,
        derivation: BasicDerivation,
        on_event: Callable[[BuildEvent], Awaitable[object] | None],
        *,
        options: Options | None = None,
        roots: Sequence[str] = (),
    ) -> BuildInOneGo:
        """Set options, keep up to ROOTS_AT_ONCE paths, build, and look at the outputs: requested all together.

        Each request that is waited for wakes both sides, which costs more than it does. Otherwise as
        `build_derivation`, but that any error leaves the connection unusable.
        """
        looks = [output.path for output in derivation.outputs][:LOOKS_AT_ONCE]
        requests = [_roots_request(roots), _build_request(drv_path, derivation, BuildMode.NORMAL).getvalue()]
        if options is not None:
            requests.insert(0, _options_request(options).getvalue())
        requests += [Encoder().integer(Operation.QUERY_PATH_INFO).string(path).getvalue() for path in looks]
        listener = BuildListener(drv_path, on_event)
        refused: list[str] = []
        infos: dict[str, PathInfo] = {}
        async with self._guarded():
            try:
                async with self._noticing_silence():
                    await self._channel.send(b"".join(requests))
                if options is not None:
                    async with self._noticing_silence():
                        await self._until_last(ignore)
                for path in roots:
                    async with self._noticing_silence():
                        if not await self._is_root_taken():
                            refused.append(path)
                async with self._noticing_silence():
                    await self._until_last(listener)
            except DaemonOperationError as error:
                error.builder_ran = listener.began
                # What was requested after it will be answered all the same.
                self.abort(str(error))
                raise
            result = await self._read_build_result(drv_path)
            for path in looks:
                with suppress(DaemonOperationError):
                    await self._until_last(ignore)
                    info = await self._read_path_info(path)
                    if info is not None:
                        infos[path] = info
        return BuildInOneGo(result, infos, tuple(refused))

    async def _is_root_taken(self) -> bool:
        try:
            await self._until_last(ignore)
        except DaemonOperationError:
            return False
        await self._channel.decode(Inbox.read_int)
        return True

    async def _read_build_result(self, drv_path: str) -> BuildResult:
        store_dir = drv_path.rpartition("/")[0]
        return await self._channel.decode(lambda inbox: BuildResult.decode(inbox, self.version[1], store_dir))

    async def _read_path_info(self, path: str) -> PathInfo | None:
        return await self._channel.decode(lambda inbox: decode_path_info(path, inbox) if inbox.read_bool() else None)

    async def nar_from_path(self, path: str, nar_size: int) -> AsyncGenerator[bytes, None]:
        """Yield the NAR of a valid path in pieces of at most 1 MiB.

        The NAR has no length on the wire, so `nar_size` (of query_path_info) says where it ends. Leaving the iteration
        early makes the connection unusable, because the rest would be taken for the next reply.

        Raises:
            DaemonOperationError: The path is not valid.
            DaemonProtocolError: The bytes are not a NAR of that size.
        """
        # The daemon reports success before it looks: an absent path would cost the connection.
        if not await self._is_valid(path):
            raise DaemonOperationError(0, f"path '{path}' is not valid")
        async with self._request(Encoder().integer(Operation.NAR_FROM_PATH).string(path)):
            left = nar_size
            ends = bytearray()
            while left:
                if not len(self._channel.inbox):
                    await self._channel.fill(1)
                chunk = self._channel.inbox.read_raw(min(left, NAR_CHUNK_BYTES))
                if left == nar_size and not _NAR_BEGINNING.startswith(chunk[: len(_NAR_BEGINNING)]):
                    raise DaemonProtocolError(f"{path}: the daemon sent something that is not a NAR")
                left -= len(chunk)
                ends = (ends + chunk[-len(_NAR_END) :])[-len(_NAR_END) :]
                if not left and ends != _NAR_END:
                    raise DaemonProtocolError(f"{path}: its NAR does not end after {nar_size} bytes")
                yield chunk

    async def add_to_store_nar(self, upload: Upload, *, dont_check_sigs: bool, repair: bool = False) -> None:
        """Add one path. Its references must be valid already.

        Args:
            upload: Metadata and NAR.
            dont_check_sigs: Accept it unsigned; only a trusted client is obeyed.
            repair: Replace the path if it is there.

        Raises:
            DaemonOperationError: Among others, the NAR does not have the declared hash.
            DaemonSourceError: The NAR does not have the declared size. The connection stays usable, as it does when
                the iterator raises an error of its own, which is passed on.
        """
        request = Encoder().integer(Operation.ADD_TO_STORE_NAR)
        encode_path_info(upload.info, request)
        request.integer(repair).integer(dont_check_sigs)
        await self._upload(request, checked_nar(upload))

    async def add_multiple_to_store(
        self, uploads: Iterable[Upload], *, dont_check_sigs: bool, repair: bool = False
    ) -> None:
        """Add many paths in one stream, references first. Arguments and errors as add_to_store_nar."""
        request = Encoder().integer(Operation.ADD_MULTIPLE_TO_STORE).integer(repair).integer(dont_check_sigs)
        await self._upload(request, many_paths(uploads))

    async def collect_garbage(
        self, action: GcAction, *, paths: Iterable[str] = (), max_freed_bytes: int = NO_LIMIT
    ) -> Collected:
        """Delete, or list, garbage; `paths` are for GcAction.DELETE_SPECIFIC."""
        request = Encoder().integer(Operation.COLLECT_GARBAGE).integer(action).strings(sorted(paths))
        request.integer(0).integer(max_freed_bytes).integer(0).integer(0).integer(0)
        async with self._request(request):
            collected = await self._channel.words("collected paths", MAX_LIST_ITEMS)
            freed_bytes = await self._channel.decode(Inbox.read_int)
            await self._channel.decode(Inbox.read_int)
            return Collected(tuple(collected), freed_bytes)

    async def _is_valid(self, path: str) -> bool:
        async with self._request(Encoder().integer(Operation.IS_VALID_PATH).string(path)):
            return await self._channel.decode(Inbox.read_bool)


def _options_request(options: Options) -> Encoder:
    request = Encoder().integer(Operation.SET_OPTIONS)
    options.encode(request)
    return request


def _roots_request(paths: Iterable[str]) -> bytes:
    return b"".join(Encoder().integer(Operation.ADD_TEMP_ROOT).string(path).getvalue() for path in paths)


def _build_request(drv_path: str, derivation: BasicDerivation, mode: BuildMode) -> Encoder:
    if not drv_path.endswith(".drv"):
        raise ValueError(f"{drv_path!r} is not the path of a derivation")
    request = Encoder().integer(Operation.BUILD_DERIVATION).string(drv_path)
    derivation.encode(request)
    return request.integer(mode)
