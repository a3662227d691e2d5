"""`drover cache push`: paths of this machine's Nix store, with their closure, into a cache.

The daemon answers what the closure is; `coordinator.cli.cache_sending` sends it, which is imported while the daemon
starts.
"""

from __future__ import annotations

import asyncio
import os
from importlib import import_module

from coordinator.client.closure import LocalStore, local_store, query_closure
from coordinator.client.errors import BadArgumentError, ClientError, RefusedError
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir
from infra.objects.errors import CacheError
from infra.records import record
from infra.upload.errors import SenderRefusedError


@record(frozen=True, slots=True)
class PushRequest:
    """Arguments of the command."""

    url: str
    token_file: str
    cache: str
    paths: tuple[str, ...]
    store: str | None = None
    keep_as: str | None = None
    days: float = 30.0
    as_json: bool = False


def push(request: PushRequest) -> int:
    """Run `drover cache push`; returns the exit status."""
    try:
        return asyncio.run(_push(request))
    except SenderRefusedError as error:
        raise RefusedError(error.status, error.code, str(error)) from None
    except CacheError as error:
        raise ClientError(str(error)) from None


async def _push(request: PushRequest) -> int:
    store = local_store(request.store)
    roots = [_store_path(path, store) for path in request.paths]
    asking = asyncio.create_task(query_closure(store, roots, _not_valid))
    await asyncio.to_thread(import_module, "coordinator.cli.cache_sending")
    infos = await asking
    from coordinator.cli.cache_sending import send  # noqa: PLC0415 - slow to import

    return await send(request, store, roots, infos)


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
