"""A binary cache as the proxy asks it: ours by one question for a closure, any other by many requests at one time.

One that does not know the question refuses it (a status of the four hundreds), and is asked in the plain way from then
on. An upstream that cannot be reached, is silent, answers 5xx or sends nonsense is left alone for REST_S: Nix must not
wait for it with each path.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final
from urllib.parse import urljoin, urlsplit

import aiohttp

from coordinator.cache_proxy.errors import ProxyError
from coordinator.cache_proxy.model import MAX_NARINFO_BYTES, KnownPath
from infra.retry import Outage
from infra.substituter.closures import QUESTION_PATHS, ClosureAnswer, QuestionAnswerError, QuestionRefusedError

#: Connections to one upstream, and requests for narinfos among them.
CONNECTIONS: Final = 64
NARINFOS_AT_ONCE: Final = 48
CONNECT_S: Final = 5.0
#: Seconds for one narinfo; without a byte of a closure, and for all of it; without a byte of a NAR.
NARINFO_S: Final = 10.0
CLOSURE_SILENCE_S: Final = 10.0
CLOSURE_S: Final = 120.0
NAR_SILENCE_S: Final = 30.0
MAX_REDIRECTS: Final = 5
#: Seconds for which an upstream that failed is left alone.
REST_S: Final = 30.0
#: Statuses that mean "not here" (infra/nix/FORMATS.md 6.2).
_ABSENT: Final = frozenset({403, 404, 410})
_TOO_LARGE: Final = 413
_BUSY: Final = frozenset({408, 425, 429})

_log = logging.getLogger(__name__)


class UpstreamFailedError(ProxyError):
    """An upstream does not answer as a cache does; it is left alone for a while."""


class NarGoneError(ProxyError):
    """An upstream does not have a NAR that its narinfo names."""


class NarCutError(ProxyError):
    """A NAR did not come, or not to its end; the rest may come when it is asked for again."""


def _is_refusal(error: Exception) -> bool:
    """Return whether an upstream that was asked for the first time does not know the question for a closure.

    What fails just now, or is cut, may answer it later; the plain requests that follow judge.
    """
    if isinstance(error, QuestionRefusedError):
        return (300 <= error.status < 500 and error.status not in _BUSY) or error.status == 501
    # A page for people, say, which answers everything.
    return isinstance(error, QuestionAnswerError)


class WantedParts:
    """Hash parts that are looked for; more may be added while an upstream is asked."""

    def __init__(self, parts: Iterable[str]) -> None:
        #: Not found yet, in the order in which they were wanted.
        self.left = dict.fromkeys(parts)
        self._queue = deque(self.left)

    def add(self, part: str) -> None:
        """Want one more."""
        self.left[part] = None
        self._queue.append(part)

    def found(self, part: str) -> None:
        """Note that one was found, whether it was wanted or not."""
        self.left.pop(part, None)

    def take(self, at_most: int) -> list[str]:
        """Return some that no one was asked for yet; empty where there are none."""
        taken: list[str] = []
        while self._queue and len(taken) < at_most:
            part = self._queue.popleft()
            if part in self.left:
                taken.append(part)
        return taken

    def begin_again(self) -> None:
        """Let all that is left be asked for again, of another upstream say."""
        self._queue = deque(self.left)


class ProxyUpstream:
    """One upstream, for the tasks of one event loop. `now` gives seconds that only rise."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, headers: Mapping[str, str], now: Callable[[], float]
    ) -> None:
        self.url = url
        self._session = session
        #: With the token of this upstream's host.
        self._headers = dict(headers)
        self._now = now
        self._origin = urlsplit(url)[:2]
        #: Whether it answers the question for a closure; None until it was asked.
        self.answers_closures: bool | None = None
        self._rests_until = float("-inf")
        self._outage = Outage(_log, "its paths count as absent meanwhile", over=f"the upstream {url} answers again")

    @property
    def is_away(self) -> bool:
        """True while it is left alone."""
        return self._now() < self._rests_until

    async def look(self, wanted: WantedParts) -> AsyncGenerator[list[bytes], None]:
        """Yield narinfos of what is wanted, and of what that reaches where one question answers it.

        Raises:
            UpstreamFailedError: it failed; what it gave before counts.
        """
        wanted.begin_again()
        try:
            while self.answers_closures is not False and (names := wanted.take(QUESTION_PATHS)):
                async with aclosing(self._closure(names)) as pages:
                    async for texts in pages:
                        yield texts
            if not self.answers_closures:
                wanted.begin_again()
                async with aclosing(self._plain(wanted)) as found:
                    async for text in found:
                        yield [text]
        except (aiohttp.ClientError, TimeoutError, QuestionAnswerError, QuestionRefusedError) as error:
            raise self._failed(error) from error
        self._outage.end()

    async def _closure(self, names: Sequence[str], *, whole: bool = True) -> AsyncGenerator[list[bytes], None]:
        """Yield the answer of an upstream of ours; nothing where it turns out to be none."""
        question = ClosureAnswer(self._session, self.url, self._headers, names, whole)
        try:
            async with asyncio.timeout(CLOSURE_S), aclosing(question.narinfos()) as pages:
                async for texts in pages:
                    self.answers_closures = True
                    yield texts
        except (QuestionRefusedError, QuestionAnswerError, aiohttp.ClientError) as error:
            if whole and isinstance(error, QuestionRefusedError) and error.status == _TOO_LARGE:
                async with aclosing(self._closure(names, whole=False)) as pages:
                    async for texts in pages:
                        yield texts
            elif self.answers_closures is not None or isinstance(error, aiohttp.ClientConnectorError):
                raise
            elif _is_refusal(error):
                self.answers_closures = False
        else:
            self.answers_closures = True

    async def _plain(self, wanted: WantedParts) -> AsyncGenerator[bytes, None]:
        running: set[asyncio.Task[bytes | None]] = set()
        done: set[asyncio.Task[bytes | None]] = set()
        try:
            while True:
                for part in wanted.take(NARINFOS_AT_ONCE - len(running)):
                    running.add(asyncio.create_task(self._narinfo(part)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    text = task.result()
                    if text is not None:
                        yield text
        finally:
            for task in running:
                task.cancel()
            # With those that failed together with the one that ends this.
            await asyncio.gather(*running, *done, return_exceptions=True)

    async def _narinfo(self, hash_part: str) -> bytes | None:
        timeout = aiohttp.ClientTimeout(total=NARINFO_S, sock_connect=CONNECT_S)
        async with self._session.get(
            f"{self.url}/{hash_part}.narinfo", headers=self._headers, timeout=timeout, max_redirects=MAX_REDIRECTS
        ) as response:
            if response.status in _ABSENT:
                return None
            if response.status != 200:
                raise aiohttp.ClientResponseError(response.request_info, (), status=response.status)
            text = await response.content.read(MAX_NARINFO_BYTES + 1)
            while len(text) <= MAX_NARINFO_BYTES and (more := await response.content.read(MAX_NARINFO_BYTES)):
                text += more
            return text

    async def small(self, address: str, at_most: int) -> bytes | None:
        """Return a small file below the cache's address, None where it is not there, fails or is larger."""
        timeout = aiohttp.ClientTimeout(total=NARINFO_S, sock_connect=CONNECT_S)
        try:
            async with self._session.get(
                f"{self.url}/{address}", headers=self._headers, timeout=timeout, max_redirects=MAX_REDIRECTS
            ) as response:
                if response.status != 200:
                    return None
                content = bytearray()
                async for chunk in response.content.iter_any():
                    content += chunk
                    if len(content) > at_most:
                        return None
                return bytes(content)
        except (aiohttp.ClientError, TimeoutError):
            return None

    @asynccontextmanager
    async def nar(self, known: KnownPath, offset: int) -> AsyncIterator[tuple[aiohttp.StreamReader, int]]:
        """Open the NAR of a path of this upstream; gives its bytes and the offset at which they begin.

        Raises:
            NarGoneError: it is not there.
            NarCutError: it did not come, or broke off.
        """
        try:
            address = urljoin(f"{self.url}/", known.info.stored.url)
            place = urlsplit(address)
        except ValueError:
            raise NarGoneError(f"{self.url} has {known.info.store_path} at an address that is none") from None
        if place.scheme not in {"http", "https"}:
            raise NarGoneError(f"{self.url} has {known.info.store_path} at an address that is not http")
        # As it is stored: with a content encoding it could be larger than it announces.
        headers = {"Accept-Encoding": "identity"} | (self._headers if place[:2] == self._origin else {})
        if offset:
            headers["Range"] = f"bytes={offset}-"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=NAR_SILENCE_S)
        try:
            async with self._session.get(
                address, headers=headers, timeout=timeout, max_redirects=MAX_REDIRECTS
            ) as response:
                if response.status in {*_ABSENT, 401}:
                    raise NarGoneError(f"{self.url} lacks the NAR of {known.info.store_path}")
                if response.status not in {200, 206}:
                    raise NarCutError(f"{self.url} answered {response.status} for the NAR of {known.info.store_path}")
                yield response.content, offset if response.status == 206 else 0
        except aiohttp.TooManyRedirects as error:
            raise NarGoneError(f"{self.url} sends in circles for the NAR of {known.info.store_path}") from error
        except aiohttp.ClientConnectorError as error:
            raise NarCutError(str(self._failed(error))) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise NarCutError(f"{self.url} broke off the NAR of {known.info.store_path}: {reason}") from error

    def _failed(self, error: Exception) -> UpstreamFailedError:
        self._rests_until = self._now() + REST_S
        if isinstance(error, (aiohttp.ClientResponseError, QuestionRefusedError)):
            reason = f"answers with status {error.status}"
            if error.status == 401:
                reason = "wants a token; put `machine HOST login drover password TOKEN` into the file of --netrc"
        elif isinstance(error, TimeoutError):
            reason = "does not answer in time"
        else:
            reason = f"cannot be asked: {str(error) or type(error).__name__}"
        failed = UpstreamFailedError(f"the upstream {self.url} {reason}")
        self._outage.begin(str(failed))
        return failed
