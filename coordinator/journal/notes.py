"""Notes of submissions: stored with their facts; what several have in common is stored once, by its digest.

The note of an open submission grows by rows of its own, so that a batch of roots costs what it has. The note of a
sealed one takes the place of all that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.journal import tables
from coordinator.journal.codec import StoredGrowth, StoredNote
from coordinator.journal.errors import JournalError
from scheduler.model import SubmissionId

#: What one event of a submission leaves.
Note = StoredNote | StoredGrowth


async def read_notes(connection: AsyncConnection) -> Mapping[SubmissionId, StoredNote]:
    """Return the note of each submission; equal shared parts are one object. Raises `JournalError`."""
    shared = {row.digest: row.body for row in await connection.execute(select(tables.shared))}
    shares = {row.submission: row.digest for row in await connection.execute(select(tables.shares))}
    rows = (await connection.execute(select(tables.notes))).all()
    if lost := set(shares.values()) - shared.keys():
        raise JournalError(f"the journal lacks {len(lost)} notes of submissions; restore the database from a backup.")
    bodies = {name: shared[digest] for name, digest in shares.items()}
    grown: dict[str, list[bytes]] = {}
    order = select(tables.growths).order_by(tables.growths.c.submission, tables.growths.c.number)
    for row in await connection.execute(order):
        grown.setdefault(row.submission, []).append(row.body)
    return {
        SubmissionId(row.submission): StoredNote(
            row.body, bodies.get(row.submission, b""), tuple(grown.get(row.submission, ()))
        )
        for row in rows
    }


async def write_notes(
    connection: AsyncConnection, given: Mapping[SubmissionId, Note], new: Collection[SubmissionId] = ()
) -> None:
    """Store notes in the place of what there was, of what they share what is not there yet, and growths of notes.

    `new` submissions have none yet: the statements that would look for theirs are as many as those that store.
    """
    growths = [
        {"submission": name, "number": note.number, "body": note.body}
        for name, note in given.items()
        if isinstance(note, StoredGrowth)
    ]
    for growth in growths:
        # Where it is not known whether a commit took place, it comes again.
        same = (tables.growths.c.submission == growth["submission"]) & (tables.growths.c.number == growth["number"])
        await connection.execute(delete(tables.growths).where(same))
    if growths:
        await connection.execute(insert(tables.growths), growths)
    notes = {name: note for name, note in given.items() if isinstance(note, StoredNote)}
    if not notes:
        return
    if before := [name for name in notes if name not in new]:
        await forget_notes(connection, before)
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
    await connection.execute(delete(tables.growths).where(tables.growths.c.submission.in_(submissions)))
    theirs = tables.shares.c.submission.in_(submissions)
    digests = set((await connection.execute(select(tables.shares.c.digest).where(theirs))).scalars())
    if digests:
        await connection.execute(delete(tables.shares).where(theirs))
        unshared = tables.shared.c.digest.in_(digests) & tables.shared.c.digest.not_in(select(tables.shares.c.digest))
        await connection.execute(delete(tables.shared).where(unshared))
