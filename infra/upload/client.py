"""The sending side of the upload protocol (`infra.upload.protocol`), for workers and for `drover cache push`.

One `begin`, any number of objects at once, one `commit`; `upload_all` does the three. Small objects that a sender can
make in a thread (`MakeObject`) go in packs where the coordinator takes them. Each object is compressed while
it is sent, and at most a few parts of it are in memory. A request that fails in a way that may pass is made again, a
bounded number of times with growing pauses; what the other side has already is skipped, so that an upload which was
cut goes on where it was. Where the coordinator began anew meanwhile, the upload is begun again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import field, replace
from typing import Final, TypeVar
from urllib.parse import quote

from infra.exchange import AddressError, Answer, BadAnswerError, Connections
from infra.objects.compression import COMPRESSION, Compression
from infra.objects.nar_encoder import MADE_BYTES, CompressedNar
from infra.records import record
from infra.retry import spread
from infra.upload.answers import parse, require_success
from infra.upload.errors import BehindError, SenderRefusedError, UploadFailedError
from infra.upload.packs import MakeObject, Pack, SourceChangedError, grouped, is_small, make_pack, require_claimed
from infra.upload.part_sender import PartSender
from infra.upload.pieces import gathered, one_ahead
from infra.upload.protocol import (
    HASHES_HEADER,
    HASHES_MADE,
    MAX_PATHS,
    MAX_URLS,
    SINGLE_BYTES,
    UPLOAD_TTL_S,
    Begin,
    Begun,
    Commit,
    Committed,
    KeepRequest,
    PackTaken,
    Parts,
    PartsWanted,
    PathClaim,
    SendRoute,
    SendStatus,
    SendVerdict,
    SentOffset,
    SentPath,
    UploadMessage,
    Urls,
    UrlsWanted,
    part_bytes,
)

#: Tries of one request, the first pause between two and the longest (seconds).
TRIES: Final = 6
PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 5.0
#: Seconds to connect, and without a byte; an answer to a commit comes after everything was verified.
CONNECT_S: Final = 10.0
SILENCE_S: Final = 60.0
COMMIT_S: Final = 3600.0
#: Seconds for all of another answer.
ANSWER_S: Final = 120.0
#: Times that a whole upload is begun again, and that a path is sent again which arrived damaged.
BEGINNINGS: Final = 3
#: Paths that changed which an error names.
CHANGED_NAMED: Final = 8

_Message = TypeVar("_Message", bound=UploadMessage)
_Answer = TypeVar("_Answer")
#: Opens the NAR of a claimed path, compressed as the cache wants it.
OpenNar = Callable[[PathClaim, Compression], AbstractAsyncContextManager[CompressedNar]]


@record(frozen=True, slots=True)
class UploadResult:
    """Outcome of an upload: a verdict for each path that was sent, and those that were not."""

    verdicts: tuple[SendVerdict, ...]
    present: tuple[str, ...]
    upstream: tuple[str, ...]
    sent: tuple[SentPath, ...]
    #: Paths that are published with other bits than these, sent now or before.
    conflicts: tuple[str, ...] = ()
    compression: Compression = COMPRESSION


@record(slots=True)
class UploadProgress:
    """Counts while an upload runs; bytes are compressed ones that left this machine."""

    wanted: int = 0
    paths: int = 0
    nar_bytes: int = 0
    sent_bytes: int = 0


@record(slots=True)
class _Source:
    """Source of what one upload sends, and what was found of it on the way."""

    open_nar: OpenNar
    make_object: MakeObject | None
    #: Objects, or packs, at one time.
    parallel: int
    #: The same without hashes, for a coordinator that makes them; None once they are sent with hashes.
    open_unhashed: OpenNar | None = None
    make_unhashed: MakeObject | None = None
    changed: list[SourceChangedError] = field(default_factory=list)
    #: Path -> why the coordinator did not take it out of a pack.
    refused: dict[str, str] = field(default_factory=dict)

    def hash_all(self) -> None:
        """Have everything hashed from here on."""
        self.open_unhashed = self.make_unhashed = None

    def explained(self, verdict: SendVerdict) -> SendVerdict:
        """Return a verdict with the reason of the pack in which the path came."""
        if verdict.status is not SendStatus.REFUSED or verdict.path not in self.refused:
            return verdict
        return replace(verdict, message=self.refused[verdict.path])


def upload_connections() -> Connections:
    """Return connections with the bounds of this module; their holder closes them."""
    return Connections(connect_s=CONNECT_S, silence_s=SILENCE_S)


class UploadClient:
    """Calls the upload routes below one cache's address. The connections are the caller's."""

    def __init__(self, connections: Connections, cache_url: str, token: str) -> None:
        self._connections = connections
        self._base = f"{cache_url}/uploads"
        self._cache_url = cache_url
        self._headers = {"Authorization": f"Bearer {token}"}
        self.progress = UploadProgress()

    async def upload_all(
        self,
        claims: Sequence[PathClaim],
        open_nar: OpenNar,
        *,
        parallel: int,
        keep: KeepRequest | None = None,
        make_object: MakeObject | None = None,
        open_unhashed: OpenNar | None = None,
        make_unhashed: MakeObject | None = None,
    ) -> UploadResult:
        """Upload all paths (at most MAX_PATHS), references in any order, `parallel` objects at a time.

        `open_unhashed` and `make_unhashed` do the same without hashes, for a coordinator that makes them while objects
        arrive. What it refuses then is sent again with hashes: they tell a source that changed from damaged bytes.

        Raises:
            SenderRefusedError: the coordinator refuses.
            SourceChangedError: paths are not what they were claimed to be; what does not need them was uploaded.
            UploadFailedError: the coordinator, or the object store, cannot be reached.
            OSError, CacheError: as `open_nar` gives it.
        """
        if len(claims) > MAX_PATHS:
            raise UploadFailedError(f"{len(claims)} paths at once are too many; the limit is {MAX_PATHS}")
        for left in reversed(range(BEGINNINGS)):
            try:
                source = _Source(open_nar, make_object, parallel, open_unhashed, make_unhashed)
                return await self._upload_all(claims, source, keep)
            except SenderRefusedError as error:
                if error.code != "unknown_upload" or not left:
                    raise
        raise AssertionError

    async def _upload_all(self, claims: Sequence[PathClaim], source: _Source, keep: KeepRequest | None) -> UploadResult:
        answer = await self._exchange("POST", "", Begin(paths=tuple(claims)))
        begun = parse(answer, Begun)
        if answer.headers.get(HASHES_HEADER.lower()) != HASHES_MADE or begun.how is not SendRoute.RELAY:
            source.hash_all()
        by_path = {claim.path: claim for claim in claims}
        self.progress.wanted = len(begun.send)
        self.progress.paths = self.progress.nar_bytes = 0
        waking = asyncio.create_task(self._renew(begun.id))
        try:
            sent = [*begun.arrived, *await self._send_all(begun, [by_path[path] for path in begun.send], source)]
            verdicts = await self._commit(begun, sent, keep)
            damaged = [verdict.path for verdict in verdicts if verdict.status is SendStatus.REFUSED]
            if damaged:
                # Once more from the start: what had arrived before may have been of another release's making.
                source.hash_all()
                again = await self._send_all(begun, [by_path[path] for path in damaged], source)
                sent = [*(each for each in sent if each.path not in set(damaged)), *again]
                verdicts = await self._commit(begun, sent, keep)
        finally:
            waking.cancel()
            await asyncio.wait([waking])
        if source.changed:
            raise _changed(source.changed)
        verdicts = [source.explained(verdict) for verdict in verdicts]
        lost = (verdict.path for verdict in verdicts if verdict.status is SendStatus.CONFLICT)
        conflicts = (*begun.conflicts, *lost)
        return UploadResult(tuple(verdicts), begun.present, begun.upstream, tuple(sent), conflicts, begun.compression)

    async def _send_all(self, begun: Begun, claims: Sequence[PathClaim], source: _Source) -> list[SentPath]:
        """Send objects, largest first, so that no large one is left for the end; then packs of small ones."""
        make = (source.make_unhashed or source.make_object) if begun.packs else None
        packs = grouped(claim for claim in claims if make and is_small(claim))
        alone = [claim for claim in claims if not (make and is_small(claim))]
        alone.sort(key=lambda claim: claim.nar_size)
        sent: list[SentPath] = []
        room = asyncio.Semaphore(source.parallel)

        async def work() -> None:
            while True:
                async with room:
                    if alone:
                        sent.extend(await self._send(begun, alone.pop(), source))
                        continue
                    if make is None or not packs:
                        return
                    pack = await asyncio.to_thread(make_pack, packs.pop(), begun.compression, make)
                # The next one is made while the coordinator verifies this one.
                source.changed.extend(pack.changed)
                sent.extend(await self._send_pack(begun, pack, source))

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(source.parallel * (2 if packs else 1), len(packs) + len(alone))):
                    tasks.create_task(work())
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return sent

    async def _send(self, begun: Begun, claim: PathClaim, source: _Source) -> list[SentPath]:
        """Send one object; nothing is returned for one that changed."""
        for left in reversed(range(BEGINNINGS)):
            try:
                async with (source.open_unhashed or source.open_nar)(claim, begun.compression) as nar:
                    send = self._relay if begun.how is SendRoute.RELAY else self._direct
                    etags = await send(begun.id, claim, nar.pieces)
                    uploaded = nar.uploaded()
                require_claimed(claim, uploaded)
            except BehindError:
                if not left:
                    raise
                continue
            except SourceChangedError as error:
                source.changed.append(error)
                return []
            self.progress.paths += 1
            self.progress.nar_bytes += claim.nar_size
            stored = uploaded.stored
            return [SentPath(path=claim.path, file_hash=stored.file_hash, file_size=stored.file_size, etags=etags)]
        raise AssertionError

    async def _send_pack(self, begun: Begun, pack: Pack, source: _Source) -> Sequence[SentPath]:
        if not pack.sent:
            return ()

        async def post() -> PackTaken:
            url = f"{self._base}/{begun.id}/pack"
            answer = await self._connections.ask("POST", url, headers=self._headers, body=pack.body)
            require_success(answer)
            return parse(answer, PackTaken)

        for attempt in range(TRIES):
            taken = await self._again(post, attempt)
            if taken is not None:
                source.refused.update(taken.refused)
                self.progress.paths += len(pack.sent)
                self.progress.nar_bytes += pack.nar_bytes
                self.progress.sent_bytes += len(pack.body)
                return pack.sent
        raise UploadFailedError(
            f"a pack of {len(pack.sent)} paths could not be sent: {self._cache_url} did not take it"
        )

    async def _renew(self, upload: str) -> None:
        while True:
            await asyncio.sleep(UPLOAD_TTL_S / 4)
            try:
                await self._ask("POST", f"/{upload}/renew", None)
            except UploadFailedError:
                # What is being sent will meet the same fault, and raise it.
                continue

    async def _commit(self, begun: Begun, sent: Sequence[SentPath], keep: KeepRequest | None) -> list[SendVerdict]:
        """Commit, and again while the store fails."""
        request = Commit(sent=tuple(sent), keep=keep)
        for attempt in range(TRIES):
            verdicts = (await self._ask("POST", f"/{begun.id}/commit", Committed, request, total_s=COMMIT_S)).verdicts
            if attempt + 1 == TRIES or all(verdict.status is not SendStatus.FAILED for verdict in verdicts):
                return list(verdicts)
            await _pause(attempt)
        raise AssertionError

    # Through the coordinator.

    async def _relay(self, upload: str, claim: PathClaim, pieces: AsyncIterator[bytes]) -> tuple[str, ...]:
        offset = there = 0
        async with aclosing(one_ahead(gathered(pieces, MADE_BYTES))) as ready:
            async for piece in ready:
                end = offset + len(piece)
                if there < end:
                    there = await self._relay_piece(upload, claim.path, offset, piece)
                offset = end
        return ()

    async def _relay_piece(self, upload: str, path: str, offset: int, piece: bytes) -> int:
        """Send one piece, or what the other side lacks of it; returns how much it has of the object then."""
        start = offset
        # Names may have a question mark in them.
        url = f"{self._base}/{upload}/nar/{quote(path, safe='')}"

        async def put() -> SentOffset | None:
            nonlocal start
            data = memoryview(piece)[start - offset :]
            answer = await self._connections.ask("PUT", f"{url}?offset={start}", headers=self._headers, body=data)
            if answer.status == 409:
                accepted = parse(answer, SentOffset)
                if accepted.offset < offset:
                    raise BehindError(f"the coordinator lost what it had of {path}")
                start = accepted.offset
                return accepted if start >= offset + len(piece) else None
            require_success(answer)
            self.progress.sent_bytes += len(data)
            return parse(answer, SentOffset)

        for attempt in range(TRIES):
            done = await self._again(put, attempt)
            if done is not None:
                return done.offset
        raise UploadFailedError(f"{path} could not be sent: the coordinator at {self._cache_url} did not take it")

    # Straight to the object store.

    async def _direct(self, upload: str, claim: PathClaim, pieces: AsyncIterator[bytes]) -> tuple[str, ...]:
        size = part_bytes(claim.nar_size)
        parts = gathered(pieces, size).__aiter__()
        first = await anext(parts)
        second = await anext(parts, None)
        if second is None and len(first) <= SINGLE_BYTES:

            async def addresses() -> str:
                wanted = UrlsWanted(paths=(claim.path,))
                return (await self._ask("POST", f"/{upload}/urls", Urls, wanted)).urls[claim.path]

            await self._put(claim.path, addresses, first)
            return ()
        sender = PartSender(self, upload, claim)
        try:
            async with asyncio.TaskGroup() as tasks:
                number = 0
                for part in (first, second):
                    if part is not None:
                        number += 1
                        await sender.submit(tasks, number, part)
                del first, second
                async for part in parts:
                    number += 1
                    await sender.submit(tasks, number, part)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return tuple(sender.etags[number] for number in sorted(sender.etags))

    async def parts(self, upload: str, path: str, first: int) -> Parts:
        """Ask for the addresses of the parts from `first` on."""
        wanted = PartsWanted(path=path, first=first, count=MAX_URLS)
        try:
            return await self._ask("POST", f"/{upload}/parts", Parts, wanted)
        except SenderRefusedError as error:
            if error.status == 409:
                raise BehindError(f"the upload of {path} has been ended by somebody else") from None
            raise

    async def put(self, path: str, address: Callable[[], Awaitable[str]], data: bytes) -> str:
        """PUT bytes to a presigned address; returns the ETag."""
        return await self._put(path, address, data)

    async def _put(self, path: str, address: Callable[[], Awaitable[str]], data: bytes) -> str:
        problem = ""
        for attempt in range(TRIES):
            url = await address()
            try:
                # No headers of ours: a presigned request with credentials beside it is refused.
                answer = await self._connections.ask("PUT", url, headers={}, body=data)
            except TimeoutError:
                problem = f"was silent for {SILENCE_S:.0f} s"
            except AddressError:
                raise UploadFailedError(f"{path} could not be sent: its address is none of HTTP") from None
            except (BadAnswerError, OSError) as error:
                problem = f"cannot be reached ({type(error).__name__})"
            else:
                if answer.status == 200:
                    self.progress.sent_bytes += len(data)
                    return answer.headers.get("etag", "").strip('"')
                problem = f"answered with status {answer.status}"
                if answer.status == 404:
                    raise BehindError(f"the upload of {path} has been ended by somebody else")
                if answer.status < 500 and answer.status not in {403, 408, 429}:
                    break
            await _pause(attempt)
        raise UploadFailedError(f"{path} could not be sent: the object store {problem}")

    # Requests.

    async def _ask(
        self,
        verb: str,
        address: str,
        model: type[_Message] | None,
        body: UploadMessage | None = None,
        total_s: float = ANSWER_S,
    ) -> _Message:
        answer = await self._exchange(verb, address, body, total_s)
        return None if model is None else parse(answer, model)  # type: ignore[return-value]  # then it is not used

    async def _exchange(
        self, verb: str, address: str, body: UploadMessage | None = None, total_s: float = ANSWER_S
    ) -> Answer:
        text = b"" if body is None else await asyncio.to_thread(body.json)
        headers = {**self._headers, "Content-Type": "application/json"}

        async def ask() -> Answer:
            async with asyncio.timeout(total_s):
                answer = await self._connections.ask(
                    verb, self._base + address, headers=headers, body=text, silence_s=total_s
                )
            require_success(answer)
            return answer

        for attempt in range(TRIES):
            answer = await self._again(ask, attempt)
            if answer is not None:
                return answer
        raise UploadFailedError(f"the coordinator at {self._cache_url} does not answer; the next try goes on from here")

    async def _again(self, ask: Callable[[], Awaitable[_Answer | None]], attempt: int) -> _Answer | None:
        """Ask once; None after a pause where that failed in a way that may pass, or there was nothing to say."""
        try:
            return await ask()
        except SenderRefusedError as error:
            if error.status not in {408, 429, 503} or attempt + 1 == TRIES:
                raise
        except AddressError:
            raise UploadFailedError(f"{self._cache_url} is not an address") from None
        except (BadAnswerError, OSError) as error:  # TimeoutError is one
            if attempt + 1 == TRIES:
                raise UploadFailedError(
                    f"the coordinator at {self._cache_url} cannot be reached ({str(error) or type(error).__name__})"
                ) from error
        await _pause(attempt)
        return None


async def _pause(attempt: int) -> None:
    await asyncio.sleep(spread(min(MAX_PAUSE_S, PAUSE_S * 2**attempt)))


def _changed(errors: Sequence[SourceChangedError]) -> SourceChangedError:
    """Return one error that names some of them all."""
    named = "; ".join(str(error) for error in errors[:CHANGED_NAMED])
    more = f"; and {len(errors) - CHANGED_NAMED} more" if len(errors) > CHANGED_NAMED else ""
    return SourceChangedError(f"{named}{more}; what does not refer to it was uploaded")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group that is not itself a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
