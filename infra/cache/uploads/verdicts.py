"""Verdicts on the paths of an upload."""

from __future__ import annotations

from infra.cache.publishing.claims import AlreadyPublished, Conflict, Published, PublishOutcome, RejectReason
from infra.upload.protocol import SendStatus, SendVerdict


def stored(path: str, key: str) -> SendVerdict:
    """Return the verdict on an object that lies at `key`."""
    return SendVerdict(path=path, status=SendStatus.STORED, url=key)


def refused(path: str, message: str) -> SendVerdict:
    """Return the verdict on an object that must be sent again."""
    return SendVerdict(path=path, status=SendStatus.REFUSED, message=message)


def verdict_of(path: str, outcome: PublishOutcome, url: str) -> SendVerdict:
    """Return the verdict on a path that was published, or not."""
    match outcome:
        case Published():
            return SendVerdict(path=path, status=SendStatus.PUBLISHED, url=url)
        case AlreadyPublished():
            return SendVerdict(path=path, status=SendStatus.PRESENT, url=url)
        case Conflict(published_nar_hash=published):
            message = f"other bits were published before ({published}) and stay"
            return SendVerdict(path=path, status=SendStatus.CONFLICT, message=message)
    status = {
        RejectReason.MISSING_REFERENCES: SendStatus.MISSING_REFERENCES,
        RejectReason.STORE_FAILED: SendStatus.FAILED,
    }.get(outcome.reason, SendStatus.REFUSED)
    return SendVerdict(path=path, status=status, message=outcome.message, missing=outcome.missing)
