"""Slots that a worker offers under pressure: the policy over fed readings, the machine that keeps to it, real PSI."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.conftest import AgentHarness
from workers.agent.admission import LOWER_EVERY_S, RAISE_AFTER_S, Machine, SlotOffer, next_offer
from workers.agent.agent import Agent
from workers.agent.lease_actions import Build
from workers.agent.lease_machine import WorkerMachine
from workers.agent.settings import WorkerSettings, inspect_host
from workers.agent.vitals import read_vitals
from workers.wire.messages import Batch, Hello, Vitals

GIB = 1 << 30
BOX = Machine(slots=4, processors=8, memory_bytes=32 * GIB, build_cores=2)
CALM = Vitals(load=0.2, cpu_pressure=0.0, memory_pressure=0.0, memory_available_bytes=16 * GIB)


def played(vitals: Vitals, seconds: int, *, start: SlotOffer | None = None, running: int = 4, at: int = 0) -> SlotOffer:
    """Look once a second; as many builds run as there were, or as are offered since."""
    offer = start or SlotOffer(BOX.slots)
    for now in range(at, at + seconds):
        offer = next_offer(offer, BOX, vitals, min(running, max(offer.slots, 1)), float(now))
    return offer


@pytest.mark.parametrize(
    ("vitals", "because"),
    [
        (CALM.model_copy(update={"memory_pressure": 0.4}), "tasks wait for memory 40% of the time"),
        (CALM.model_copy(update={"memory_available_bytes": GIB}), "1024 MiB of memory are left of 32768"),
        (CALM.model_copy(update={"load": 3.0, "cpu_pressure": 0.95}), "others than its builds load each processor"),
        # A Mac measures its load alone.
        (Vitals(load=3.0), "others than its builds load each processor with 2."),
    ],
)
def test_what_a_machine_is_short_of_lowers_its_offer_by_and_by_and_never_to_nothing(
    vitals: Vitals, because: str
) -> None:
    assert played(vitals, 1).slots == 3
    assert played(vitals, int(LOWER_EVERY_S)).slots == 3
    offer = played(vitals, 100)
    assert offer.slots == 1
    assert because in offer.because


def test_its_own_builds_are_no_reason_however_busy_they_keep_the_machine() -> None:
    assert played(Vitals(load=1.3, cpu_pressure=0.99), 60) == SlotOffer(4)
    assert played(Vitals(), 60) == SlotOffer(4)


def test_an_offer_rises_step_by_step_once_the_machine_has_been_calm_and_does_not_flap() -> None:
    low = played(Vitals(load=3.0), 100)
    between = CALM.model_copy(update={"load": 0.9, "cpu_pressure": 0.7})
    # Less than what lowered it, and more than what lets it rise.
    assert played(between, 300, start=low, running=0, at=100).slots == 1
    assert played(CALM, int(RAISE_AFTER_S) - 1, start=low, at=100).slots == 1
    assert played(CALM, int(RAISE_AFTER_S) + 1, start=low, at=100).slots == 2
    assert played(CALM, 4 * int(RAISE_AFTER_S), start=low, at=100) == SlotOffer(4)


PARTS = st.none() | st.floats(0, 1)


@given(
    st.lists(
        st.tuples(
            st.builds(
                Vitals,
                load=st.none() | st.floats(0, 50),
                cpu_pressure=PARTS,
                memory_pressure=PARTS,
                memory_available_bytes=st.none() | st.integers(0, 64 * GIB),
            ),
            st.integers(0, 8),
            st.floats(0, 100),
        )
    )
)
def test_no_readings_lead_to_more_than_the_slots_or_to_none(looks: list[tuple[Vitals, int, float]]) -> None:
    offer, now = SlotOffer(BOX.slots), 0.0
    for vitals, running, later in looks:
        now += later
        before, offer = offer, next_offer(offer, BOX, vitals, running, now)
        assert 1 <= offer.slots <= BOX.slots
        assert offer.slots <= before.slots + 1
        assert bool(offer.because) == (offer.slots < BOX.slots)


def test_a_worker_that_offers_less_begins_no_more_and_what_runs_goes_on() -> None:
    machine = WorkerMachine(3)
    keys = [(f"step{number}", 1) for number in range(3)]
    for key in keys:
        machine.accept(key, 0.0)
    machine.next_actions(0.0)
    for key in keys[:2]:
        machine.fetched(key)
    assert [type(action) for action in machine.next_actions(0.0)] == [Build, Build]
    machine.offered = 1
    assert machine.capacity() == 1
    machine.fetched(keys[2])
    assert machine.next_actions(0.0) == []
    machine.built(keys[0], 1.0)
    # One still runs, which is all that is offered.
    assert machine.next_actions(1.0) == []
    machine.offered = 2
    assert machine.next_actions(1.0) == [Build(keys[2], 0)]


def test_the_pressure_of_this_machine_is_read_and_judged() -> None:
    vitals = read_vitals([])
    assert vitals.cpu_pressure is not None
    assert vitals.memory_pressure is not None
    machine = Machine(slots=2, processors=os.cpu_count() or 1, memory_bytes=64 * GIB)
    assert 1 <= next_offer(SlotOffer(2), machine, vitals, 2, 0.0).slots <= 2


async def test_an_agent_whose_machine_is_short_of_memory_says_so_and_wants_fewer_leases(
    bench: AgentHarness,
) -> None:
    settings = WorkerSettings(
        name="tight", state_dir=bench.root / "state", store=str(bench.root / "store"), slots=2, trial_every_s=0
    )
    # Of so much memory no machine has a twentieth left.
    async with Agent(settings, host=replace(inspect_host(settings.nix_daemon), memory_bytes=1 << 50)) as agent:
        hello = Hello.model_validate(await agent.hello(bench.farm.dump()))
        assert (hello.slots, hello.capacity) == (2, 1)
        batch = Batch.model_validate(await agent.events(0, 1 << 20, 0.0))
        assert (batch.offered, batch.capacity) == (1, 1)
        assert "MiB of memory are left of 1073741824" in batch.offers_less
