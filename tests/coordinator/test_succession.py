"""Early leases on a real worker: a chain goes on in its store, and is published in order all the same."""

from __future__ import annotations

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.journal.journal import Journal
from infra.database import open_engine
from scheduler import facts as f
from tests.coordinator.conftest import OpenedFarm, OpenFarm

LINKS = 6
CHAIN = """
rec {{
  l0 = run "l0" "{first}";
  {links}
}}
"""


def chain(first: str) -> str:
    links = "\n".join(f'l{n} = run "l{n}" "read x < ${{l{n - 1}}}; echo {n} $x > $out";' for n in range(1, LINKS))
    return CHAIN.format(first=first, links=links)


async def told(farm: OpenedFarm) -> list[f.Fact]:
    engine = open_engine(f"sqlite+aiosqlite:///{farm.settings.state_dir / 'journal.sqlite3'}")
    try:
        return [fact async for piece in Journal(engine).load() for fact in piece.facts]
    finally:
        await engine.dispose()


def name_of(fact: f.StepLeased | f.StepDone | f.LeaseRevoked) -> str:
    return fact.lease.step[33:]


async def test_a_chain_goes_on_before_it_is_published_and_is_published_in_order(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(chain("echo 0 > $out"), f"l{LINKS - 1}")).id)
        assert view.state == SubmissionState.SUCCEEDED
        facts = await told(farm)
    leased = [name_of(fact) for fact in facts if isinstance(fact, f.StepLeased)]
    done = [name_of(fact) for fact in facts if isinstance(fact, f.StepDone)]
    assert leased == done == [f"l{n}" for n in range(LINKS)]
    told_of = [(type(fact), name_of(fact)) for fact in facts if isinstance(fact, f.StepLeased | f.StepDone)]
    at = {each: place for place, each in enumerate(told_of)}
    assert all(at[f.StepLeased, f"l{n}"] < at[f.StepDone, f"l{n - 1}"] for n in range(1, LINKS))
    assert not [fact for fact in facts if isinstance(fact, f.LeaseRevoked)]


async def test_what_follows_a_failure_is_handed_back_and_the_failure_is_told_once(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(chain("exit 3"), f"l{LINKS - 1}")).id)
        assert view.state == SubmissionState.FAILED
        states = farm.states(view.id)
        facts = await told(farm)
    assert states == {"l0": StepStatus.FAILED} | {f"l{n}": StepStatus.DOOMED for n in range(1, LINKS)}
    assert [name_of(fact) for fact in facts if isinstance(fact, f.StepLeased)] == ["l0", "l1"]
    assert [fact.step[33:] for fact in facts if isinstance(fact, f.StepFailed)] == ["l0"]
    assert [(name_of(fact), fact.failure.kind) for fact in facts if isinstance(fact, f.LeaseRevoked)] == [
        ("l1", "cancelled")
    ]
