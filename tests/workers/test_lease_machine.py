"""The worker's decisions: a table of verdicts, and a machine that no order of events can confuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infra.daemon import BuildStatus
from scheduler.model import FailureKind
from workers.agent.lease_actions import Build, Fetch, HandBack, LeaseKey
from workers.agent.lease_machine import (
    HAND_BACK_S,
    HINTS,
    MAX_BACKLOG_PER_SLOT,
    MAX_UPLOADS_PER_SLOT,
    STATUS_POLICY,
    TROUBLE_POLICY,
    LeaseState,
    Trouble,
    WorkerMachine,
    judge_status,
    judge_trouble,
)
from workers.wire.reasons import Reason

A, B, C = ("a", 1), ("b", 1), ("c", 1)


@pytest.mark.parametrize("status", list(BuildStatus))
def test_success_is_exactly_what_the_daemon_calls_success(status: BuildStatus) -> None:
    assert (judge_status(status, "") is None) == status.is_success


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (BuildStatus.PERMANENT_FAILURE, "permanent"),
        (BuildStatus.OUTPUT_REJECTED, "output_rejected"),
        (BuildStatus.TIMED_OUT, "timeout"),
        (BuildStatus.LOG_LIMIT_EXCEEDED, "log_limit"),
        (BuildStatus.NOT_DETERMINISTIC, "not_deterministic"),
        (BuildStatus.HASH_MISMATCH, "hash_mismatch"),
        (BuildStatus.INPUT_REJECTED, "infrastructure"),
        (BuildStatus.TRANSIENT_FAILURE, "transient"),
        (BuildStatus.MISC_FAILURE, "infrastructure"),
    ],
)
def test_a_status_has_one_reason(status: BuildStatus, reason: str) -> None:
    ending = judge_status(status, "said the daemon")
    assert ending is not None
    assert ending.reason == reason
    assert ending.message.endswith("said the daemon")


def test_every_status_and_every_trouble_stands_in_the_table() -> None:
    assert set(STATUS_POLICY) == set(BuildStatus)
    assert set(TROUBLE_POLICY) == set(Trouble)


@given(st.integers(min_value=16))
def test_a_status_of_a_newer_nix_is_never_a_success(status: int) -> None:
    ending = judge_status(status, "")
    assert ending is not None
    assert ending.reason == "infrastructure"


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (BuildStatus.PERMANENT_FAILURE, "builder for 'x' failed due to signal 9 (Killed)", "killed"),
        (BuildStatus.PERMANENT_FAILURE, "builder for 'x' failed due to signal 11", "permanent"),
        (BuildStatus.TRANSIENT_FAILURE, "> error: unable to download 'x': HTTP error 404 ('')", "source_gone"),
        (BuildStatus.TRANSIENT_FAILURE, "> curl: (22) The requested URL returned error: 404", "source_gone"),
        (BuildStatus.TRANSIENT_FAILURE, "> curl: (22) The requested URL returned error: 503", "transient"),
        (BuildStatus.OUTPUT_REJECTED, "hash mismatch in fixed-output derivation 'x'", "hash_mismatch"),
        (
            BuildStatus.TRANSIENT_FAILURE,
            "perhaps for lack of free disk space",
            "disk_low",
        ),
        (BuildStatus.TIMED_OUT, "building of 'x' timed out after 9 seconds of silence", "silence"),
        (BuildStatus.TIMED_OUT, "building of 'x' timed out after 9 seconds", "timeout"),
        (BuildStatus.MISC_FAILURE, "'x' does not exist, and substitution is disabled", "input_missing"),
        (BuildStatus.MISC_FAILURE, "error: writing to file: No space left on device", "disk_low"),
        (BuildStatus.PERMANENT_FAILURE, "last log line: No space left on device", "permanent"),
    ],
)
def test_the_daemons_words_tell_apart_what_one_status_stands_for(
    status: BuildStatus, message: str, reason: str
) -> None:
    ending = judge_status(status, message)
    assert ending is not None
    assert ending.reason == reason


def test_every_reason_on_the_wire_is_a_kind_of_the_core_and_every_row_a_reason_on_the_wire() -> None:
    reasons = set(get_args(Reason))
    assert reasons <= {kind.value for kind in FailureKind}
    told = {verdict.reason for verdict in STATUS_POLICY.values() if verdict.reason}
    hinted = {verdict.reason for hints in HINTS.values() for _, verdict in hints}
    assert told | hinted | set(TROUBLE_POLICY.values()) == reasons


def test_trouble_is_reported_with_its_detail() -> None:
    assert judge_trouble(Trouble.INPUT_MISSING, "x").message == "an input could not be fetched: x"


@pytest.mark.parametrize("status", [BuildStatus.PERMANENT_FAILURE, BuildStatus.OUTPUT_REJECTED])
def test_what_fails_while_the_disk_is_full_is_not_to_blame(status: BuildStatus) -> None:
    ending = judge_status(status, "", disk_was_full=True)
    assert ending is not None
    assert ending.reason == "disk_low"
    assert judge_status(BuildStatus.BUILT, "", disk_was_full=True) is None
    timeout = judge_status(BuildStatus.TIMED_OUT, "", disk_was_full=True)
    assert timeout is not None
    assert timeout.reason == "timeout"


def test_trouble_for_want_of_room_is_the_disks_but_an_upload_meets_another_disk() -> None:
    words = "[Errno 28] No space left on device"
    assert judge_trouble(Trouble.DAEMON_LOST, words).reason == "disk_low"
    assert judge_trouble(Trouble.UPLOAD_FAILED, words).reason == "upload_failed"


def ready(machine: WorkerMachine, *keys: LeaseKey, now: float = 0.0) -> None:
    for key in keys:
        machine.accept(key, now)
    machine.next_actions(now)
    for key in keys:
        machine.fetched(key)


def test_builds_run_side_by_side_as_far_as_the_memory_goes() -> None:
    machine = WorkerMachine(3, memory_bytes=100)
    for key, memory_bytes in ((A, 60), (B, 60), (C, 10)):
        machine.accept(key, 0.0, memory_bytes)
    small = ("small", 1)
    machine.accept(small, 0.0)
    machine.next_actions(0.0)
    for key in (A, B, C, small):
        machine.fetched(key)
    # C would fit, but what waits for memory is not passed; what says nothing of memory is no part of this.
    assert machine.next_actions(0.1) == [Build(A, 0), Build(small, 1)]
    machine.built(A, 0.2)
    assert machine.next_actions(0.2) == [Build(B, 0), Build(C, 2)]


def test_a_build_that_takes_more_than_there_is_runs_when_no_other_does_and_one_that_waits_goes_elsewhere() -> None:
    machine = WorkerMachine(2, memory_bytes=100)
    machine.accept(A, 0.0, 500)
    machine.accept(B, 0.0, 1)
    machine.next_actions(0.0)
    machine.fetched(A)
    machine.fetched(B)
    assert machine.next_actions(0.0) == [Build(A, 0)]
    assert machine.next_actions(HAND_BACK_S) == [HandBack(B)]


def test_builds_that_use_the_network_are_bounded_and_others_pass_those_that_wait() -> None:
    machine = WorkerMachine(4, most_fetches=2)
    fetches, plain = [(f"fetch-{number}", 1) for number in range(4)], ("plain", 1)
    for key in (*fetches, plain):
        machine.accept(key, 0.0)
    machine.next_actions(0.0)
    for key in fetches:
        machine.fetched(key, fetches=True)
    machine.fetched(plain)
    assert machine.next_actions(0.0) == [Build(fetches[0], 0), Build(fetches[1], 1), Build(plain, 2)]
    # They wait here, whatever the time, and others come in their place.
    assert machine.next_actions(2 * HAND_BACK_S) == []
    assert machine.capacity() == 4 + 2
    machine.built(fetches[1], 60.0)
    assert machine.next_actions(60.0) == [Build(fetches[2], 1)]
    # One uploads, and one waits.
    assert machine.capacity() == 4 + 1 + 1
    machine.draining = True
    assert machine.next_actions(61.0) == [HandBack(fetches[3])]


def test_slots_are_given_in_order_of_arrival_to_leases_whose_inputs_are_there() -> None:
    machine = WorkerMachine(1)
    for key in (A, B, C):
        assert machine.accept(key, 0.0)
    assert machine.next_actions(0.0) == [Fetch(A), Fetch(B), Fetch(C)]
    machine.fetched(C)
    assert machine.next_actions(0.1) == [Build(C, 0)]
    machine.fetched(B)
    machine.fetched(A)
    assert machine.next_actions(0.2) == []
    machine.built(C, 0.3)
    assert machine.next_actions(0.3) == [Build(A, 0)]


def test_a_lease_behind_busy_slots_goes_back_once_and_one_with_a_slot_to_come_does_not() -> None:
    machine = WorkerMachine(2)
    ready(machine, A)
    machine.next_actions(0.0)
    machine.accept(B, 0.0)
    machine.accept(C, 0.0)
    machine.next_actions(0.0)
    assert machine.deadline(0.0) == HAND_BACK_S
    assert machine.next_actions(HAND_BACK_S - 0.01) == []
    assert machine.next_actions(HAND_BACK_S) == [HandBack(C)]
    assert machine.next_actions(HAND_BACK_S) == []
    assert machine.deadline(HAND_BACK_S) is None


def test_a_slot_is_free_while_its_last_build_uploads_but_not_without_bound() -> None:
    machine = WorkerMachine(1)
    keys = [(str(number), 1) for number in range(MAX_UPLOADS_PER_SLOT + 1)]
    ready(machine, *keys)
    for key in keys[:-1]:
        assert machine.next_actions(0.0) == [Build(key, 0)]
        machine.built(key, 60.0)
    assert machine.capacity() == 1 + MAX_UPLOADS_PER_SLOT
    assert machine.next_actions(0.0) == []
    machine.report(keys[0], 61.0)
    assert machine.next_actions(0.0) == [Build(keys[-1], 0)]


@pytest.mark.parametrize(
    ("durations", "backlog"),
    [([], 0), ([60.0], 0), ([0.26], 0), ([0.1], 2), ([0.02], MAX_BACKLOG_PER_SLOT), ([0.0], MAX_BACKLOG_PER_SLOT)],
)
def test_the_backlog_is_a_quarter_second_of_recent_builds(durations: list[float], backlog: int) -> None:
    machine = WorkerMachine(2)
    now = 0.0
    for number, took_s in enumerate(durations):
        key = (str(number), 1)
        ready(machine, key, now=now)
        machine.next_actions(now)
        now += took_s
        machine.built(key, now)
        machine.report(key, now)
        machine.acknowledged(key)
    assert machine.backlog == 2 * backlog
    assert machine.capacity() == 2 + 2 * backlog


def test_a_long_build_ends_the_backlog_of_short_ones_soon() -> None:
    machine = WorkerMachine(1)
    now = 0.0
    for number, took_s in enumerate([0.01] * 50 + [10.0]):
        key = (str(number), 1)
        ready(machine, key, now=now)
        machine.next_actions(now)
        now += took_s
        machine.built(key, now)
        machine.report(key, now)
        machine.acknowledged(key)
    assert machine.backlog == 0


def test_a_lease_that_follows_another_takes_its_slot_and_is_not_late_meanwhile() -> None:
    machine = WorkerMachine(1)
    ready(machine, A)
    assert machine.next_actions(0.0) == [Build(A, 0)]
    assert machine.accept(B, 0.0, after=(A,))
    assert machine.accept(C, 0.0, after=(B,))
    # What else they need is fetched; they wait for no slot, however long that takes.
    assert machine.next_actions(1.0) == [Fetch(B), Fetch(C)]
    assert machine.next_actions(1.0 + 2 * HAND_BACK_S) == []
    assert machine.deadline(1.0) is None
    assert machine.capacity() == 1
    assert machine.following.waiting_for(A) == [B]
    assert machine.built(A, 10.0) == [B]
    machine.fetched(B)
    assert machine.next_actions(10.0) == [Build(B, 0)]
    # The coordinator takes B for one that waits until it has the report of A.
    assert machine.capacity() == 1
    machine.report(A, 11.0)
    assert machine.capacity() == 1
    assert machine.capacity({A}) == 1
    # B is built while A is still on its way: both have left the slot, and C takes it.
    assert machine.built(B, 12.0) == [C]
    assert machine.capacity() == 1
    machine.report(B, 12.0)
    assert machine.capacity({A, B}) == 1


def test_a_lease_whose_need_failed_follows_nothing_and_one_that_is_drained_goes_back() -> None:
    machine = WorkerMachine(2)
    ready(machine, A, C)
    machine.next_actions(0.0)
    machine.accept(B, 0.0, after=(A, C))
    assert machine.next_actions(0.0) == [Fetch(B)]
    machine.built(C, 1.0)
    machine.report(C, 1.0, "upload_failed")
    # It was built here, whatever becomes of its outputs.
    assert machine.may_be_followed(C)
    assert machine.following.waits(B)
    machine.report(A, 2.0, "permanent")
    assert not machine.may_be_followed(A)
    assert machine.following.waiting_for(A) == [B]
    machine.draining = True
    assert machine.next_actions(2.0) == [HandBack(B)]
    machine.report(B, 2.0, "returned")
    assert not machine.following.waits(B)


def test_a_report_in_the_answer_no_longer_counts_for_the_capacity() -> None:
    machine = WorkerMachine(1)
    ready(machine, A)
    machine.next_actions(0.0)
    machine.report(A, 60.0)
    assert machine.capacity() == 2
    assert machine.capacity({A}) == 1


@pytest.mark.parametrize("step", ["fetched", "built", "acknowledged"])
def test_steps_out_of_order_are_refused(step: str) -> None:
    machine = WorkerMachine(1)
    machine.accept(A, 0.0)
    call = getattr(machine, step)
    with pytest.raises(ValueError, match="lease"):
        call(A, 0.0) if step == "built" else call(A)


@dataclass
class _Seen:
    built_in: int | None = None
    asked_back: int = 0
    reported: bool = False
    fetches: int = 0
    since: float = field(default=0.0)


class AnyOrder(RuleBasedStateMachine):
    """Leases come, end and are acknowledged in any order that a shell can produce."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = WorkerMachine(2)
        self.seen: dict[LeaseKey, _Seen] = {}
        self.now = 0.0
        self.number = 0

    def in_state(self, *states: LeaseState) -> list[LeaseKey]:
        return [key for key, state in self.machine.held() if state in states]

    def act(self) -> None:
        for action in self.machine.next_actions(self.now):
            seen = self.seen[action.key]
            match action:
                case Fetch():
                    seen.fetches += 1
                case Build(slot=slot):
                    seen.built_in = slot
                case HandBack():
                    seen.asked_back += 1
                    assert seen.built_in is None

    @rule(passed=st.sampled_from([0.0, 0.01, 0.5, 3.0]))
    def time_passes(self, passed: float) -> None:
        self.now += passed
        self.act()

    @rule(count=st.integers(1, 4))
    def leases_come(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            key = (f"step{self.number}", 1)
            assert self.machine.accept(key, self.now)
            assert not self.machine.accept(key, self.now)
            self.seen[key] = _Seen(since=self.now)
        self.act()

    @precondition(lambda self: self.in_state(LeaseState.FETCHING))
    @rule(data=st.data())
    def inputs_arrive(self, data: st.DataObject) -> None:
        self.machine.fetched(data.draw(st.sampled_from(self.in_state(LeaseState.FETCHING))))
        self.act()

    @precondition(lambda self: self.in_state(LeaseState.BUILDING))
    @rule(data=st.data())
    def a_build_ends(self, data: st.DataObject) -> None:
        self.machine.built(data.draw(st.sampled_from(self.in_state(LeaseState.BUILDING))), self.now)
        self.act()

    @precondition(lambda self: any(True for _ in self.machine.held()))
    @rule(data=st.data())
    def a_lease_ends(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key, _ in self.machine.held()]))
        assert self.machine.report(key, self.now) != self.seen[key].reported
        self.seen[key].reported = True
        self.act()

    @precondition(lambda self: self.in_state(LeaseState.REPORTING))
    @rule(data=st.data())
    def a_report_is_acknowledged(self, data: st.DataObject) -> None:
        self.machine.acknowledged(data.draw(st.sampled_from(self.in_state(LeaseState.REPORTING))))
        self.act()

    @rule(on=st.booleans())
    def draining_changes(self, on: bool) -> None:
        self.machine.draining = on
        self.act()

    @invariant()
    def each_slot_is_used_once(self) -> None:
        slots = [self.seen[key].built_in for key in self.in_state(LeaseState.BUILDING)]
        assert sorted([slot for slot in (*slots, *self.machine.free_slots) if slot is not None]) == [0, 1]

    @invariant()
    def no_ready_lease_waits_for_a_free_slot(self) -> None:
        uploads = len(self.in_state(LeaseState.UPLOADING))
        if self.machine.free_slots and uploads < self.machine.max_uploads and not self.machine.draining:
            assert not [key for key in self.in_state(LeaseState.READY) if not self.seen[key].asked_back]

    @invariant()
    def nothing_is_asked_for_twice(self) -> None:
        assert all(seen.asked_back <= 1 and seen.fetches <= 1 for seen in self.seen.values())

    @invariant()
    def the_deadline_lies_ahead(self) -> None:
        deadline = self.machine.deadline(self.now)
        assert deadline is None or deadline > self.now

    @invariant()
    def capacity_covers_what_ends(self) -> None:
        ending = len(self.in_state(LeaseState.UPLOADING, LeaseState.REPORTING))
        assert self.machine.draining or self.machine.capacity() >= 2 + ending


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
