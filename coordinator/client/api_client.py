"""The HTTP API from the client's side: typed answers, typed errors, a watch that survives a broken connection.

Short questions go by `coordinator.client.exchange`; aiohttp, which takes a while to import, carries streams alone.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

import orjson
from pydantic import TypeAdapter, ValidationError

from coordinator.api.models import (
    CacheRootView,
    CacheView,
    CollectRequest,
    CollectView,
    Ended,
    ErrorView,
    FarmView,
    IntakeMissing,
    IntakeQuery,
    Model,
    PinRequest,
    ResignView,
    RetryView,
    RootView,
    Snapshot,
    StepStatus,
    StepView,
    SubmissionState,
    SubmissionView,
    SubmitRequest,
    VerifyRequest,
    VerifyView,
    WatchEvent,
    WhyView,
    WorkerView,
)
from coordinator.client.exchange import AddressError, Answer, BadAnswerError, exchange
from coordinator.errors import CoordinatorError, UnavailableError

if TYPE_CHECKING:
    import aiohttp

DEFAULT_URL = "http://127.0.0.1:7878"
#: Seconds for a connection, for one JSON answer, and of silence on a stream before it is taken for broken.
CONNECT_S = 10.0
ANSWER_S = 300.0
SILENCE_S = 60.0
#: Rows asked for at a time of a list.
PAGE_ROWS = 1000
#: Seconds between attempts to watch again: first, longest; and after how long of nothing but failures to give up.
RECONNECT_FIRST_S = 0.25
RECONNECT_LONGEST_S = 5.0
RECONNECT_GIVE_UP_S = 300.0
#: One server-sent event; a snapshot names every running and failed step.
MAX_EVENT_BYTES = 256 * 1024 * 1024
#: Of a refusal's body that are read.
MAX_REFUSAL_BYTES = 64 * 1024

#: The steps that a snapshot names.
_SHOWN = (StepStatus.RUNNING, StepStatus.PUBLISHING, StepStatus.FAILED)
_NEXT = re.compile(r'<([^<>]*)>; *rel="?next"?')
_EVENTS: TypeAdapter[WatchEvent] = TypeAdapter(WatchEvent)
_STEPS = TypeAdapter(list[StepView])
_SUBMISSIONS = TypeAdapter(list[SubmissionView])
_ROOTS = TypeAdapter(list[RootView])
_WORKERS = TypeAdapter(list[WorkerView])
_WHY = TypeAdapter(WhyView)
_CACHE_ROOTS = TypeAdapter(list[CacheRootView])
_Answer = TypeVar("_Answer", bound=Model)
_Parsed = TypeVar("_Parsed")
_Listed = TypeVar("_Listed")


class ClientError(CoordinatorError):
    """Talking to the coordinator failed; the sentence says what to do."""

    code: ClassVar[str] = "client"


class BadArgumentError(ClientError):
    """The command was called with something that cannot be meant; calling it otherwise helps."""

    code: ClassVar[str] = "bad_argument"


class UnreachableError(ClientError):
    """Nobody answers at the coordinator's address, or no longer."""

    code: ClassVar[str] = "unreachable"

    def __init__(self, url: str, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(f"cannot reach the coordinator at {url}{reason}; start one with `drover up` or set DROVER_URL")


class RefusedError(ClientError):
    """The coordinator answered, and the answer is no.

    Attributes:
        http_status: Of the answer.
        reason: The coordinator's own code for it, such as `not_found`.
    """

    code: ClassVar[str] = "refused"

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.http_status = status
        self.reason = reason


def find_token(told: str | None = None) -> str:
    """Return the API token from the file `told`, `DROVER_TOKEN_FILE`, or the default state directory; "" if none.

    Raises:
        ClientError: A file that was named cannot be read.
    """
    named = told or os.environ.get("DROVER_TOKEN_FILE", "")
    if named:
        try:
            return Path(named).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text"
            raise BadArgumentError(f"cannot read the token file {named}: {why}") from None
    try:
        return (_state_dir() / "api-token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        # Not an error yet: if the coordinator is down, that is the better thing to say.
        return ""


def _state_dir() -> Path:
    told = os.environ.get("DROVER_STATE_DIR", "")
    if told:
        return Path(told).expanduser()
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "drover"


class ApiClient:
    """The coordinator's methods, and one session for streams; an asynchronous context manager.

    Every method raises `UnreachableError` where nobody answers and `RefusedError` where the answer is no.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._entered = False
        #: Made for the first stream.
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        if self._session is not None:
            await self._session.close()

    async def missing(self, query: IntakeQuery) -> IntakeMissing:
        """Ask once which members of a closure must be sent."""
        return await self._json("POST", "intake/missing", IntakeMissing, query)

    async def send_derivations(self, stream: AsyncIterator[bytes]) -> None:
        """Send the derivations stream of `coordinator.api.streams`."""
        async with self._call("PUT", "intake/derivations", data=stream, answer_s=None):
            pass

    async def send_sources(self, stream: AsyncIterator[bytes]) -> None:
        """Send the sources stream of `coordinator.api.streams`."""
        async with self._call("PUT", "intake/sources", data=stream, answer_s=None):
            pass

    async def submit(self, request: SubmitRequest) -> SubmissionView:
        """Submit derivations that the coordinator has."""
        return await self._json("POST", "submissions", SubmissionView, request)

    async def submissions(self, newest: int | None = None) -> list[SubmissionView]:
        """Return the submissions, newest first, all or some, with their first few roots."""
        return await self._pages("submissions", _SUBMISSIONS, most=newest)

    async def whole(self, view: SubmissionView) -> SubmissionView:
        """Return the view with all its roots, asked for again where some are missing."""
        if len(view.roots) >= view.root_count:
            return view
        roots = await self._pages(f"submissions/{_part(view.id)}/roots", _ROOTS)
        return view.model_copy(update={"roots": tuple(roots)})

    async def submission(self, submission: str) -> SubmissionView:
        """Return one submission."""
        return await self._json("GET", f"submissions/{_part(submission)}", SubmissionView)

    async def cancel(self, submission: str) -> SubmissionView:
        """Withdraw a submission; a repeat is a no-op."""
        return await self._json("POST", f"submissions/{_part(submission)}/cancel", SubmissionView)

    async def retry(self, submission: str) -> SubmissionView:
        """Let a submission run again where it failed; a repeat is a no-op."""
        return await self._json("POST", f"submissions/{_part(submission)}/retry", SubmissionView)

    async def retry_step(self, key: str) -> RetryView:
        """Build a failed step again; `key` may be any unique part of its key."""
        return await self._json("POST", f"steps/{_part(key)}/retry", RetryView)

    async def steps(self, submission: str, states: Sequence[StepStatus] = ()) -> list[StepView]:
        """Return the steps of a submission, those in `states` or all."""
        query = {"state": ",".join(states)} if states else {}
        return await self._pages(f"submissions/{_part(submission)}/steps", _STEPS, query)

    async def step(self, key: str) -> StepView:
        """Return one step; `key` may be any unique part of its key."""
        return await self._json("GET", f"steps/{_part(key)}", StepView)

    async def workers(self) -> list[WorkerView]:
        """Return all workers."""
        return await self._pages("workers", _WORKERS)

    async def drain(self, worker: str, *, on: bool) -> None:
        """Give a worker no new leases while `on`."""
        await self._bytes("POST", f"workers/{_part(worker)}/drain", data=orjson.dumps({"on": on}))

    async def farm(self) -> FarmView:
        """Return how to use the farm's cache."""
        return await self._json("GET", "farm", FarmView)

    async def cache(self, name: str) -> CacheView:
        """Return what a cache holds; the one at /cache is `default`."""
        return await self._json("GET", f"caches/{_part(name)}", CacheView)

    async def cache_roots(self, name: str) -> list[CacheRootView]:
        """Return the roots of a cache."""
        return await self._pages(f"caches/{_part(name)}/roots", _CACHE_ROOTS)

    async def cache_why(self, name: str, path: str) -> WhyView:
        """Return what keeps a store path."""
        raw = await self._bytes("GET", f"caches/{_part(name)}/why", params={"path": path})
        return self._parse(_WHY, raw)

    async def pin(self, name: str, pin: str, request: PinRequest) -> None:
        """Keep paths under a name."""
        data = orjson.dumps(request.model_dump(mode="json"))
        await self._bytes("PUT", f"caches/{_part(name)}/pins/{_part(pin)}", data=data)

    async def unpin(self, name: str, pin: str) -> None:
        """Forget a pin."""
        await self._bytes("DELETE", f"caches/{_part(name)}/pins/{_part(pin)}")

    async def collect(self, name: str, *, dry_run: bool) -> CollectView:
        """Collect garbage; takes as long as it takes."""
        body = CollectRequest(dry_run=dry_run)
        return await self._json("POST", f"caches/{_part(name)}/collect", CollectView, body, answer_s=None)

    async def verify(self, name: str, *, full: bool, repair: bool) -> VerifyView:
        """Check a cache; takes as long as it takes."""
        body = VerifyRequest(full=full, repair=repair)
        return await self._json("POST", f"caches/{_part(name)}/verify", VerifyView, body, answer_s=None)

    async def resign(self, name: str) -> ResignView:
        """Sign everything in a cache anew; takes as long as it takes."""
        return await self._json("POST", f"caches/{_part(name)}/resign", ResignView, answer_s=None)

    async def log(self, key: str, *, follow: bool = False) -> AsyncIterator[bytes]:
        """Yield a step's log as raw bytes; with `follow` until the step has ended."""
        query = {"follow": "1"} if follow else {}
        async with self._call("GET", f"steps/{_part(key)}/log", params=query, answer_s=None) as response:
            async for chunk in self._chunks(response):
                yield chunk

    async def watch(
        self, submission: str, on_lost: Callable[[str], None] = lambda _why: None
    ) -> AsyncIterator[WatchEvent]:
        """Yield a submission's events up to and with `Ended`; after a break it begins again with a new snapshot.

        Where the coordinator has no stream free, snapshots are asked for instead: too many watchers fail no build.
        `on_lost` is told why, once for each time that the connection breaks.

        Raises:
            UnreachableError: nothing but failures for `RECONNECT_GIVE_UP_S`, or the very first connection failed.
        """
        clock = asyncio.get_running_loop().time
        lost_at: float | None = None
        seen = False
        pause_s = RECONNECT_FIRST_S
        while True:
            try:
                async for event in self._events(submission, on_lost):
                    seen, lost_at, pause_s = True, None, RECONNECT_FIRST_S
                    yield event
                    if isinstance(event, Ended):
                        return
                why = "the stream ended early"
            except UnreachableError as error:
                if not seen:
                    raise
                why = str(error)
            if lost_at is None:
                lost_at = clock()
                on_lost(why)
            if clock() - lost_at > RECONNECT_GIVE_UP_S:
                raise UnreachableError(self.url, f"for {RECONNECT_GIVE_UP_S:.0f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RECONNECT_LONGEST_S)

    async def _events(self, submission: str, on_lost: Callable[[str], None]) -> AsyncIterator[WatchEvent]:
        """Yield what a stream says, and where none is free what it would begin with, again and again."""
        try:
            async for event in self._watch_once(submission):
                yield event
        except RefusedError as refusal:
            if refusal.reason != UnavailableError.code:
                raise
            on_lost(str(refusal))
        else:
            return
        while True:
            for event in await self._look(submission):
                yield event
            await asyncio.sleep(RECONNECT_LONGEST_S)

    async def _look(self, submission: str) -> list[WatchEvent]:
        """Ask for a snapshot, and the end where there is one. Raises `UnreachableError` while not even that is had."""
        try:
            # The state first: once it has ended, the steps that are asked for after it are the last ones.
            view = await self.submission(submission)
            snapshot = Snapshot(submission=view, steps=tuple(await self.steps(submission, _SHOWN)))
        except RefusedError as refusal:
            if refusal.reason != UnavailableError.code:
                raise
            raise UnreachableError(self.url, str(refusal)) from None
        return [snapshot] if view.state is SubmissionState.RUNNING else [snapshot, Ended(submission=view)]

    async def _watch_once(self, submission: str) -> AsyncIterator[WatchEvent]:
        path = f"submissions/{_part(submission)}/events"
        async with self._call("GET", path, answer_s=None, silence_s=SILENCE_S) as response:
            reader = EventReader()
            async for chunk in self._chunks(response):
                for data in reader.feed(chunk):
                    yield self._parse(_EVENTS, data)

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        import aiohttp  # noqa: PLC0415 - slow to import

        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnreachableError(self.url, _why(error)) from None

    async def _pages(
        self,
        path: str,
        adapter: TypeAdapter[list[_Listed]],
        query: Mapping[str, str] | None = None,
        *,
        most: int | None = None,
    ) -> list[_Listed]:
        """Follow the pages of a list to its end, or until there are `most`."""
        found: list[_Listed] = []
        params = {**(query or {}), "limit": str(min(most or PAGE_ROWS, PAGE_ROWS))}
        while True:
            answer = await self._ask("GET", path, params=params)
            page: list[_Listed] = self._parse(adapter, answer.body)
            found += page
            following = _next_cursor(answer)
            if not following or (most is not None and len(found) >= most):
                return found[:most]
            params["after"] = following

    async def _json(
        self,
        method: str,
        path: str,
        answer: type[_Answer],
        body: Model | None = None,
        *,
        answer_s: float | None = ANSWER_S,
    ) -> _Answer:
        data = None if body is None else orjson.dumps(body.model_dump(mode="json"))
        raw = await self._bytes(method, path, data=data, answer_s=answer_s)
        try:
            return answer.model_validate_json(raw)
        except ValidationError:
            raise self._not_understood() from None

    def _parse(self, adapter: TypeAdapter[_Parsed], raw: bytes) -> _Parsed:
        try:
            return adapter.validate_json(raw)
        except ValidationError:
            raise self._not_understood() from None

    def _not_understood(self) -> ClientError:
        return ClientError(
            f"the answer of {self.url} was not understood; client and coordinator should be of one version"
        )

    async def _bytes(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        params: Mapping[str, str] | None = None,
        answer_s: float | None = ANSWER_S,
    ) -> bytes:
        return (await self._ask(method, path, data=data, params=params, answer_s=answer_s)).body

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        params: Mapping[str, str] | None = None,
        answer_s: float | None = ANSWER_S,
    ) -> Answer:
        """Return the whole answer to one request."""
        self._require_context()
        headers = {**self._headers, **({} if data is None else {"Content-Type": "application/json"})}
        try:
            async with asyncio.timeout(answer_s):
                answer = await exchange(
                    method,
                    f"{self.url}/api/v1/{path}",
                    params=params or {},
                    headers=headers,
                    body=data,
                    connect_s=CONNECT_S,
                )
        except AddressError:
            raise self._no_address() from None
        except (BadAnswerError, TimeoutError, OSError) as error:
            raise UnreachableError(self.url, _why(error)) from None
        if answer.status >= 300:
            raise _refusal(answer.status, answer.body, self.url)
        return answer

    def _require_context(self) -> None:
        if not self._entered:
            raise ClientError("the client is used outside its context")

    def _no_address(self) -> BadArgumentError:
        return BadArgumentError(f"{self.url} is not an address; set DROVER_URL to one like {DEFAULT_URL}")

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        path: str,
        *,
        data: AsyncIterator[bytes] | None = None,
        params: Mapping[str, str] | None = None,
        answer_s: float | None = ANSWER_S,
        silence_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the answer to a request as it comes; for streams in either direction."""
        import aiohttp  # noqa: PLC0415 - slow to import

        self._require_context()
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers)
        body = None if data is None else _Body(data)
        timeout = aiohttp.ClientTimeout(total=answer_s, sock_connect=CONNECT_S, sock_read=silence_s)
        try:
            response = await self._session.request(
                method,
                f"{self.url}/api/v1/{path}",
                data=body,
                params=params,
                timeout=timeout,
                allow_redirects=False,
            )
        except aiohttp.InvalidURL:
            raise self._no_address() from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if body is not None and body.fault is not None:
                raise body.fault from None
            raise UnreachableError(self.url, _why(error)) from None
        try:
            if response.status >= 300:
                raise _refusal(response.status, await response.content.read(MAX_REFUSAL_BYTES), self.url)
            yield response
        finally:
            response.release()


class _Body:
    """A body that keeps what went wrong while it was made: aiohttp tells that as a fault of the connection."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self.fault: CoordinatorError | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._pieces:
                yield piece
        except CoordinatorError as error:
            self.fault = error
            raise
        except Exception as error:
            # Raised on; aiohttp would hide that it came from here, whatever the caller's own source failed with.
            self.fault = ClientError(
                f"what was to be sent cannot be made on this machine: {str(error) or type(error).__name__}"
            )
            self.fault.__cause__ = error
            raise


class EventReader:
    """Cuts a `text/event-stream` into the data of its events; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of the events that `chunk` completes."""
        self._buffer += chunk
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ClientError(f"the coordinator sent an event of more than {MAX_EVENT_BYTES} bytes")
        whole, mark, rest = bytes(self._buffer).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        if not mark:
            return []
        self._buffer = bytearray(rest)
        events = []
        for block in whole.split(b"\n\n"):
            lines = (line for line in block.split(b"\n") if line.startswith(b"data:"))
            data = b"\n".join(line[5:].removeprefix(b" ") for line in lines)
            if data:
                events.append(data)
        return events


def _refusal(status: int, raw: bytes, url: str) -> RefusedError:
    try:
        body = ErrorView.model_validate_json(raw).error
        reason, message = body.code, body.message
    except ValidationError:
        reason, message = "http", f"{url} answered with status {status}; is that a drover coordinator?"
    if status == 401:
        message = (
            f"the coordinator at {url} did not accept the API token; name its file with --token-file "
            "or DROVER_TOKEN_FILE (`drover up` writes it as api-token into its state directory)"
        )
    return RefusedError(status, reason, message)


def _next_cursor(answer: Answer) -> str:
    """Return the cursor of the next page, "" on the last one."""
    found = _NEXT.search(answer.headers.get("link", ""))
    return parse_qs(urlsplit(found[1]).query).get("after", [""])[0] if found else ""


def _part(text: str) -> str:
    """Make `text` one segment of a path."""
    return quote(text, safe="")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno:
        # Those of name resolution are negative.
        return (os.strerror(error.errno) if error.errno > 0 else error.strerror or "connection failed").lower()
    return str(error) or type(error).__name__
