"""The history of an environment, pure: which content is a new revision, and what is forgotten of the old ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from coordinator.environments.model import MAX_NOTE, EnvironmentRevision
from coordinator.environments.pointers import SystemPointer
from coordinator.wishes.model import WishList

#: Digits of a commit that people read.
_SHORT: Final = 12


def next_revision(
    history: Sequence[EnvironmentRevision], content: WishList, mark: str, now: float, note: str = ""
) -> EnvironmentRevision | None:
    """Return the revision that a content is; None where it is the newest one's.

    `history` has the newest first. A content that an older revision had is a new one, and says so.
    """
    if history and history[0].digest == content.digest:
        return None
    number = history[0].number + 1 if history else 1
    packages = Counter(wish.system for wish in content.wishes)
    said = " ".join(filter(None, (note, _return(history, content.digest, mark))))
    return EnvironmentRevision(number, now, content.digest, mark, tuple(sorted(packages.items())), said[:MAX_NOTE])


def _return(history: Sequence[EnvironmentRevision], digest: str, mark: str) -> str:
    """Return a sentence where the source went back to what it was, "" otherwise."""
    same = next((each for each in history if mark and each.mark == mark), None)
    if same is not None:
        return f"The source moved back to {mark[:_SHORT]}, which was revision {same.number}."
    same = next((each for each in history if each.digest == digest), None)
    return "" if same is None else f"Its packages are those of revision {same.number} again."


def rooted(numbers: Iterable[int], pointers: Iterable[SystemPointer], newest: int) -> set[int]:
    """Return the revisions whose paths are kept: the newest ones, where pointers are, and where each was before."""
    known = sorted(numbers, reverse=True)
    wanted = set(known[: max(1, newest)])
    for pointer in pointers:
        wanted |= {pointer.revision, *pointer.before[:1]}
    return wanted & set(known)


def forgotten(numbers: Collection[int], kept: Collection[int], most: int) -> set[int]:
    """Return the revisions beyond the newest `most` that are not kept otherwise."""
    return set(sorted(numbers, reverse=True)[max(1, most) :]) - set(kept)
