"""Packed roots of a submission: those that were put in come out, and little is kept of them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from coordinator.journal.codec import RootNote, SubmissionNote
from coordinator.readmodel.packed_roots import PACKED_FROM, PackedRoots, with_packed_roots
from scheduler.model import StepKey
from scheduler.resource_limits import ResourceLimits

STORE = "/nix/store"


def root(number: int) -> RootNote:
    """Return a root whose step has one output, as most have."""
    step = StepKey(f"{number:032x}-hello-{number}")
    return RootNote(
        f"hello-{number}", f"{STORE}/{-number % 2**64:032x}-hello-{number}.drv", step, (("out", f"{STORE}/{step}"),)
    )


def odd_roots() -> list[RootNote]:
    """Return roots of which something does not follow from their steps."""
    plain = root(1)
    return [
        replace(plain, attr="pkgs.hello"),
        replace(plain, attr=""),
        replace(plain, drv=plain.drv.replace("hello-1.drv", "other.drv")),
        replace(plain, drv="/other/store/" + plain.drv.rpartition("/")[2]),
        replace(plain, drv="short"),
        replace(plain, step=StepKey("x")),
        replace(plain, outputs=(("dev", f"{STORE}/{'0' * 32}-hello-dev"), ("out", f"{STORE}/{plain.step}"))),
        replace(plain, outputs=()),
        replace(plain, limits=ResourceLimits(5)),
    ]


def test_all_roots_come_out_as_they_were_put_in_whole_and_in_parts() -> None:
    roots = [root(number) for number in range(PACKED_FROM)] + odd_roots()
    packed = PackedRoots(roots)
    assert (len(packed), list(packed)) == (len(roots), roots)
    assert [packed[place] for place in range(-1, -len(roots) - 1, -1)] == roots[::-1]
    assert tuple(packed[3:-2:5]) == tuple(roots[3:-2:5])
    with pytest.raises(IndexError):
        packed[len(roots)]
    assert list(PackedRoots([])) == []


def test_a_note_of_many_roots_takes_a_fifth_of_their_memory_and_one_of_few_is_as_it_was() -> None:
    few = SubmissionNote("few", (root(1),), 1)
    assert with_packed_roots(few) is few
    steps = [root(number).step for number in range(10_000)]
    tracemalloc.start()
    try:
        many = SubmissionNote("many", tuple(replace(root(number), step=step) for number, step in enumerate(steps)), 1)
        before = tracemalloc.get_traced_memory()[0]
        many = with_packed_roots(many)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after < before / 5
    assert many.roots[7] == root(7)
