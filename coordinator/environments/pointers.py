"""The rule of release pointers, pure: which revision is `stable` for one system.

1. A pointer moves to a revision only where the coverage of that revision is whole on its system.
2. It asks for no other system.
3. It moves to higher revisions by itself, never back: of what is whole, the highest counts.
4. A rollback moves it back to a revision that is whole there, and holds it: until a revision comes that is newer than
   all that there were at the rollback, nothing moves it but another rollback.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from coordinator.errors import ConflictError

#: Places where a pointer was before that are remembered.
MAX_BEFORE: Final = 16


@dataclass(frozen=True, slots=True)
class SystemPointer:
    """The pointer of an environment for one system."""

    system: str
    #: 0: no revision has been whole there yet.
    revision: int = 0
    moved_at: float = 0.0
    #: Revisions up to this one do not move it: they were there when it was rolled back. 0: it was not.
    held_through: int = 0
    #: Revisions where it was before, the last one first, all lower than `revision`.
    before: tuple[int, ...] = ()


def advanced(pointer: SystemPointer, whole: Collection[int], now: float) -> SystemPointer:
    """Return the pointer where it belongs, while these revisions are whole on its system."""
    highest = max(whole, default=0)
    if highest <= max(pointer.revision, pointer.held_through):
        return pointer
    before = (pointer.revision, *pointer.before)[:MAX_BEFORE] if pointer.revision else ()
    return replace(pointer, revision=highest, moved_at=now, held_through=0, before=before)


def rolled_back(pointer: SystemPointer, target: int, whole: Collection[int], newest: int, now: float) -> SystemPointer:
    """Return the pointer at an earlier revision, or the one before where `target` is 0; it is held there.

    Raises:
        ConflictError: There is no such place, or the revision is not whole on its system.
    """
    if not pointer.revision:
        raise ConflictError(f"no revision has been whole on {pointer.system} yet, so there is nothing to roll back.")
    wanted = target or next(iter(pointer.before), 0)
    if not wanted:
        raise ConflictError(
            f"stable was at no revision before {pointer.revision} on {pointer.system}; name one with --to."
        )
    if wanted >= pointer.revision:
        raise ConflictError(
            f"stable is at revision {pointer.revision} on {pointer.system}; a rollback leads to a lower one, "
            f"and {wanted} is none."
        )
    if wanted not in whole:
        raise ConflictError(
            f"revision {wanted} cannot be fetched whole on {pointer.system}, so stable stays at {pointer.revision}; "
            "name another one with --to."
        )
    before = tuple(number for number in pointer.before if number < wanted)
    return replace(pointer, revision=wanted, moved_at=now, held_through=newest, before=before)
