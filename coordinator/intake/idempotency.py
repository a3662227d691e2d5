"""Idempotency keys: the same wish under the same key, by the same owner, is one submission however often it is sent.

A key lies in the note of its submission, which is durable with it and forgotten with it; what is here is an index of
the notes. A wish that comes while the first one with its key is still planned waits for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Final

import orjson

from coordinator.api.requests import SubmitRequest
from coordinator.errors import ConflictError
from coordinator.journal.codec import OriginNote
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from scheduler.model import SubmissionId

#: Keys of forgotten submissions that the index may hold beside as many as there are submissions.
STALE_KEYS: Final = 64
#: Characters of a key in a refusal.
_SHOWN: Final = 60


def wish_digest(wish: SubmitRequest) -> str:
    """Return the digest of what a wish is: roots, label and origin. A retry has the same, and other times."""
    roots = sorted((root.model_dump(mode="json") for root in wish.roots), key=lambda root: (root["attr"], root["drv"]))
    parts = [roots, wish.label, wish.branch, wish.pull, wish.commit]
    return sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


class IdempotencyKeys:
    """Index of the keys of all submissions, by owner."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._known: dict[tuple[str, str], SubmissionId] = {}
        #: Keys whose submission is being made.
        self._busy: dict[tuple[str, str], asyncio.Event] = {}
        self._read_notes()

    async def once(self, origin: OriginNote, submit: Callable[[], Awaitable[SubmissionRow]]) -> SubmissionRow:
        """Return the submission that has the origin's key, or what `submit` makes where there is none.

        Raises `ConflictError` where that submission has another wish, and what `submit` raises.
        """
        name = origin.owner, origin.key
        while (busy := self._busy.get(name)) is not None:
            await busy.wait()
        row = self._find(name)
        if row is not None:
            if self._views.note(row.id).origin.wish != origin.wish:
                raise ConflictError(
                    f"the idempotency key {origin.key[:_SHOWN]!r} is that of submission {row.id}, which has other "
                    "roots, another label or another origin; use a new key for a new wish."
                )
            return row
        done = self._busy[name] = asyncio.Event()
        try:
            row = await submit()
            self._known[name] = row.id
        finally:
            del self._busy[name]
            done.set()
        if len(self._known) > 2 * self._views.submission_total() + STALE_KEYS:
            self._read_notes()
        return row

    def _find(self, name: tuple[str, str]) -> SubmissionRow | None:
        row = self._views.find(self._known.get(name, ""))
        if row is None:
            self._known.pop(name, None)
        return row

    def _read_notes(self) -> None:
        """Make the index anew from the notes of the submissions that are known."""
        self._known.clear()
        for row in self._views.submission_rows():
            origin = self._views.note(row.id).origin
            if origin.key:
                self._known[origin.owner, origin.key] = row.id
