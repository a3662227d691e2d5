"""The exact bytes in which a store path's metadata is sent and kept: older agents, journals and caches have them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import TypeAdapter, ValidationError

from coordinator.api.sent_streams import SourceHeader
from coordinator.journal.codec import Evidence, decode_evidence, encode_evidence
from infra.daemon.values import decode_path_info, encode_path_info
from infra.daemon.wire import Encoder, Inbox
from infra.decoding import decoder
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.nar_encoder import UploadedNar
from infra.objects.nar_writer import upload_nar
from infra.upload.protocol import (
    Begin,
    Commit,
    KeepRequest,
    PartsWanted,
    PathClaim,
    SentPath,
    UploadMessage,
    UrlsWanted,
)
from tests.support.cache import STORE_DIR, chunked, open_cache, secret_key
from workers.wire.messages import OUTPUTS, Output

BELOW, ABOVE = "0" * 32 + "-below", "1" * 32 + "-above"
DRV = "2" * 32 + "-above.drv"
NAR_HASH, FILE_HASH = "sha256:" + "0" * 51 + "1", "sha256:" + "0" * 51 + "2"
NAR_KEY = "nar/" + "0" * 51 + "2.nar.zst"

INFO = PathInfo(f"/nix/store/{ABOVE}", NAR_HASH, 120, (BELOW, ABOVE), DRV, ("k:1", "k:2"), "text:sha256:x")
STORED = StoredNar(NAR_KEY, "zstd", FILE_HASH, 77)
OUTPUT = Output.of("out", NarInfo(INFO, STORED))
OUTPUT_JSON = (
    f'{{"name":"out","path":"/nix/store/{ABOVE}","nar_hash":"{NAR_HASH}","nar_size":120,'
    f'"references":["{BELOW}","{ABOVE}"],"ca":"text:sha256:x","url":"{NAR_KEY}","compression":"zstd",'
    f'"file_hash":"{FILE_HASH}","file_size":77}}'
).encode()


def test_evidence_in_a_journal_has_these_bytes() -> None:
    stored = b'{"v":1,"outputs":[' + OUTPUT_JSON + b'],"isolation":"A"}'
    assert encode_evidence(Evidence((OUTPUT,), "A")) == stored
    assert decode_evidence(stored) == Evidence((OUTPUT,), "A")


def test_a_worker_reports_an_output_with_these_bytes() -> None:
    assert OUTPUTS.dump_json((OUTPUT,)) == b"[" + OUTPUT_JSON + b"]"


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (
            PathClaim.of(INFO),
            (
                f'{{"path":"{ABOVE}","nar_hash":"{NAR_HASH}","nar_size":120,"references":["{BELOW}","{ABOVE}"],'
                f'"deriver":"{DRV}","ca":"text:sha256:x"}}'
            ),
        ),
        (
            SentPath(path=ABOVE, file_hash=FILE_HASH, file_size=77, etags=("a",)),
            f'{{"path":"{ABOVE}","file_hash":"{FILE_HASH}","file_size":77,"etags":["a"]}}',
        ),
        (
            SourceHeader.of(INFO),
            (
                f'{{"path":"{ABOVE}","references":["{BELOW}","{ABOVE}"],"nar_hash":"{NAR_HASH}","nar_size":120,'
                f'"ca":"text:sha256:x"}}'
            ),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_client_says_what_it_has_with_these_bytes(message: UploadMessage | SourceHeader, sent: str) -> None:
    kind: Any = type(message)
    said = message.json() if isinstance(message, UploadMessage) else orjson.dumps(message)
    assert said == sent.encode()
    assert decoder(kind)(orjson.loads(sent)) == TypeAdapter(kind).validate_json(sent) == message


CLAIM = {"path": ABOVE, "nar_hash": NAR_HASH, "nar_size": 120}
SENT = {"path": ABOVE, "file_hash": FILE_HASH, "file_size": 77}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (PathClaim, {**CLAIM, "path": "short"}),
        (PathClaim, {**CLAIM, "path": "x" * 256}),
        (PathClaim, {**CLAIM, "nar_hash": "sha256:x"}),
        (PathClaim, {**CLAIM, "nar_hash": ""}),
        (PathClaim, {**CLAIM, "nar_size": 0}),
        (PathClaim, {**CLAIM, "nar_size": 1 << 60}),
        (PathClaim, {**CLAIM, "references": ["short"]}),
        (PathClaim, {**CLAIM, "deriver": "x" * 256}),
        (PathClaim, {**CLAIM, "other": 1}),
        (PathClaim, {"path": ABOVE, "nar_hash": NAR_HASH}),
        (Begin, {"paths": []}),
        (Begin, {"paths": [CLAIM] * 10_001}),
        (KeepRequest, {"name": "../x", "paths": [ABOVE]}),
        (KeepRequest, {"name": "x", "paths": []}),
        (KeepRequest, {"name": "x", "paths": [ABOVE], "days": -1}),
        (SentPath, {**SENT, "file_hash": "md5:x"}),
        (SentPath, {**SENT, "etags": ["x" * 201]}),
        (PartsWanted, {"path": ABOVE, "first": 0, "count": 1}),
        (PartsWanted, {"path": ABOVE, "first": 1, "count": 257}),
        (UrlsWanted, {"paths": [ABOVE] * 257}),
        (Commit, {"sent": [{**SENT, "path": 1}]}),
        (Commit, {"sent": [], "keep": {"name": "x", "paths": [ABOVE], "for": 1}}),
    ],
)
def test_a_message_beyond_its_bounds_is_refused(kind: Any, value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


def test_a_message_gives_back_the_metadata_that_it_was_made_of() -> None:
    unsigned = replace(INFO, sigs=())
    assert OUTPUT.narinfo(DRV) == NarInfo(unsigned, STORED)
    assert PathClaim.of(INFO).info(STORE_DIR) == unsigned
    assert SourceHeader.of(INFO).info(STORE_DIR) == replace(unsigned, deriver="")
    assert SentPath(path=ABOVE, file_hash=FILE_HASH, file_size=77).stored(NAR_KEY, "zstd") == STORED


def test_a_daemon_gives_and_takes_a_path_in_these_words() -> None:
    words = Encoder().string(f"/nix/store/{DRV}").string("01" + "00" * 31)
    words.strings([f"/nix/store/{BELOW}", f"/nix/store/{ABOVE}"]).integer(0).integer(120).integer(0)
    words.strings(["k:1", "k:2"]).string("text:sha256:x")
    sent = Encoder()
    encode_path_info(INFO, sent)
    assert sent.getvalue() == Encoder().string(f"/nix/store/{ABOVE}").getvalue() + words.getvalue()
    assert decode_path_info(f"/nix/store/{ABOVE}", Inbox(words.getvalue())) == INFO


async def test_a_published_path_and_a_conflict_are_these_rows(tmp_path: Path) -> None:
    ca = "text:sha256:" + "0" * 52

    def claim(path: str, made: UploadedNar, references: tuple[str, ...] = (), deriver: str = "") -> NarInfo:
        return made.narinfo(PathInfo(path, "", 0, references, deriver, ("another:signature",), ca))

    above = f"/nix/store/{ABOVE}"
    async with open_cache(tmp_path, now=lambda: 9.0) as cache:
        nar, other = [await upload_nar(cache.objects, chunked(each), "none") for each in (b"bits", b"other bits")]
        await cache.publish([claim(f"/nix/store/{BELOW}", nar)])
        await cache.publish([claim(above, nar, (ABOVE, BELOW, ABOVE), DRV)])
        await cache.publish([claim(above, other)])
        text = await cache.narinfo(ABOVE[:32]) or b""
    with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as database:
        (row,) = database.execute("select * from paths where store_path = ?", (above,))
        (conflict,) = database.execute("select * from conflicts")
    digest, other_digest = (sha256_text(sha256(each).digest()) for each in (b"bits", b"other bits"))
    key, other_key = (f"nar/{each.removeprefix('sha256:')}.nar" for each in (digest, other_digest))
    assert row == (2, ABOVE[:32], above, key, "none", digest, 4, digest, 4, DRV, ca, text, 9.0, 0.0, None)
    assert conflict == (2, other_digest, 10, other_key, 10, "", 9.0, 1)
    unsigned, _, signature = text.decode().partition("Sig: ")
    assert unsigned == (
        f"StorePath: {above}\nURL: {key}\nCompression: none\nFileHash: {digest}\nFileSize: 4\n"
        f"NarHash: {digest}\nNarSize: 4\nReferences: {BELOW} {ABOVE}\nDeriver: {DRV}\n"
    )
    covered = f"1;{above};{digest};4;/nix/store/{BELOW},/nix/store/{ABOVE}"
    assert signature == f"{secret_key().sign(covered.encode())}\nCA: {ca}\n"
