"""`drover cache push`: paths of this machine's Nix store, with their closure, into a cache.

The daemon answers what the closure is; the bytes are read from the store's files, compressed in threads and sent while
they are read, small ones many in one request, as many requests at a time as there are cores. What the cache has is not
sent, and what was cut goes on where it stopped with the next push.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from coordinator.cli import exit_status
from coordinator.cli.rendering import size
from coordinator.cli.status import print_json, print_lines
from coordinator.client.closure import ClosureError, LocalStore, local_store, query_closure
from coordinator.client.errors import BadArgumentError, ClientError, RefusedError
from coordinator.client.token import find_token
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir, base_name_of
from infra.objects.compression import Compression
from infra.objects.errors import CacheError
from infra.objects.nar_writer import CompressedNar, UploadedNar, compress_now, compressing_files
from infra.upload.client import OpenNar, UploadClient, UploadProgress, UploadResult, upload_session
from infra.upload.errors import SenderRefusedError
from infra.upload.packs import MakeObject, SourceChangedError
from infra.upload.protocol import MAX_PATHS, KeepRequest, PathClaim, SendStatus

#: Seconds between two progress lines on a terminal.
PROGRESS_S: Final = 0.2
#: A conflict too: the path can be fetched, with the bits that came first.
_GOOD: Final = frozenset({SendStatus.PUBLISHED, SendStatus.PRESENT, SendStatus.CONFLICT})


@dataclass(frozen=True, slots=True)
class PushRequest:
    """Arguments of the command."""

    cache: str
    paths: tuple[str, ...]
    store: str | None = None
    keep_as: str | None = None
    days: float = 30.0
    as_json: bool = False


def push(url: str, token_file: str, request: PushRequest) -> int:
    """Run `drover cache push`; returns the exit status."""
    try:
        return asyncio.run(_push(url, token_file, request))
    except SenderRefusedError as error:
        raise RefusedError(error.status, error.code, str(error)) from None
    except CacheError as error:
        raise ClientError(str(error)) from None


async def _push(url: str, token_file: str, request: PushRequest) -> int:
    store = local_store(request.store)
    roots = [_store_path(path, store) for path in request.paths]
    infos = await query_closure(store, roots, _not_valid)
    if len(infos) > MAX_PATHS:
        raise BadArgumentError(f"the closure has {len(infos)} paths; push parts of it, at most {MAX_PATHS} at a time")
    claims = [PathClaim.of(info) for info in infos.values()]
    name = request.keep_as or base_name_of(roots[0])[:200]
    keep = KeepRequest(name=name, paths=tuple(base_name_of(root) for root in roots), days=request.days)
    address = f"{url.rstrip('/')}/cache" + (f"/{request.cache}" if request.cache != "default" else "")
    async with upload_session() as session:
        client = UploadClient(session, address, find_token(token_file))
        shown = asyncio.create_task(_show(client.progress)) if sys.stderr.isatty() else None
        try:
            parallel = os.cpu_count() or 1
            result = await client.upload_all(
                claims, _opener(store), parallel=parallel, keep=keep, make_object=_maker(store)
            )
        finally:
            if shown is not None:
                shown.cancel()
                await asyncio.wait([shown])
    return _tell(request, address, name, result, client.progress)


def _store_path(path: str, store: LocalStore) -> str:
    """Return the store path that an argument names or links to. Raises `ClientError`."""
    directory = StoreDir(store.store_dir)
    resolved = path if path.startswith(f"{directory.path}/") else os.path.realpath(path)
    prefix = f"{directory.path}/"
    if store.root and resolved.startswith(f"{store.root.rstrip('/')}{prefix}"):
        resolved = resolved[len(store.root.rstrip("/")) :]
    top = prefix + resolved.removeprefix(prefix).partition("/")[0]
    try:
        directory.parse(top)
    except FormatError:
        raise BadArgumentError(f"{path} is no path of the store {directory.path}, and no link to one") from None
    return top


def _not_valid(path: str) -> BadArgumentError:
    return BadArgumentError(f"{path} is not valid in the local store; build or fetch it first")


def _opener(store: LocalStore) -> OpenNar:
    # On macOS Nix renames files that differ in case only; their NAR has the true names.
    case_hack = sys.platform == "darwin"

    def open_nar(claim: PathClaim, compression: Compression) -> AbstractAsyncContextManager[CompressedNar]:
        nar = store.dump(f"{store.store_dir}/{claim.path}", case_hack=case_hack)
        return compressing_files(nar, compression)

    return open_nar


def _maker(store: LocalStore) -> MakeObject:
    case_hack = sys.platform == "darwin"

    def make_object(claim: PathClaim, compression: Compression) -> tuple[bytes, UploadedNar]:
        try:
            return compress_now(store.dump(f"{store.store_dir}/{claim.path}", case_hack=case_hack), compression)
        except ClosureError as error:
            raise SourceChangedError(str(error)) from None

    return make_object


async def _show(progress: UploadProgress) -> None:
    """Keep one line on the terminal."""
    try:
        while True:
            line = f"pushing  {progress.paths} of {progress.wanted} paths, {size(progress.sent_bytes)} sent"
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            await asyncio.sleep(PROGRESS_S)
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _tell(request: PushRequest, address: str, name: str, result: UploadResult, progress: UploadProgress) -> int:
    failed = [verdict for verdict in result.verdicts if verdict.status not in _GOOD]
    published = sum(verdict.status in {SendStatus.PUBLISHED, SendStatus.PRESENT} for verdict in result.verdicts)
    if request.as_json:
        print_json(
            {
                "cache": address,
                "kept_as": name,
                "published": published,
                "present": len(result.present),
                "upstream": len(result.upstream),
                "conflicts": sorted(result.conflicts),
                "sent_bytes": progress.sent_bytes,
                "failed": [verdict.model_dump(mode="json") for verdict in failed],
            }
        )
    else:
        lines = [f"{published} paths published, {size(progress.sent_bytes)} sent; {len(result.present)} were there"]
        if result.upstream:
            lines[0] += f", {len(result.upstream)} came from upstream"
        lines += [
            f"{path}: other bits were published before and stay; yours differ" for path in sorted(result.conflicts)
        ]
        lines += [f"{verdict.path}: {verdict.message or verdict.status.value}" for verdict in failed]
        kept = f"for {request.days:g} days" if request.days else "for ever"
        lines.append(f"kept as push {name} {kept}")
        print_lines(lines)
    return exit_status.INFRASTRUCTURE if failed else exit_status.OK
