"""Another binary cache that is trusted by its public keys: what it has with a valid signature, and its NARs.

What an upstream has need not be uploaded here, and what broke here can be fetched from there. Only a narinfo of the
path that was requested, of the same store directory and signed by one of the keys counts; anything else is as if it
were not there. An upstream that fails is left alone for REST_S and has nothing meanwhile: it is a convenience, and
no client must wait for it twice. Only `inquire`, for work without a waiting client, asks each path by itself and says
why one does not count.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self
from urllib.parse import urljoin, urlsplit

import aiohttp

from infra.nix import narinfo as narinfo_format
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo
from infra.nix.signing import PublicKey
from infra.nix.store_path import HASH_PART_PATTERN, StoreDir, hash_part_of
from infra.objects.errors import CacheError, CorruptNarError, ObjectStoreError
from infra.objects.verification import VerifiedNar
from infra.substituter.closures import QUESTION_PATHS, ClosureAnswer, QuestionAnswerError, QuestionRefusedError

#: Requests to one upstream at one time.
UPSTREAM_CONCURRENCY: Final = 16
CONNECT_S: Final = 5.0
#: For a narinfo, from question to answer.
NARINFO_S: Final = 20.0
#: For a closure, and how many paths are worth that question.
CLOSURE_S: Final = 120.0
AT_ONCE_FROM: Final = 2
#: Narinfos whose signatures are verified before the event loop looks after others; that are remembered unverified.
JUDGED_AT_ONCE: Final = 16
LEARNT_AT_ONCE: Final = 500
#: Bytes of a narinfo that is remembered before its signature is verified.
MAX_UNJUDGED_BYTES: Final = 4 * 1024
#: A NAR may take as long as it likes, but not be silent for so long.
SILENCE_S: Final = 60.0
#: Nor come more slowly than so, on the whole.
LEAST_BYTES_PER_S: Final = 4 * 1024
MAX_NARINFO_BYTES: Final = 8 * 1024 * 1024
MAX_REDIRECTS: Final = 5
#: Narinfos that are remembered, and for how long; that there is none, for less than a minute.
REMEMBERED: Final = 20_000
FOUND_S: Final = 3600.0
NOT_FOUND_S: Final = 30.0
#: How long no request goes to an upstream that failed.
REST_S: Final = 30.0
#: Answers that mean "not here" (infra/nix/FORMATS.md 6.2).
_STORE_PATH: Final = re.compile(rf"^StorePath: \S*/({HASH_PART_PATTERN})-".encode(), re.MULTILINE)
_ABSENT: Final = frozenset({403, 404, 410})


class UpstreamError(CacheError):
    """An upstream did not answer, or not as a binary cache does."""


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Answer of an upstream about one path."""

    #: What it has, with a trusted signature.
    info: NarInfo | None = None
    #: A clause about why what it sent does not count; "" where it simply lacks the path.
    fault: str = ""
    #: The fault may pass: there was no answer, or an error of the upstream's own.
    passing: bool = False


class Upstream:
    """One upstream; a context manager, for the tasks of one event loop. `now` gives seconds that only rise."""

    def __init__(
        self,
        url: str,
        public_keys: Sequence[PublicKey],
        store_dir: StoreDir,
        now: Callable[[], float],
        *,
        mirrored: bool = True,
        token: str = "",
    ) -> None:
        """`token` is of a reader of a cache that is not public; it goes to no other host."""
        if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
            raise CacheError(f"an upstream cache is named by http:// or https://, not {url[:80]!r}")
        if not public_keys:
            raise CacheError(f"the upstream {url} needs a public key: nothing of it could be trusted")
        self.url = url.rstrip("/")
        #: Whether mirroring publishes its paths here, or only records that it has them.
        self.mirrored = mirrored
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._keys = tuple(public_keys)
        self._store_dir = store_dir
        self._now = now
        self._turns = asyncio.Semaphore(UPSTREAM_CONCURRENCY)
        #: Hash part -> (what is there, until when that is believed), oldest first; bytes are not judged yet.
        self._known: OrderedDict[str, tuple[NarInfo | bytes | None, float]] = OrderedDict()
        self._rests_until = float("-inf")
        #: Whether it answers the question for a closure; None until it was asked.
        self._answers_closures: bool | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=UPSTREAM_CONCURRENCY),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
        )
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def name(self) -> str:
        """Name in reports."""
        return self.url

    @property
    def is_away(self) -> bool:
        """True while it is left alone after a failure, so that it seems to have nothing."""
        return self._now() < self._rests_until

    @property
    def answers_closures(self) -> bool:
        """True once it has answered the question for a closure, so that many paths are best asked for at once."""
        return self._answers_closures is True

    async def narinfos(self, hash_parts: Collection[str]) -> dict[str, NarInfo]:
        """Return, by hash part, what the upstream has with a trusted signature; nothing while it fails."""
        found: dict[str, NarInfo] = {}
        unknown = await self._recall(set(hash_parts), found)
        if len(unknown) >= AT_ONCE_FROM and self._answers_closures is not False:
            await self._ask_at_once(unknown)
            unknown = await self._recall(unknown, found)
        remaining = iter(unknown)

        async def ask() -> None:
            for hash_part in remaining:
                info = await self._ask(hash_part)
                if info is not None:
                    found[hash_part] = info

        # As many tasks as may be under way, not as many as there are questions.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(UPSTREAM_CONCURRENCY, len(unknown))):
                tasks.create_task(ask())
        return found

    async def present(self, store_paths: Collection[str]) -> set[str]:
        """Return those of the full store paths that the upstream has with a trusted signature."""
        hash_parts = {path: hash_part_of(path) for path in store_paths}
        found = await self.narinfos(set(hash_parts.values()))
        return {path for path, part in hash_parts.items() if part in found and found[part].store_path == path}

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None] | None:
        """Return the NAR of this path if the upstream has it with the same hash, else None.

        The generator yields it in pieces and ends normally only if it was whole and right; close it if you leave it
        early. It raises CorruptNarError or UpstreamError.
        """
        theirs = (await self.narinfos([info.hash_part])).get(info.hash_part)
        if theirs is None or (theirs.store_path, theirs.path.nar_hash) != (info.store_path, info.path.nar_hash):
            return None
        return self.fetch(theirs)

    async def inquire(self, store_path: str) -> Inquiry:
        """Ask for one full store path, whatever became of other questions, and say why what it sent does not count."""
        hash_part = hash_part_of(store_path)
        recalled: dict[str, NarInfo] = {}
        await self._recall((hash_part,), recalled)
        inquiry = Inquiry(recalled[hash_part]) if recalled else await self._inquire(hash_part)
        if inquiry.info is None:
            return inquiry
        self._remember(hash_part, inquiry.info)
        if inquiry.info.store_path != store_path:
            return Inquiry(fault=f"the upstream {self.url} has another path there, {inquiry.info.store_path}")
        return inquiry

    async def _inquire(self, hash_part: str) -> Inquiry:
        passing = True
        try:
            async with self._turns:
                text = await self._get_narinfo(hash_part)
            return Inquiry() if text is None else self._judge(text, hash_part)
        except aiohttp.TooManyRedirects:
            reason, passing = f"{self.url} redirects in a circle", False
        except TimeoutError:
            reason = f"{self.url} does not answer in time"
        except UpstreamError as error:
            reason = str(error)
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"{self.url} cannot be asked: {_first_line(error)}"
        return Inquiry(fault=f"the upstream {reason}", passing=passing)

    async def _ask_at_once(self, hash_parts: Sequence[str]) -> None:
        """Learn what a farm as the upstream has of these and of all that they reach; any other upstream refuses it."""
        for names in (hash_parts[at : at + QUESTION_PATHS] for at in range(0, len(hash_parts), QUESTION_PATHS)):
            question = ClosureAnswer(self._opened(), self.url, self._headers, names)
            within_s = NARINFO_S if self._answers_closures is None else CLOSURE_S
            try:
                async with self._turns, asyncio.timeout(within_s), aclosing(question.narinfos()) as pages:
                    if self.is_away:
                        return
                    async for texts in pages:
                        self._answers_closures = True
                        await self._learn(texts)
            except (QuestionRefusedError, QuestionAnswerError) as error:
                if not isinstance(error, QuestionRefusedError) or error.status < 500:
                    # One that answered before says that this closure is too large, say.
                    self._answers_closures = self._answers_closures or False
                return
            except (aiohttp.ClientConnectorError, TimeoutError):
                self._rests_until = self._now() + REST_S
                return
            except aiohttp.ClientError:
                # Some servers close the connection of a question that they do not know; plain requests judge.
                return
            self._answers_closures = True
            for name in set(question.missing).intersection(names):
                self._remember(name, None)

    async def _learn(self, texts: Sequence[bytes]) -> None:
        """Remember narinfos. Most were sent along with what was asked for: they are judged once they are wanted."""
        now = self._now()
        for number, text in enumerate(texts):
            if number % LEARNT_AT_ONCE == 0:
                await asyncio.sleep(0)
            part = _STORE_PATH.search(text)
            if part is not None and len(text) <= MAX_UNJUDGED_BYTES:
                known, until = self._known.get(part[1].decode("ascii"), (None, now))
                if known is None or until <= now:
                    self._remember(part[1].decode("ascii"), text)
            elif part is not None and (info := self._judge(text, part[1].decode("ascii")).info) is not None:
                self._remember(info.hash_part, info)

    async def _recall(self, hash_parts: Iterable[str], found: dict[str, NarInfo]) -> list[str]:
        """Add what is remembered to `found`, with a trusted signature; return the parts of which nothing is."""
        now, judged = self._now(), 0
        unknown = []
        for part in hash_parts:
            known, until = self._known.get(part, (None, float("-inf")))
            info = None if isinstance(known, bytes) else known
            if isinstance(known, bytes) and until > now:
                judged += 1
                if judged % JUDGED_AT_ONCE == 0:
                    await asyncio.sleep(0)
                info = self._judge(known, part).info
                # Where it does not count, the path is asked for by itself.
                until = until if info is not None else float("-inf")
                self._known[part] = (info, until)
            if until <= now:
                unknown.append(part)
            elif info is not None:
                found[part] = info
        return unknown

    async def _ask(self, hash_part: str) -> NarInfo | None:
        async with self._turns:
            if self._now() < self._rests_until:
                return None
            try:
                text = await self._get_narinfo(hash_part)
            # Of a redirection to what is no name of a host `ValueError` comes.
            except (aiohttp.ClientError, TimeoutError, UpstreamError, ValueError):
                self._rests_until = self._now() + REST_S
                return None
        info = None if text is None else self._judge(text, hash_part).info
        self._remember(hash_part, info)
        return info

    def _remember(self, hash_part: str, info: NarInfo | bytes | None) -> None:
        self._known[hash_part] = (info, self._now() + (NOT_FOUND_S if info is None else FOUND_S))
        self._known.move_to_end(hash_part)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    async def _get_narinfo(self, hash_part: str) -> bytes | None:
        timeout = aiohttp.ClientTimeout(total=NARINFO_S, sock_connect=CONNECT_S)
        address = f"{self.url}/{hash_part}.narinfo"
        opened = self._opened().get(address, timeout=timeout, headers=self._headers, max_redirects=MAX_REDIRECTS)
        async with opened as response:
            if response.status in _ABSENT:
                return None
            if response.status != 200:
                raise UpstreamError(f"{self.url} answered {response.status}")
            text = bytearray()
            async for piece in response.content.iter_any():
                text += piece
                if len(text) > MAX_NARINFO_BYTES:
                    raise UpstreamError(f"{self.url} sent a narinfo of more than {MAX_NARINFO_BYTES} bytes")
            return bytes(text)

    def _judge(self, text: bytes, hash_part: str) -> Inquiry:
        try:
            info = narinfo_format.parse(text, self._store_dir)
        except FormatError as error:
            return Inquiry(fault=f"the upstream {self.url} sent what is no narinfo of this store: {error.message}")
        if info.hash_part != hash_part:
            return Inquiry(fault=f"the upstream {self.url} has another path there, {info.store_path}")
        fingerprint = info.path.fingerprint()
        if any(key.verify(fingerprint, signature) for key in self._keys for signature in info.path.sigs):
            return Inquiry(info)
        names = ", ".join(key.name for key in self._keys)
        return Inquiry(fault=f"the upstream {self.url} has it without a valid signature by {names}")

    async def fetch(self, info: NarInfo) -> AsyncGenerator[bytes, None]:
        """Yield the NAR of what `inquire` or `narinfos` gave; it raises as the generator of `nar` does."""
        try:
            address = urljoin(f"{self.url}/", info.stored.url)
            if urlsplit(address).scheme not in {"http", "https"}:
                raise UpstreamError(f"{self.url} has {info.store_path} at an address that is not http")
            # As it is stored: a NAR with a content encoding could be larger than it announces.
            headers = {"Accept-Encoding": "identity"}
            if urlsplit(address)[:2] == urlsplit(self.url)[:2]:
                headers |= self._headers
            async with (
                self._turns,
                self._opened().get(address, headers=headers, max_redirects=MAX_REDIRECTS) as response,
            ):
                if response.status != 200:
                    # It may have another object by now: the next question is not answered from memory.
                    self._known.pop(info.hash_part, None)
                    raise UpstreamError(f"{self.url} answered {response.status} for the NAR of {info.store_path}")
                async with aclosing(_verified(response, info)) as pieces:
                    async for data in pieces:
                        yield data
        except (aiohttp.ClientError, TimeoutError, ObjectStoreError, ValueError) as error:
            raise UpstreamError(f"{self.url} broke off the NAR of {info.store_path}: {_first_line(error)}") from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise CacheError(f"the upstream {self.url} is used outside its context")
        return self._session


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200] or type(error).__name__


class _ResponseSource:
    """A response's body for a thread that may block, while the event loop receives it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._content = response.content
        self._loop = asyncio.get_running_loop()
        self._came = 0
        self._waited_s = 0.0

    def read(self, size: int, /) -> bytes:
        try:
            return asyncio.run_coroutine_threadsafe(self._next(size), self._loop).result()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ObjectStoreError(str(error) or type(error).__name__) from error

    async def _next(self, size: int) -> bytes:
        began_s = self._loop.time()
        data = await self._content.read(size)
        self._waited_s += self._loop.time() - began_s
        self._came += len(data)
        if self._waited_s > SILENCE_S + self._came / LEAST_BYTES_PER_S:
            raise ObjectStoreError(f"after {self._came} bytes it comes too slowly")
        return data

    def close(self) -> None:
        """Nothing: the response closes itself."""


async def _verified(response: aiohttp.ClientResponse, info: NarInfo) -> AsyncGenerator[bytes, None]:
    reader = VerifiedNar(_ResponseSource(response), info)
    work = asyncio.ensure_future(asyncio.to_thread(reader.read))
    try:
        while data := await work:
            work = asyncio.ensure_future(asyncio.to_thread(reader.read))
            yield data
    finally:
        if not work.done():
            # A thread cannot be stopped, but what it waits for can be ended.
            response.close()
            await asyncio.wait([work])
        if not work.cancelled():
            with suppress(CorruptNarError, ObjectStoreError):
                work.result()
