"""Threads give way sooner for as long as a block runs, and no longer."""

from __future__ import annotations

import sys

import pytest

from infra.thread_switches import SWITCH_S, switching_often


def test_threads_give_way_soon_for_as_long_as_the_block_runs() -> None:
    before_s = sys.getswitchinterval()
    with switching_often():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert before_s > 2 * SWITCH_S
    with pytest.raises(KeyError), switching_often():
        raise KeyError
    assert sys.getswitchinterval() == before_s


def test_blocks_that_end_in_the_order_they_began_leave_nothing_behind() -> None:
    before_s = sys.getswitchinterval()
    first, second = switching_often(), switching_often()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before_s
