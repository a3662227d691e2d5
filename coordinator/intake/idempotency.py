"""Idempotency keys: the same wish under the same key, by the same owner, is one submission however often it is sent.

A key lies in the note of its submission, which is durable with it and forgotten with it; what is here is an index of
the notes. A wish that comes while the first one with its key is still planned waits for that. One that was closed
before all of it had come has no key any more: the next request begins anew.

A wish that is evaluated while it is submitted has no roots yet when its key is looked up. What it is evaluated from is
compared then, and its roots where they come (`growth`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256
from typing import Final

import orjson

from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.errors import ConflictError, HeldError
from coordinator.journal.codec import OriginNote
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from scheduler.model import SubmissionId

#: Keys of forgotten submissions that the index may hold beside as many as there are submissions.
STALE_KEYS: Final = 64
#: Characters of a key in a refusal.
_SHOWN: Final = 60


def wish_digest(wish: SubmitRequest) -> str:
    """Return the digests of what a wish is: label and origin, and roots or what they are evaluated from.

    A retry has the same, and other times.
    """
    about = _digest([wish.label, wish.branch, wish.pull, wish.commit])
    if wish.open:
        return f"{about} open {wish.evaluates}"
    roots = (root.model_dump(mode="json") for root in wish.roots)
    return f"{about} {_digest(sorted(roots, key=lambda root: (root['attr'], root['drv'])))}"


def _digest(value: object) -> str:
    return sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def contradicting(roots: Collection[RootRequest], known: Collection[tuple[str, str]]) -> RootRequest | None:
    """Return the first root whose attribute stands for other derivations among those known; None where none does.

    Derivations that are named themselves may share a name: what stands for a known one too contradicts nothing.
    """
    attrs = {attr for attr, _ in known} - {root.attr for root in roots if (root.attr, root.drv) in known}
    return next((root for root in roots if root.attr in attrs), None)


class IdempotencyKeys:
    """Index of the keys of all submissions, by owner."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._known: dict[tuple[str, str], SubmissionId] = {}
        #: Keys whose submission is being made.
        self._busy: dict[tuple[str, str], asyncio.Event] = {}
        self._read_notes()

    async def once(
        self, origin: OriginNote, wish: SubmitRequest, submit: Callable[[], Awaitable[SubmissionRow]]
    ) -> SubmissionRow:
        """Return the submission that has the origin's key, or what `submit` makes where there is none.

        Raises `ConflictError` where that submission has another wish, `HeldError` where that is not known yet, and what
        `submit` raises.
        """
        name = origin.owner, origin.key
        while (busy := self._busy.get(name)) is not None:
            await busy.wait()
        row = self._find(name)
        if row is not None:
            await self._require_same(row, origin, wish)
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

    async def _require_same(self, row: SubmissionRow, origin: OriginNote, wish: SubmitRequest) -> None:
        """Raise `ConflictError` or `HeldError` unless a wish is, or yet may be, that of the submission of its key."""
        note = self._views.note(row.id)
        if note.origin.wish == origin.wish:
            return
        refusal = ConflictError(
            f"the idempotency key {origin.key[:_SHOWN]!r} is that of submission {row.id}, which has other "
            "roots, another label or another origin; use a new key for a new wish."
        )
        (about, *first), (other_about, *second) = note.origin.wish.split(" "), origin.wish.split(" ")
        was_opened = first[:1] == ["open"]
        if about != other_about or not (was_opened or wish.open):
            raise refusal
        if was_opened and wish.open:
            if all(first[1:]) and all(second[1:]):
                raise refusal
            return
        if wish.open:
            # Its roots are compared as they come.
            return
        known = {(root.attr, root.drv) for root in note.roots}
        if {drv for _, drv in known} == {root.drv for root in wish.roots} and not row.is_open:
            return
        if not row.is_open or await asyncio.to_thread(contradicting, wish.roots, known) is not None:
            raise refusal
        raise HeldError(
            f"submission {row.id} of the idempotency key {origin.key[:_SHOWN]!r} still grows by another client, so "
            "whether it wishes the same is not known; submit again when it is complete."
        )

    def _find(self, name: tuple[str, str]) -> SubmissionRow | None:
        row = self._views.find(self._known.get(name, ""))
        if row is None or row.incomplete:
            self._known.pop(name, None)
            return None
        return row

    def _read_notes(self) -> None:
        """Make the index anew from the notes of the submissions that are known."""
        self._known.clear()
        for row in self._views.submission_rows():
            origin = self._views.note(row.id).origin
            if origin.key and not row.incomplete:
                self._known[origin.owner, origin.key] = row.id
