"""Contents of outputs in the farm's cache, as digests that do not depend on the hashes of store paths."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from hashlib import sha256
from typing import Final

from coordinator.client.api_client import ApiClient
from coordinator.client.errors import ClientError, UnreachableError, reason_of
from infra.nix.errors import FormatError
from infra.nix.narinfo import parse
from infra.nix.store_path import StoreDir, hash_part_of
from infra.objects.errors import CacheError
from infra.objects.http_source import fetch_nar_over_http

#: What stands for the hash of any store path.
_MASK: Final = b"0" * 32
MAX_NARINFO_BYTES: Final = 4 * 1024 * 1024
NARINFO_S: Final = 60.0


async def contents_of(client: ApiClient, outputs: Mapping[str, str]) -> dict[str, str]:
    """Return a digest of the content of each output (name -> full store path) in the farm's cache.

    The hashes of the path itself and of those that it refers to count for nothing.

    Raises:
        ClientError: The cache does not have it, or does not answer.
    """
    return {name: await _content(client, path) for name, path in outputs.items()}


async def _content(client: ApiClient, path: str) -> str:
    import aiohttp  # noqa: PLC0415 - slow to import

    cache = f"{client.url}/cache"
    headers = client.authorization
    timeout = aiohttp.ClientTimeout(total=NARINFO_S)
    async with aiohttp.ClientSession() as session:
        try:
            address = f"{cache}/{hash_part_of(path)}.narinfo"
            async with session.get(address, headers=headers, timeout=timeout) as answer:
                if answer.status != 200:
                    raise ClientError(f"the farm's cache does not give {path} (status {answer.status})")
                text = await answer.content.read(MAX_NARINFO_BYTES)
            narinfo = parse(text, StoreDir(path.rpartition("/")[0]))
            hashes = {narinfo.hash_part, *(reference[:32] for reference in narinfo.path.references)}
            url = f"{cache}/{narinfo.stored.url}"
            async with aclosing(fetch_nar_over_http(session, url, headers, narinfo)) as chunks:
                return await _digest(chunks, hashes)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnreachableError(client.url, reason_of(error)) from None
        except (FormatError, CacheError) as error:
            raise ClientError(f"the content of {path} cannot be read: {error}") from None


async def _digest(chunks: AsyncIterator[bytes], hashes: Iterable[str]) -> str:
    """Return the digest of a NAR in which each of `hashes` is masked, also where it lies across two chunks."""
    pattern = re.compile(b"|".join(re.escape(each.encode()) for each in sorted(hashes)))
    digest = sha256()
    kept = b""
    async for chunk in chunks:
        data = pattern.sub(_MASK, kept + chunk)
        # A hash may have begun in the last bytes; what is masked matches no more.
        cut = max(0, len(data) - len(_MASK) + 1)
        await asyncio.to_thread(digest.update, data[:cut])
        kept = data[cut:]
    digest.update(kept)
    return digest.hexdigest()
