"""The signed binary cache: objects, metadata, publishing and reading.

objects     bytes by key: a directory, S3, GCS, Azure
compression the codecs that NARs come in, unpacked within bounds
verify      the one reader of NAR objects: trusts no size or hash that it was told
upload      NAR -> object, streaming                       (workers, intake)
listing     object -> `.ls`
download    object -> NAR, streaming and verified          (workers)
keys        signing keys, from files and the environment
signer      fingerprint -> signatures
metadata    the SQL tables
candidates  claims, outcomes and the pure part of deciding
cache       Cache: missing, publish, narinfo, closure      (the coordinator)
"""

from infra.cache.cache import Cache
from infra.cache.candidates import (
    AlreadyPublished,
    Candidate,
    Conflict,
    Published,
    PublishOutcome,
    Rejected,
    RejectReason,
)
from infra.cache.download import fetch_nar
from infra.cache.objects import ObjectStore, open_object_store
from infra.cache.upload import UploadedNar, upload_nar

__all__ = [
    "AlreadyPublished",
    "Cache",
    "Candidate",
    "Conflict",
    "ObjectStore",
    "PublishOutcome",
    "Published",
    "RejectReason",
    "Rejected",
    "UploadedNar",
    "fetch_nar",
    "open_object_store",
    "upload_nar",
]
