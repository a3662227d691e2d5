"""The read model's part of a snapshot: what it knows of steps and submissions and the core's facts do not hold.

A snapshot is the facts of `Farm.snapshot` and the records of `tell_history`. To start from it, fold the facts into the
views as any others, then give the records to `take_history`, then fold what the journal holds beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from coordinator.api.models import StepStatus
from coordinator.journal.codec import Record, StepRecord, SubmissionRecord
from coordinator.readmodel.rows import SharedMemberships, StepRow, SubmissionRow
from scheduler.facts import StepRestored
from scheduler.model import StepKey, StepState, SubmissionId

_STATUS = {state: StepStatus.RUNNING if state is StepState.LEASED else StepStatus(state.value) for state in StepState}


def restore_step(row: StepRow, fact: StepRestored) -> None:
    """Take in a step of a snapshot of the core."""
    row.state = _STATUS[fact.state]
    if fact.attempt:
        row.mutable_life().attempt = fact.attempt
    if fact.past is not None:
        life = row.mutable_life()
        life.builder = fact.past.builder
        life.failure, life.cause = fact.past.failure, fact.past.cause or ""
    if fact.recipes:
        row.requires = fact.recipes[fact.past.active if fact.past is not None else 0].requirements


def tell_history(
    steps: Mapping[StepKey, StepRow], submissions: Mapping[SubmissionId, SubmissionRow]
) -> Iterator[Record]:
    """Yield what rebuilds these rows once the steps are restored from facts. They must not change meanwhile."""
    for row in steps.values():
        life = row.life
        if life.started_at or life.ended_at or life.uploaded_bytes or life.trouble:
            times = life.started_at, life.ended_at
            yield StepRecord(row.key, life.builder, *times, life.uploaded_bytes, life.trouble, life.isolation)
    for sub in submissions.values():
        yield SubmissionRecord(
            submission=sub.id,
            created_at=sub.created_at,
            roots=tuple(sorted(sub.roots)),
            members=tuple(sub.members),
            apart=() if sub.ended else tuple([key for key in sub.members if sub not in steps[key].submissions]),
            held=sub.held,
            joined=sub.joined,
            counts=tuple((state.value, count) for state, count in sub.counts.items() if count),
            failed=tuple(sub.failed),
            done_roots=sub.done_roots,
            uploaded_bytes=sub.uploaded_bytes,
            withdrawn=sub.withdrawn,
            touched_at=sub.touched_at,
            ended=sub.ended,
            why=sub.why,
            by=sub.by,
            terms=sub.terms,
            open=sub.is_open,
            incomplete=sub.incomplete,
        )


def take_history(
    records: Iterable[Record],
    steps: Mapping[StepKey, StepRow],
    submissions: MutableMapping[SubmissionId, SubmissionRow],
) -> None:
    """Take records in, in order; all steps that they name are known by now."""
    for record in records:
        if isinstance(record, StepRecord):
            life = steps[record.step].mutable_life()
            life.builder, life.started_at, life.ended_at = record.builder, record.started_at, record.ended_at
            life.uploaded_bytes, life.trouble, life.isolation = record.uploaded_bytes, record.trouble, record.isolation
        else:
            submissions[record.submission] = _submission(record, steps)


def _submission(record: SubmissionRecord, steps: Mapping[StepKey, StepRow]) -> SubmissionRow:
    sub = SubmissionRow(
        record.submission,
        record.created_at,
        set(record.roots),
        list(record.members),
        held=record.held,
        joined=record.joined,
        done_roots=record.done_roots,
        uploaded_bytes=record.uploaded_bytes,
        withdrawn=record.withdrawn,
        touched_at=record.touched_at,
        ended=record.ended,
        why=record.why,
        by=record.by,
        terms=record.terms,
        is_open=record.open,
        incomplete=record.incomplete,
    )
    if sub.ended:
        sub.counts.update((StepStatus(state), count) for state, count in record.counts)
        sub.failed.update((key, steps[key]) for key in record.failed if key in steps)
        return sub
    apart, memberships = frozenset(record.apart), SharedMemberships(sub)
    for key in sub.members:
        if key not in apart:
            memberships.add(steps[key])
    return sub
