"""Sources of one farm's inputs: its binary cache over HTTP and its object store, with what goes wrong with them.

Requests to a cache that does not answer are repeated for a while (`patiently`), as are transfers from a store that
fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import aiohttp

from infra.daemon import Upload
from infra.dependency_order import CycleError, inputs_first
from infra.nix import narinfo
from infra.nix.errors import NixError
from infra.nix.narinfo import NarInfo
from infra.nix.signing import PublicKey
from infra.nix.store_path import StoreDir, base_name_of
from infra.objects.errors import CacheError, ObjectMissingError, ObjectStoreError, StoreUnreachableError
from infra.objects.http_source import fetch_nar_over_http
from infra.objects.nar_reader import fetch_nar
from infra.objects.store import ObjectStore, open_object_store
from infra.retry import Outage, retrying
from infra.substituter.closures import (
    QUESTION_PATHS,
    ClosureAnswer,
    QuestionAnswerError,
    QuestionRefusedError,
)
from infra.upload.client import UploadClient, upload_connections
from workers.errors import WorkerError
from workers.wire.measures import FetchSource
from workers.wire.messages import MAX_MISSING, FarmInfo

#: Seconds for one question to the cache, in all and until it connects.
QUESTION_S = 60.0
CONNECT_S = 10.0
#: Seconds for which requests to a cache that does not answer, or to a store that fails, are repeated.
AWAY_S = 60.0
#: Paths that the inputs of one lease may reach.
MAX_CLOSURE = 100_000
#: Bytes of verified narinfos that are remembered (some 10,000 and a multiple of that in memory); beyond it they are
#: verified again.
MAX_VERIFIED_BYTES = 8 * 1024 * 1024
#: Seconds within which the farm's object store must answer a worker that is to use it itself.
STORE_WITHIN_S = 10.0

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class InputError(WorkerError):
    """An input cannot be had; the message names it.

    Attributes:
        missing: Full paths that the farm's cache, or its object store, does not have; at most MAX_MISSING.
    """

    def __init__(self, message: str, missing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)[:MAX_MISSING]


class InputAwayError(InputError):
    """An input cannot be had at the moment."""


class FarmSources:
    """Source of one farm's inputs and target of its outputs: its cache over HTTP, its object store. Must be closed.

    `store` is None where this machine does not see the object store; the coordinator's address is then all it needs.
    """

    def __init__(self, farm: FarmInfo, store: ObjectStore | None) -> None:
        """Raises `infra.nix.errors.NixError` for a public key or a store directory that cannot be read."""
        self.farm = farm
        self.store = store
        self.store_dir = StoreDir(farm.store_dir)
        self._keys = tuple(PublicKey.parse(text) for text in farm.public_keys)
        #: Narinfos by their very bytes: the closures of a farm's steps have most of them in common.
        self._verified: dict[bytes, NarInfo] = {}
        self._verified_bytes = 0
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=QUESTION_S, connect=CONNECT_S), auto_decompress=True
        )
        self._upload_connections = upload_connections()

    async def close(self) -> None:
        """Close the connections to the cache."""
        self._upload_connections.close()
        await self._session.close()

    async def narinfos(self, paths: Iterable[str]) -> list[NarInfo]:
        """Return the verified narinfos of the closure of full paths, references first.

        Raises `InputError` where a member is not in the cache, is not signed by the farm, or the cache does not answer.
        """
        known: dict[str, NarInfo] = {}
        wanted = sorted({base_name_of(path) for path in paths})
        while wanted:
            if len(known) > MAX_CLOSURE:
                raise InputError(f"the inputs reach more than {MAX_CLOSURE} paths")
            batch, wanted = wanted[:QUESTION_PATHS], wanted[QUESTION_PATHS:]
            infos = await self._request_infos(batch)
            found = {info.base_name: info for info in infos}
            if not found.keys() >= set(batch):
                raise InputError("the cache's answer lacks paths that were asked for")
            known |= found
            # An answer is bounded: what it only refers to is requested in turn.
            beyond = {reference for info in infos for reference in info.path.references}
            wanted = sorted((beyond | set(wanted)) - known.keys())
        return _references_first(known)

    async def _request_infos(self, names: Sequence[str]) -> list[NarInfo]:
        """Ask for narinfos by base name, with as much of their closure as the cache answers. Raises `InputError`."""
        texts, missing = await patiently(partial(self._ask, names))
        if missing:
            paths = [self.store_dir.full(name) for name in missing[:MAX_MISSING]]
            raise InputError(f"{paths[0]} is not in the farm's cache", paths)
        try:
            return [self._verified.get(text) or self._verify(text) for text in texts]
        except NixError as error:
            raise InputError(f"the cache's answer cannot be read: {error}") from error

    def _verify(self, text: bytes) -> NarInfo:
        """Read a narinfo and verify its signature. Raises `InputError` or `NixError`."""
        info = narinfo.parse(text, self.store_dir)
        fingerprint = info.path.fingerprint()
        if not any(key.verify(fingerprint, sig) for key in self._keys for sig in info.path.sigs):
            raise InputError(f"{info.store_path} is not signed by a key of the farm")
        if self._verified_bytes + len(text) > MAX_VERIFIED_BYTES:
            self._verified.clear()
            self._verified_bytes = 0
        self._verified[text] = info
        self._verified_bytes += len(text)
        return info

    @property
    def kind(self) -> FetchSource:
        """Source that `nar` reads."""
        return "cache" if self.store is None else "objects"

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None]:
        """Yield the NAR of a narinfo, verified by its end. Raises `InputError`."""
        if self.store is None:
            url = f"{self.farm.cache_url}/{info.stored.url}"
            source = fetch_nar_over_http(self._session, url, self._authorization(), info)
        else:
            source = fetch_nar(self.store, info)
        try:
            async with aclosing(source) as chunks:
                async for chunk in chunks:
                    yield chunk
        except CacheError as error:
            gone = isinstance(error, ObjectMissingError)
            raise (InputAwayError if isinstance(error, ObjectStoreError) and not gone else InputError)(
                f"{info.store_path}: {error}", [info.store_path] if gone else ()
            ) from error

    def upload(self, info: NarInfo, nar: AsyncIterator[bytes]) -> Upload:
        """Return what adds a path to the worker's store; its narinfo is one of `narinfos`."""
        return Upload(info.path, nar)

    def uploads(self, token: str) -> UploadClient:
        """Return what uploads outputs over HTTP with the token of a lease."""
        return UploadClient(self._upload_connections, self.farm.cache_url, token)

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.farm.cache_token}"} if self.farm.cache_token else {}

    async def _ask(self, names: Sequence[str]) -> tuple[list[bytes], list[str]]:
        """Return the narinfos of a closure, and the base names that the cache lacks. Raises `InputError`."""
        question = ClosureAnswer(self._session, self.farm.cache_url, self._authorization(), names)
        texts: list[bytes] = []
        try:
            async with aclosing(question.narinfos()) as pages:
                async for page in pages:
                    texts += page
                    if len(texts) > MAX_CLOSURE:
                        raise InputError(f"the inputs reach more than {MAX_CLOSURE} paths")
        except QuestionRefusedError as error:
            kind = InputError if error.status < 500 else InputAwayError
            problem = f"answered with status {error.status}"
        except QuestionAnswerError as error:
            raise InputError(f"the cache's answer cannot be read: {error}") from error
        except TimeoutError:
            kind, problem = InputAwayError, f"did not answer within {QUESTION_S:.0f} s"
        except aiohttp.ClientError as error:
            kind, problem = InputAwayError, f"cannot be asked ({error})"
        else:
            return texts, question.missing
        raise kind(f"the farm's cache at {self.farm.cache_url} {problem}")


async def patiently(call: Callable[[], Awaitable[_Result]]) -> _Result:
    """Return what `call` gives, repeating it while the cache or the store is away, at most `AWAY_S`."""
    outage = Outage(_log, "it is asked again", over="inputs can be had again")
    return await retrying(call, AWAY_S, outage, _away)


def _away(error: Exception) -> str:
    return str(error) if isinstance(error, InputAwayError) else ""


def _references_first(infos: Mapping[str, NarInfo]) -> list[NarInfo]:
    """Order a closure. Raises `InputError` where it runs in a circle, which no published closure does."""
    try:
        return [infos[name] for name in inputs_first(infos, lambda name: _others(infos[name]))]
    except CycleError:
        raise InputError("the cache's answer has paths that refer to each other in a circle") from None


def _others(info: NarInfo) -> list[str]:
    return [name for name in info.path.references if name != info.base_name]


async def open_sources(farm: FarmInfo) -> FarmSources:
    """Return the sources of a farm, over its object store if this machine sees it.

    Raises:
        CacheError: the object store is not seen, and the farm takes no uploads over HTTP either.
        NixError: see `FarmSources`.
    """
    return FarmSources(farm, await _reachable_store(farm))


async def _reachable_store(farm: FarmInfo) -> ObjectStore | None:
    """Return the farm's object store if this machine sees it, None if all must go over HTTP.

    Raises `StoreUnreachableError` where the farm takes no uploads over HTTP either.
    """
    store = open_object_store(farm.object_store_url)
    try:
        # Without credentials, looking for some may take a while that is not ours to wait.
        async with asyncio.timeout(STORE_WITHIN_S):
            mark = await store.check_marker()
    except (StoreUnreachableError, TimeoutError):
        if farm.takes_uploads:
            return None
        raise
    if farm.store_mark and mark != farm.store_mark:
        if farm.takes_uploads:
            return None
        raise StoreUnreachableError(f"this machine sees another object store at {store.url}, not the farm's")
    return store
