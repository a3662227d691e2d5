"""Leases that follow others on a real worker: they begin in its own store, before anything is in the cache."""

from __future__ import annotations

from workers.wire.messages import Failed, Lease, LeaseOrder, Stage, Succeeded

from .conftest import AgentHarness, ReportReader, drv, order

SLOW = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; "


def behind(ahead: LeaseOrder, out: str, name: str, script: str = "read x < {}; echo $x > $out") -> LeaseOrder:
    """An order that follows another one, whose output it reads."""
    lease = Lease(step=ahead.step, attempt=ahead.attempt)
    return order(drv(name, script.format(out)), [out]).model_copy(update={"after": (lease,)})


async def test_a_chain_is_built_though_nothing_of_it_is_in_the_cache(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    made = drv("first", SLOW + "echo first > $out")
    first = order(made)
    second = behind(first, made[1].outputs[0].path, "second")
    third = behind(
        second, drv("second", f"read x < {made[1].outputs[0].path}; echo $x > $out")[1].outputs[0].path, "third"
    )
    reports = await reader.build(first, second, third)
    assert all(isinstance(report.result, Succeeded) for report in reports)
    begun = [report.building_at for report in reports]
    assert begun == sorted(begun)
    # The second began as soon as the first was built, before that was packed; and it asked the cache for nothing.
    assert reports[0].built_at <= reports[1].building_at < reports[0].ended_at
    assert bench.cache.questions == []
    assert not [change for change in reader.stages if change.stage is Stage.FETCHING]
    # What has ended and was acknowledged can be followed as well.
    late = behind(first, made[1].outputs[0].path, "late")
    [report] = await reader.build(late)
    assert isinstance(report.result, Succeeded)


async def test_what_follows_a_failure_is_handed_back_after_it(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    made = drv("broken", SLOW + "exit 3")
    broken = order(made)
    second = behind(broken, made[1].outputs[0].path, "never")
    [failed, returned] = await reader.build(broken, second)
    assert isinstance(failed.result, Failed)
    assert isinstance(returned.result, Failed)
    assert (failed.result.reason, returned.result.reason) == ("permanent", "returned")
    assert list(reader.reports) == [broken.step, second.step]
    assert returned.building_at == 0


async def test_what_follows_a_lease_that_is_not_known_here_is_handed_back(bench: AgentHarness) -> None:
    reader = await bench.agent()
    made = drv("elsewhere", "echo > $out")
    [returned] = await reader.build(behind(order(made), made[1].outputs[0].path, "lost"))
    assert isinstance(returned.result, Failed)
    assert returned.result.reason == "returned"
    assert ReportReader(reader.agent).reports == {}


def test_an_order_that_follows_nothing_says_nothing_of_it_to_an_older_agent() -> None:
    one = order(drv("one", ": > $out"))
    assert "after" not in one.dump()
    ahead = Lease(step="a", attempt=2)
    assert LeaseOrder.model_validate(one.model_copy(update={"after": (ahead,)}).dump()).after == (ahead,)
