"""Client of the question about a closure: narinfos of many paths and of all that they reach, in one request.

`coordinator.http.binary_cache.closures` says what is sent. The narinfos are given on as their lines come, page after
page. What they say is not verified here: the one who asked knows which keys to trust.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson

from infra.objects.errors import CacheError

#: Paths of one question, and bytes of one page.
QUESTION_PATHS: Final = 500
MAX_PAGE_BYTES: Final = 64 * 1024 * 1024
#: Pages of one answer: more than the largest closure has.
MAX_PAGES: Final = 256
_HEAD: Final = b'{"narinfos":['


class QuestionRefusedError(CacheError):
    """The cache answered with another status than 200.

    Attributes:
        status: The status.
    """

    def __init__(self, url: str, status: int) -> None:
        super().__init__(f"{url} answered with status {status}")
        self.status = status


class QuestionAnswerError(CacheError):
    """The answer is none that the question can have."""


@dataclass(slots=True)
class ClosureAnswer:
    """One question to one cache. `narinfos` gives the texts as they come; `missing` is whole after its end."""

    session: aiohttp.ClientSession
    cache_url: str
    headers: Mapping[str, str]
    #: At most QUESTION_PATHS base names or hash parts.
    names: Sequence[str]
    closure: bool = True
    #: Names of the question that are not published, and lost members of the closure.
    missing: list[str] = field(default_factory=list)

    async def narinfos(self) -> AsyncGenerator[list[bytes], None]:
        """Yield narinfos, several at a time; close the generator if you leave it early.

        Raises:
            QuestionRefusedError: the cache does not answer this.
            QuestionAnswerError: its answer cannot be read, or is too long.
            aiohttp.ClientError: it cannot be reached, or broke off.
            TimeoutError: it took longer than the session allows.
        """
        after = ""
        for _ in range(MAX_PAGES):
            question: dict[str, Any] = {"paths": list(self.names), "closure": self.closure}
            if after:
                question["after"] = after
            headers = {**self.headers, "Content-Type": "application/json"}
            url = f"{self.cache_url}/narinfos"
            async with self.session.post(
                url, data=orjson.dumps(question), headers=headers, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise QuestionRefusedError(self.cache_url, response.status)
                page = _ClosurePage(self.cache_url)
                async for chunk in response.content.iter_any():
                    texts = page.take(chunk)
                    if texts:
                        yield texts
            texts, ending = page.end()
            if texts:
                yield texts
            self.missing += _strings(ending.get("missing", []), self.cache_url)
            (following,) = _strings([ending.get("next", "")], self.cache_url)
            if not following:
                return
            if following == after:
                raise QuestionAnswerError(f"{self.cache_url} answers with the same page for ever")
            after = following
        raise QuestionAnswerError(f"{self.cache_url} answers with more than {MAX_PAGES} pages")


class _ClosurePage:
    """One page while it comes: a line a narinfo, or JSON in another layout, which is read at its end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rest = bytearray()
        self._size = 0
        #: None until the first line is whole; False for another layout.
        self._by_lines: bool | None = None

    def take(self, chunk: bytes) -> list[bytes]:
        """Return the narinfos whose lines are whole now."""
        self._size += len(chunk)
        if self._size > MAX_PAGE_BYTES:
            raise QuestionAnswerError(f"the answer of {self._url} is longer than {MAX_PAGE_BYTES} bytes")
        self._rest += chunk
        if self._by_lines is False or b"\n" not in chunk:
            return []
        lines = self._rest.split(b"\n")
        if self._by_lines is None:
            self._by_lines = lines[0] == _HEAD
            if not self._by_lines:
                return []
            del lines[0]
        self._rest = lines.pop()
        texts = []
        for line in lines:
            if not line.startswith(b"]"):
                if line:
                    texts.append(_text(bytes(line.removesuffix(b",")), self._url))
            else:
                # The end has no line breaks of its own; whatever else there is shows when it is read.
                self._rest = line + self._rest
        return texts

    def end(self) -> tuple[list[bytes], Mapping[str, Any]]:
        """Return the narinfos that are left, and what stands beside them."""
        try:
            answer = orjson.loads(_HEAD + self._rest if self._by_lines else self._rest)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise QuestionAnswerError(f"the answer of {self._url} is not a JSON object")
        return [text.encode() for text in _strings(answer.get("narinfos"), self._url)], answer


def _text(line: bytes, url: str) -> bytes:
    try:
        text = orjson.loads(line)
    except orjson.JSONDecodeError:
        text = None
    return _strings([text], url)[0].encode()


def _strings(value: object, url: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise QuestionAnswerError(f"the answer of {url} is no list of narinfos")
    return value
