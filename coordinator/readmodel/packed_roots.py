"""Roots of a submission, stored compactly: one submission may have 100,000 of them, each with its paths.

What is kept of a root is its step and the hash of its .drv; the paths follow from these, as in `step_details`. A root
of which they do not is kept as it is, and one that its client called otherwise with its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, overload

from coordinator.journal.codec import RootNote, SubmissionNote
from scheduler.model import StepKey

#: Fewer roots are kept as they are.
PACKED_FROM: Final = 64
#: Characters of a hash in a store path.
_HASH: Final = 32


class PackedRoots(Sequence[RootNote]):
    """Roots, each made when it is looked at."""

    __slots__ = ("_attrs", "_hashes", "_others", "_steps", "_store")

    def __init__(self, roots: Sequence[RootNote]) -> None:
        self._store = roots[0].drv.rpartition("/")[0] if roots else ""
        self._steps: tuple[StepKey, ...] = tuple([root.step for root in roots])
        #: By place: what clients called roots otherwise than by their names, and roots that are not like the others.
        self._attrs: dict[int, str] = {}
        self._others: dict[int, RootNote] = {}
        start = len(self._store) + 1
        hashes: list[str] = []
        for place, root in enumerate(roots):
            digest = root.drv[start : start + _HASH]
            if replace(root, attr="") != self._made(root.step, digest, ""):
                self._others[place] = root
                digest = " " * _HASH
            elif root.attr != root.step[_HASH + 1 :]:
                self._attrs[place] = root.attr
            hashes.append(digest)
        self._hashes = "".join(hashes)

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, place: int) -> RootNote: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RootNote]: ...
    def __getitem__(self, place: int | slice) -> RootNote | Sequence[RootNote]:
        if isinstance(place, slice):
            return tuple(map(self._at, range(len(self))[place]))
        return self._at(range(len(self))[place])

    def __iter__(self) -> Iterator[RootNote]:
        return map(self._at, range(len(self)))

    def _at(self, place: int) -> RootNote:
        other = self._others.get(place)
        if other is not None:
            return other
        step = self._steps[place]
        digest = self._hashes[place * _HASH : (place + 1) * _HASH]
        return self._made(step, digest, self._attrs.get(place, step[_HASH + 1 :]))

    def _made(self, step: StepKey, digest: str, attr: str) -> RootNote:
        drv = f"{self._store}/{digest}-{step[_HASH + 1 :]}.drv"
        return RootNote(attr, drv, step, (("out", f"{self._store}/{step}"),))


def with_packed_roots(note: SubmissionNote) -> SubmissionNote:
    """Return a note whose roots take little memory where they are many. For a thread."""
    return replace(note, roots=PackedRoots(note.roots)) if len(note.roots) >= PACKED_FROM else note
