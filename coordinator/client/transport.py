"""Requests to a coordinator, with its token: questions, which are sent again where that may help, and streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from coordinator.api.route import Route
from coordinator.client.errors import (
    BadArgumentError,
    ClientError,
    RefusedError,
    UnreachableError,
    reason_of,
    refusal,
)
from coordinator.defaults import URL
from coordinator.errors import CoordinatorError
from infra.exchange import AddressError, Answer, BadAnswerError, StreamedAnswer, exchange, streaming

if TYPE_CHECKING:
    from infra.retry import RetryBudget

#: Seconds for a connection, and for one JSON answer.
CONNECT_S = 10.0
ANSWER_S = 300.0
#: Seconds between attempts to reach it again: first, longest; and after how long of nothing but failures to give up.
RECONNECT_FIRST_S = 0.25
RECONNECT_LONGEST_S = 5.0
RECONNECT_GIVE_UP_S = 300.0
#: Of a refusal's body that are read.
MAX_REFUSAL_BYTES = 64 * 1024


class Transport:
    """Sends requests with the token; an asynchronous context manager.

    Once a coordinator has answered, a question whose answer is lost is sent again for `RECONNECT_GIVE_UP_S` where the
    route says that this changes nothing: a coordinator that starts again, or another one that takes over, fails no
    command that has begun. The first question fails at once, because most often the address is wrong.

    Every method raises `UnreachableError` where the coordinator does not answer and `RefusedError` where it refuses.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._entered = False
        self._answered = False
        #: Receives why a question is sent again, once for each outage.
        self.on_lost: Callable[[str], None] = lambda _why: None

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False

    async def ask(
        self,
        route: Route[Any],
        parts: Mapping[str, str],
        *,
        data: bytes | None = None,
        params: Mapping[str, str] | None = None,
        answer_s: float | None = ANSWER_S,
    ) -> Answer:
        """Return the whole answer to one request, sent again where its answer is lost and the route lets it."""
        self._require_context()
        budget: RetryBudget | None = None
        while True:
            try:
                answer = await self._ask_once(route, parts, data, params, answer_s)
            except UnreachableError as error:
                trouble: ClientError = error
            except RefusedError as error:
                if not error.is_passing:
                    raise
                trouble = error
            else:
                self._answered = True
                return answer
            if not (route.may_repeat and self._answered):
                raise trouble
            if budget is None:
                budget = self.budget()
                self.on_lost(str(trouble))
            if not await budget.pause():
                raise trouble

    def budget(self) -> RetryBudget:
        """Return the time within which a coordinator that was there is looked for again."""
        from infra.retry import Backoff, RetryBudget  # noqa: PLC0415 - short commands load next to nothing of infra

        return RetryBudget(RECONNECT_GIVE_UP_S, Backoff(RECONNECT_FIRST_S, RECONNECT_LONGEST_S))

    async def _ask_once(
        self,
        route: Route[Any],
        parts: Mapping[str, str],
        data: bytes | None,
        params: Mapping[str, str] | None,
        answer_s: float | None,
    ) -> Answer:
        headers = {**self._headers, **({} if data is None else {"Content-Type": "application/json"})}
        try:
            async with asyncio.timeout(answer_s):
                answer = await exchange(
                    route.method,
                    self.url + route.address(**parts),
                    params=params or {},
                    headers=headers,
                    body=data,
                    connect_s=CONNECT_S,
                )
        except AddressError:
            raise self._no_address() from None
        except (BadAnswerError, TimeoutError, OSError) as error:
            raise UnreachableError(self.url, reason_of(error)) from None
        if answer.status >= 300:
            raise refusal(answer.status, answer.body, self.url)
        return answer

    def _require_context(self) -> None:
        if not self._entered:
            raise ClientError("the client is used outside its context")

    def _no_address(self) -> BadArgumentError:
        return BadArgumentError(f"{self.url} is not an address; set DROVER_URL to one like {URL}")

    @asynccontextmanager
    async def stream(
        self,
        route: Route[Any],
        parts: Mapping[str, str],
        *,
        data: AsyncIterator[bytes] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[StreamedAnswer]:
        """Yield the answer to a request as it comes, after at most `silence_s` of silence; for streams both ways."""
        self._require_context()
        async with AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(
                    streaming(
                        route.method,
                        self.url + route.address(**parts),
                        params=params or {},
                        headers={**self._headers, **(headers or {})},
                        body=None if data is None else _made(data),
                        connect_s=CONNECT_S,
                        silence_s=silence_s,
                    )
                )
            except AddressError:
                raise self._no_address() from None
            except (BadAnswerError, TimeoutError, OSError) as error:
                raise UnreachableError(self.url, reason_of(error)) from None
            if answer.status >= 300:
                raise refusal(answer.status, await self._beginning_of(answer), self.url)
            self._answered = True
            yield answer

    async def chunks(self, answer: StreamedAnswer) -> AsyncIterator[bytes]:
        """Yield a streamed answer's bytes as they come."""
        try:
            async for piece in answer.pieces():
                yield piece
        except (BadAnswerError, TimeoutError, OSError) as error:
            raise UnreachableError(self.url, reason_of(error)) from None

    async def _beginning_of(self, answer: StreamedAnswer) -> bytes:
        body = bytearray()
        async for piece in self.chunks(answer):
            body += piece
            if len(body) >= MAX_REFUSAL_BYTES:
                break
        return bytes(body)


async def _made(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass on what is sent; a fault while it is made is this machine's, and none of the connection."""
    try:
        async for piece in pieces:
            yield piece
    except CoordinatorError:
        raise
    except Exception as error:
        raise ClientError(
            f"what was to be sent cannot be made on this machine: {str(error) or type(error).__name__}"
        ) from error
