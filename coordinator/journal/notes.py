"""Notes of submissions: stored with their facts; what several have in common is stored once, by its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.journal import tables
from coordinator.journal.codec import StoredNote
from coordinator.journal.errors import JournalError
from scheduler.model import SubmissionId


async def read_notes(connection: AsyncConnection) -> Mapping[SubmissionId, StoredNote]:
    """Return the note of each submission; equal shared parts are one object. Raises `JournalError`."""
    shared = {row.digest: row.body for row in await connection.execute(select(tables.shared))}
    shares = {row.submission: row.digest for row in await connection.execute(select(tables.shares))}
    rows = (await connection.execute(select(tables.notes))).all()
    if lost := set(shares.values()) - shared.keys():
        raise JournalError(f"the journal lacks {len(lost)} notes of submissions; restore the database from a backup.")
    bodies = {name: shared[digest] for name, digest in shares.items()}
    return {SubmissionId(row.submission): StoredNote(row.body, bodies.get(row.submission, b"")) for row in rows}


async def write_notes(connection: AsyncConnection, notes: Mapping[SubmissionId, StoredNote]) -> None:
    """Store notes, and of what they share what is not there yet."""
    await connection.execute(
        insert(tables.notes), [{"submission": name, "body": note.own} for name, note in notes.items()]
    )
    digests = {name: hashlib.sha256(note.shared).hexdigest() for name, note in notes.items() if note.shared}
    if not digests:
        return
    bodies = {digests[name]: note.shared for name, note in notes.items() if name in digests}
    known = select(tables.shared.c.digest).where(tables.shared.c.digest.in_(bodies))
    for digest in (await connection.execute(known)).scalars():
        del bodies[digest]
    if bodies:
        await connection.execute(
            insert(tables.shared), [{"digest": name, "body": body} for name, body in bodies.items()]
        )
    await connection.execute(
        insert(tables.shares), [{"submission": name, "digest": each} for name, each in digests.items()]
    )


async def forget_notes(connection: AsyncConnection, submissions: Sequence[SubmissionId]) -> None:
    """Remove notes, and what no other note shares with them."""
    await connection.execute(delete(tables.notes).where(tables.notes.c.submission.in_(submissions)))
    theirs = tables.shares.c.submission.in_(submissions)
    digests = set((await connection.execute(select(tables.shares.c.digest).where(theirs))).scalars())
    if digests:
        await connection.execute(delete(tables.shares).where(theirs))
        unshared = tables.shared.c.digest.in_(digests) & tables.shared.c.digest.not_in(select(tables.shares.c.digest))
        await connection.execute(delete(tables.shared).where(unshared))
