"""Presigned uploads to S3: the holder of an address may PUT exactly that object or part, for a while, nothing else.

obstore signs whole objects; parts of a multipart upload are signed by botocore, which also begins, lists, completes and
aborts them. Signing is arithmetic; the rest are requests of its own to the store, made in threads, each bounded in time
and tries. Credentials and endpoint come from the environment, as for obstore.

Small objects are put below `incoming/` and read by the coordinator, which writes what it verified under the final key:
an address that is still good cannot change a published object. A multipart upload writes to its final key, named after
the NAR's hash and a generation, since the hash of the file is not known before; once completed its addresses are void.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

from infra.objects.errors import ObjectMissingError, ObjectStoreError
from infra.objects.store import INCOMING, ObjectStore
from infra.upload.protocol import StoredPart

#: botocore makes the methods of its clients at run time.
S3Client: TypeAlias = Any

#: Seconds that an address is good for.
PRESIGN_S: Final = 3600
#: Requests to the store at one time, tries of each, and seconds to connect and between two bytes of an answer.
REQUESTS: Final = 8
TRIES: Final = 4
CONNECT_S: Final = 5
READ_S: Final = 60
#: Parts, or uploads, in one page of a listing (the protocol's own bound).
PAGE: Final = 1000

_T = TypeVar("_T")


class DirectUploads:
    """Presigns for one bucket, below one prefix (without slashes at its ends, or empty)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._room = asyncio.Semaphore(REQUESTS)
        self._client: S3Client | None = None

    async def put_urls(self, keys: Sequence[str]) -> list[str]:
        """Return an address for each key, to PUT the whole object to."""
        return await self._ask("sign", lambda client: [self._put_url(client, key) for key in keys])

    def _put_url(self, client: S3Client, key: str) -> str:
        params = {"Bucket": self._bucket, "Key": self._prefix + key}
        url: str = client.generate_presigned_url("put_object", Params=params, ExpiresIn=PRESIGN_S)
        return url

    async def part_urls(self, key: str, upload: str, numbers: range) -> dict[int, str]:
        """Return part number -> address, for parts of the multipart upload."""

        def sign(client: S3Client) -> dict[int, str]:
            params = {"Bucket": self._bucket, "Key": self._prefix + key, "UploadId": upload}
            return {
                number: client.generate_presigned_url(
                    "upload_part", Params={**params, "PartNumber": number}, ExpiresIn=PRESIGN_S
                )
                for number in numbers
            }

        return await self._ask("sign", sign)

    async def open_multipart(self, key_start: str, suffix: str) -> tuple[str, str]:
        """Return key and id of an unfinished multipart upload whose key begins so, a new one if there is none.

        The key of a new one ends with `suffix`.
        """

        def find(client: S3Client) -> tuple[str, str]:
            start = self._prefix + key_start
            found = client.list_multipart_uploads(Bucket=self._bucket, Prefix=start, MaxUploads=1)
            for upload in found.get("Uploads", ()):
                if upload["Key"].startswith(start):
                    return upload["Key"].removeprefix(self._prefix), upload["UploadId"]
            key = f"{key_start}{secrets.token_hex(4)}{suffix}"
            made = client.create_multipart_upload(Bucket=self._bucket, Key=self._prefix + key)
            return key, made["UploadId"]

        return await self._ask("begin an upload in", find)

    async def parts(self, key: str, upload: str, numbers: range) -> list[StoredPart]:
        """Return those of the parts that the store has."""

        def look(client: S3Client) -> list[StoredPart]:
            page = client.list_parts(
                Bucket=self._bucket,
                Key=self._prefix + key,
                UploadId=upload,
                MaxParts=min(len(numbers), PAGE),
                PartNumberMarker=numbers.start - 1,
            )
            return [
                StoredPart(number=part["PartNumber"], size=part["Size"], etag=part["ETag"].strip('"'))
                for part in page.get("Parts", ())
                if part["PartNumber"] in numbers
            ]

        return await self._ask("list the parts of an upload in", look)

    async def complete(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Make the object out of its parts, numbered from 1.

        Raises:
            ObjectMissingError: there is no such upload, or not with these parts.
            ObjectStoreError: the store failed.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        await self._ask(
            "complete an upload in",
            lambda client: client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._prefix + key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            ),
        )

    async def abort(self, key: str, upload: str) -> None:
        """Throw away an unfinished upload; there being none is no error."""
        try:
            await self._ask(
                "abort an upload in",
                lambda client: client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + key, UploadId=upload
                ),
            )
        except ObjectMissingError:
            return

    async def sweep(self, before: float) -> int:
        """Abort the unfinished uploads that were begun before (Unix seconds); returns how many."""

        def stale(client: S3Client) -> list[tuple[str, str]]:
            pages = client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}nar/", PaginationConfig={"PageSize": PAGE}
            )
            return [
                (upload["Key"].removeprefix(self._prefix), upload["UploadId"])
                for page in pages
                for upload in page.get("Uploads", ())
                if upload["Initiated"].timestamp() < before
            ]

        uploads = await self._ask("list uploads in", stale)
        for key, upload in uploads:
            await self.abort(key, upload)
        return len(uploads)

    async def _ask(self, verb: str, ask: Callable[[S3Client], _T]) -> _T:
        async with self._room:
            return await asyncio.to_thread(self._ask_now, verb, ask)

    def _ask_now(self, verb: str, ask: Callable[[S3Client], _T]) -> _T:
        # Half a second to import, which those who have no S3 store need not pay.
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            if self._client is None:
                self._client = _client()
            return ask(self._client)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in {"NoSuchUpload", "NoSuchKey", "InvalidPart", "InvalidPartOrder", "404"}:
                raise ObjectMissingError(f"the object store has no such upload ({code})") from error
            raise ObjectStoreError(f"cannot {verb} the object store: it answered {code or 'an error'}") from error
        except (BotoCoreError, OSError) as error:
            raise ObjectStoreError(f"cannot {verb} the object store: {str(error).splitlines()[0]}") from error


def _client() -> S3Client:
    import botocore.session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"total_max_attempts": TRIES, "mode": "standard"},
        max_pool_connections=REQUESTS,
        # Stores other than Amazon's seldom answer under a host name of each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return botocore.session.Session().create_client("s3", region_name=region, endpoint_url=endpoint, config=config)


def direct_uploads(store: ObjectStore) -> DirectUploads | None:
    """Return what presigns for the store, None where it is none of S3."""
    parts = urlsplit(store.url)
    if parts.scheme not in {"s3", "s3a"}:
        return None
    return DirectUploads(parts.hostname or "", parts.path.strip("/"))


def staged_key(slot: str) -> str:
    """Return where a small object waits until the coordinator has looked at it."""
    return f"{INCOMING}/put-{slot}"
