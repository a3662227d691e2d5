"""Replay of a journal into a core and a read model, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from coordinator.journal.codec import SubmissionNote
from coordinator.journal.journal import Journal
from coordinator.readmodel.views import Views
from scheduler.facts import Fact, SubmissionAccepted, SubmissionRestored, SubmissionRetried
from scheduler.farm import Farm
from scheduler.model import SubmissionId

_NO_NOTES: Mapping[SubmissionId, SubmissionNote] = MappingProxyType({})


async def replay(
    journal: Journal, farm: Farm, views: Views, notes: Mapping[SubmissionId, SubmissionNote] = _NO_NOTES
) -> int:
    """Replay `journal`, from its newest snapshot on, into an empty farm and its views; returns the number of facts.

    `notes` complete journals of before 2026-11-29 (`with_limits`). Raises `JournalError`.
    """
    count = 0
    limited = {name: note for name, note in notes.items() if any(root.limits for root in note.roots)}
    async for piece in journal.load():
        facts = with_limits(piece.facts, limited) if limited else piece.facts
        # A batch may be split between frames, so nothing ends before the last of them.
        views.fold(farm.replaying(facts), settle=False)
        if piece.records:
            views.restore(piece.records)
        count += len(piece.facts)
        # A long replay must not keep signals and supervisors waiting.
        await asyncio.sleep(0)
    views.settle()
    return count


def with_limits(facts: Iterable[Fact], notes: Mapping[SubmissionId, SubmissionNote]) -> Iterable[Fact]:
    """Yield `facts`, those that lack a submission's limits with the limits of its note.

    In journals of before 2026-11-29 only notes have them.
    """
    for fact in facts:
        if isinstance(fact, SubmissionAccepted | SubmissionRetried | SubmissionRestored) and not fact.limits:
            note = notes.get(fact.submission)
            roots = () if note is None else note.roots
            limits = {root.step: root.limits for root in roots if root.limits is not None}
            yield replace(fact, limits=tuple(limits.items())) if limits else fact
        else:
            yield fact
