"""Python's cycle collector is kept out while very much is made, and not for ever."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from infra import collector
from infra.collector import KEPT_OBJECTS, collector_paused, long_collections_kept_rare


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.enable()


def test_pauses_that_overlap_end_with_the_last() -> None:
    first, second = collector_paused(), collector_paused()
    with first:
        second.__enter__()
        assert not gc.isenabled()
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_pause_of_a_collector_that_is_off_leaves_it_off() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize(("count", "kept"), [(KEPT_OBJECTS + 100, True), (100, False)])
def test_what_a_pause_made_very_much_of_is_not_looked_at_afterwards(count: int, kept: bool) -> None:
    before = gc.get_freeze_count()
    with collector_paused():
        made: list[list[int]] = [[] for _ in range(count)]
    assert (gc.get_freeze_count() >= before + len(made)) is kept


def test_pauses_without_a_gap_let_the_collector_work_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "MAX_PAUSE_S", -1.0)
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert gc.isenabled()
    assert gc.isenabled()


def test_pauses_without_a_gap_never_have_all_that_was_made_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was made before, nor what is made from then on: that holds the loop for half a second."""
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    monkeypatch.setattr(collector, "MAX_PAUSE_S", -1.0)
    gc.callbacks.append(note)
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()
    try:
        with collector_paused():
            made: list[list[int]] = [[] for _ in range(KEPT_OBJECTS)]
            with collector_paused():
                assert gc.get_freeze_count() >= before + len(made)
                made += [[] for _ in range(10 * KEPT_OBJECTS)]
        assert set(collected) == {0, 1}
        assert gc.get_freeze_count() >= before + len(made)
        assert gc.get_threshold() == thresholds
    finally:
        gc.callbacks.remove(note)


@pytest.mark.parametrize(("long_s", "kept"), [(0.0, True), (1e9, False)])
def test_what_a_long_collection_leaves_is_kept_from_the_next(
    monkeypatch: pytest.MonkeyPatch, long_s: float, kept: bool
) -> None:
    monkeypatch.setattr(collector, "LONG_COLLECTION_S", long_s)
    with long_collections_kept_rare():
        made: list[list[int]] = [[] for _ in range(KEPT_OBJECTS)]
        before = gc.get_freeze_count()
        gc.collect(1)
        assert gc.get_freeze_count() == before
        gc.collect()
        assert (gc.get_freeze_count() >= before + len(made)) is kept
    before = gc.get_freeze_count()
    gc.collect()
    assert gc.get_freeze_count() == before
