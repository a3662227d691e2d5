"""When processes that verify are worth their start, and how a batch is cut into jobs for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.api.requests import IntakeQuery
from coordinator.intake import intake, verifier_waves
from coordinator.intake.intake import Intake
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.intake.verifier_waves import jobs_of, waves_of
from coordinator.stores.derivations import DerivationStore
from tests.coordinator.test_intake import STORE
from tests.support.cache import open_cache
from tests.support.graphs import Made, Maker


async def test_a_question_starts_processes_where_verifying_takes_longer_than_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = VerifierPool(STORE.path, most=2)
    names = tuple(Maker().plain(f"step-{number}").name for number in range(20))
    query = IntakeQuery(store_dir=STORE.path, derivations=names, sources=())
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
    await derivations.prepare()
    async with open_cache(tmp_path) as cache:
        room = Intake(derivations, cache, cache.objects, STORE, verifiers=pool)
        monkeypatch.setattr(intake, "PROCESSES_FROM", 21)
        await room.missing(query)
        await pool.started()
        assert pool.size == 0
        monkeypatch.setattr(intake, "PROCESSES_FROM", 20)
        await room.missing(query)
        await pool.started()
        assert pool.size == 2
    await pool.close()
    await derivations.close()


@pytest.mark.parametrize(("width", "jobs_at_once"), [(1, 1), (3, 1), (7, 1), (8, 2), (20, 2)])
def test_narrow_waves_share_a_job_and_wide_ones_all_processes(
    width: int, jobs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_waves, "JOB_FROM", 4)
    make = Maker()
    below: list[Made] = []
    graph: list[Made] = []
    for level in range(12):
        below = [make.plain(f"step-{level}-{place}", below[place:][:1]) for place in range(width)]
        graph += below
    waves = waves_of([(made.name, made.data) for made in graph])
    rounds = [jobs_of(wave, processes=2) for wave in waves]
    known: set[str] = set()
    inside = {made.name for made in graph}
    for jobs in rounds:
        for job in jobs:
            before = set(known)
            for member in job:
                assert before.issuperset(inside.intersection(member.inputs))
                before.add(member.name)
        known.update(member.name for job in jobs for member in job)
    assert known == inside
    assert {len(jobs) for jobs in rounds} == {jobs_at_once}
    # Seven is the most that is one job here.
    assert len(rounds) == (12 if width > 3 else -(-12 // (7 // width)))
