"""Ray's looks for signals pause where no call comes through Ray, and nowhere else."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from workers.ray_transport.signal_looks import PAUSE_S, QUIET_S, SignalLooks


class Watched:
    """Looks with a clock of their own, and the pauses that they made."""

    def __init__(self) -> None:
        self.at = 100.0
        self.pauses: list[float] = []
        self.looks = SignalLooks(lambda: self.at, self.pauses.append)

    def look(self, after_s: float = 0.0) -> int:
        """Look once, some seconds later; return how many pauses there were by then."""
        self.at += after_s
        assert not self.looks.look()
        return len(self.pauses)


def test_a_look_pauses_once_no_call_came_for_a_while_and_not_while_one_is_answered() -> None:
    watched = Watched()
    assert watched.look() == 0
    assert watched.look(QUIET_S + 1) == 1
    assert watched.look() == 2
    with watched.looks.call():
        assert watched.look(QUIET_S + 1) == 2
    # Its answer may not have been sent yet.
    assert watched.look(QUIET_S) == 2
    assert watched.look(1.0) == 3
    assert set(watched.pauses) == {PAUSE_S}


def test_only_the_main_thread_pauses_and_not_at_the_end_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    other = threading.Thread(target=watched.look, args=(QUIET_S + 1,))
    other.start()
    other.join()
    assert watched.pauses == []
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    assert watched.looks.look()
    assert watched.pauses == []


def test_a_module_that_looks_in_another_way_stays_as_it_is() -> None:
    usual, other = SimpleNamespace(sys=sys), SimpleNamespace(sys="another")
    for module in (usual, other):
        Watched().looks.take_over(module)
    assert other.sys == "another"
    assert usual.sys is not sys
    assert usual.sys.version_info == sys.version_info
