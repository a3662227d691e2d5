"""Sending side of `drover cache push`.

The bytes are read from the store's files, compressed in threads and sent while they are read, small ones many in one
request, as many requests at a time as there are cores. What the cache has is not sent, and what was cut goes on where
it stopped with the next push.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Final

from coordinator.cli import exit_status
from coordinator.cli.cache_push import PushRequest
from coordinator.cli.printing import print_json, print_lines, size
from coordinator.client.closure import ClosureError, LocalStore
from coordinator.client.errors import BadArgumentError
from coordinator.client.token import find_token
from infra.nix.path_info import PathInfo
from infra.nix.store_path import base_name_of
from infra.objects.compression import Compression
from infra.objects.nar_encoder import CompressedNar, UploadedNar, compress_now, compressing_files
from infra.upload.client import OpenNar, UploadClient, UploadProgress, UploadResult, upload_connections
from infra.upload.packs import MakeObject, SourceChangedError
from infra.upload.protocol import KEEP_NAME, MAX_PATHS, KeepRequest, PathClaim, SendStatus

#: Seconds between two progress lines on a terminal.
PROGRESS_S: Final = 0.2
#: A conflict too: the path can be fetched, with the bits that came first.
_GOOD: Final = frozenset({SendStatus.PUBLISHED, SendStatus.PRESENT, SendStatus.CONFLICT})


async def send(request: PushRequest, store: LocalStore, roots: Sequence[str], infos: Mapping[str, PathInfo]) -> int:
    """Send the closure `infos` of `roots`; returns the exit status."""
    if len(infos) > MAX_PATHS:
        raise BadArgumentError(f"the closure has {len(infos)} paths; push parts of it, at most {MAX_PATHS} at a time")
    name = request.keep_as or base_name_of(roots[0])[:200]
    if not re.fullmatch(KEEP_NAME, name):
        raise BadArgumentError(
            f"{name[:80]!r} cannot name a root; --keep-as takes up to 200 letters, digits and ._+?=-"
        )
    claims = [PathClaim.of(info) for info in infos.values()]
    keep = KeepRequest(name=name, paths=tuple(base_name_of(root) for root in roots), days=request.days)
    address = f"{request.url.rstrip('/')}/cache" + (f"/{request.cache}" if request.cache != "default" else "")
    async with upload_connections() as connections:
        client = UploadClient(connections, address, find_token(request.token_file))
        shown = asyncio.create_task(_show(client.progress)) if sys.stderr.isatty() else None
        try:
            parallel = os.cpu_count() or 1
            result = await client.upload_all(
                claims,
                _opener(store),
                parallel=parallel,
                keep=keep,
                make_object=_maker(store),
                open_unhashed=_opener(store, is_hashed=False),
                make_unhashed=_maker(store, is_hashed=False),
            )
        finally:
            if shown is not None:
                shown.cancel()
                await asyncio.wait([shown])
    return _tell(request, address, name, result, client.progress)


def _opener(store: LocalStore, *, is_hashed: bool = True) -> OpenNar:
    # On macOS Nix renames files that differ in case only; their NAR has the true names.
    case_hack = sys.platform == "darwin"

    def open_nar(claim: PathClaim, compression: Compression) -> AbstractAsyncContextManager[CompressedNar]:
        nar = store.dump(f"{store.store_dir}/{claim.path}", case_hack=case_hack)
        return compressing_files(nar, compression, is_hashed=is_hashed)

    return open_nar


def _maker(store: LocalStore, *, is_hashed: bool = True) -> MakeObject:
    case_hack = sys.platform == "darwin"

    def make_object(claim: PathClaim, compression: Compression) -> tuple[bytes, UploadedNar]:
        try:
            nar = store.dump(f"{store.store_dir}/{claim.path}", case_hack=case_hack)
            return compress_now(nar, compression, is_hashed=is_hashed)
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
                "failed": [asdict(verdict) for verdict in failed],
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
