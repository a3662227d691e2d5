"""Open submissions through the API: grown, repeated, refused, sealed, kept over a restart, closed when silent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import pytest

from coordinator.api.models import StepStatus, SubmissionState, SubmissionView, UnevaluatedView
from coordinator.api.requests import ClientStage, GrowRequest, RootRequest, SealRequest, SubmitRequest, UnevaluatedAttr
from coordinator.client.errors import RefusedError
from coordinator.config import LimitSettings, Settings
from coordinator.intake import growth
from tests.coordinator.conftest import OpenedFarm, OpenFarm

GRAPH = """
rec {
  base = run "base" "echo > $out";
  a = run "a" "echo ${base} > $out";
  b = run "b" "echo ${base} ${tool} > $out";
  tool = run "tool" "echo ${deep} > $out";
  deep = run "deep" "echo > $out";
  c = run "c" "echo ${b} ${a} > $out";
}
"""


@pytest.fixture
def silence_s() -> float:
    return 900.0


@pytest.fixture
def settings(tmp_path: Path, silence_s: float) -> Settings:
    return Settings(state_dir=tmp_path / "farm", port=0, limits=LimitSettings(open_silence_s=silence_s))


async def opened(farm: OpenedFarm, label: str = "") -> str:
    view = await farm.client.submit(SubmitRequest(roots=(), open=True, label=label))
    assert (view.open, view.state, view.counts.total) == (True, SubmissionState.RUNNING, 0)
    return view.id


async def grow(farm: OpenedFarm, submission: str, *roots: RootRequest) -> SubmissionView:
    return await farm.client.grow(submission, GrowRequest(roots=roots))


async def test_it_grows_counts_each_step_once_and_ends_when_it_is_sealed(open_farm: OpenFarm) -> None:
    async with open_farm("w1") as farm:
        a, b, c = await farm.evaluate(GRAPH, "a", "b", "c")
        name = await opened(farm, "streams")
        assert (await grow(farm, name, a)).counts.total == 2
        await farm.until(lambda: set(farm.states(name).values()) == {StepStatus.DONE})
        view = await farm.client.submission(name)
        assert (view.state, view.open, view.ended_at) == (SubmissionState.RUNNING, True, 0.0)
        # `b` is planned down to what the submission has; the batch comes twice, as after a lost answer.
        assert (await grow(farm, name, b)).counts.total == 5
        again = await grow(farm, name, a, b, b)
        assert (again.counts.total, again.root_count, again.derivations) == (5, 2, 5)
        # The same derivation under another name is another root and no other step.
        twice = await grow(farm, name, c, RootRequest(attr="also-c", drv=c.drv))
        assert (twice.counts.total, twice.root_count, twice.derivations) == (6, 4, 6)
        await farm.client.seal(name, SealRequest())
        ended = await farm.ended(name)
        assert (ended.state, ended.open, ended.incomplete) == (SubmissionState.SUCCEEDED, False, "")
        assert (ended.counts.total, ended.counts.done, ended.counts.held) == (6, 6, 0)
        assert [root.attr for root in ended.roots] == ["a", "b", "c", "also-c"]


async def test_what_comes_too_late_is_refused_and_a_repeat_is_not(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        a, b = await farm.evaluate(GRAPH, "a", "b")
        name = await opened(farm)
        await grow(farm, name, a)
        await farm.client.seal(name, SealRequest())
        assert (await farm.client.seal(name, SealRequest(incomplete="x"))).incomplete == ""
        assert (await grow(farm, name, a)).root_count == 1
        with pytest.raises(RefusedError, match="is complete and takes no further roots"):
            await grow(farm, name, b)
        other = await opened(farm)
        await farm.client.cancel(other)
        with pytest.raises(RefusedError, match="was cancelled and takes no further roots"):
            await grow(farm, other, b)
        with pytest.raises(RefusedError, match="has no root"):
            await farm.client.submit(SubmitRequest(roots=()))


async def test_a_bad_batch_harms_nothing_and_the_next_one_is_taken(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        a, b = await farm.evaluate(GRAPH, "a", "b")
        name = await opened(farm)
        await grow(farm, name, a)
        unknown = RootRequest(attr="x", drv=f"/nix/store/{'0' * 32}-x.drv")
        with pytest.raises(RefusedError, match="not known here"):
            await grow(farm, name, b, unknown)
        with pytest.raises(RefusedError, match="no output"):
            await grow(farm, name, RootRequest(attr="b", drv=b.drv, outputs=("doc",)))
        assert (await grow(farm, name, b)).counts.total == 5


async def test_a_restart_keeps_it_open_with_all_its_names_and_it_goes_on(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        a, b, c = await farm.evaluate(GRAPH, "a", "b", "c")
        name = await opened(farm, "over a restart")
        await grow(farm, name, a)
        before = await grow(farm, name, b)
    async with open_farm("w1") as farm:
        view = await farm.client.submission(name)
        assert (view.open, view.counts.total, view.derivations) == (True, 5, 5)
        assert [(root.attr, root.step) for root in view.roots][:1] == [(before.roots[0].attr, before.roots[0].step)]
        # Its client sends again what it had no answer for.
        assert (await grow(farm, name, b, c)).derivations == 6
        stage = ClientStage(name="evaluate", begin=1.0, end=3.0)
        broken = UnevaluatedAttr(attr="bad", message="undefined variable")
        await farm.client.seal(name, SealRequest(not_evaluated=(broken,), unevaluated=7, stages=(stage,)))
        ended = await farm.ended(name)
        assert (ended.state, ended.counts.total, ended.root_count) == (SubmissionState.SUCCEEDED, 6, 3)
    async with open_farm() as farm:
        view, views = await farm.client.submission(name), farm.coordinator.views
        assert view.not_evaluated == (UnevaluatedView(attr="bad", kind="error", message="undefined variable"),)
        assert (view.unevaluated, view.label, view.root_count) == (7, "over a restart", 3)
        [(stage_name, begin, end)] = views.note(views.submission(name).id).stages
        assert (stage_name, round(end - begin, 3)) == ("evaluate", 2.0)


@pytest.mark.parametrize("silence_s", [3.0])
async def test_one_whose_client_is_silent_is_closed_as_incomplete_and_goes_on_building(open_farm: OpenFarm) -> None:
    async with open_farm("w1") as farm:
        [a] = await farm.evaluate(GRAPH, "a")
        name = await opened(farm)
        await grow(farm, name, a)
        ended = await farm.ended(name)
        assert (ended.state, ended.open) == (SubmissionState.SUCCEEDED, False)
        assert ended.incomplete.startswith("its client has sent nothing for")
        assert (ended.counts.done, ended.counts.total) == (2, 2)


@pytest.mark.parametrize("silence_s", [3.0])
async def test_signs_of_life_keep_it_open(silence_s: float, open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        name = await opened(farm)
        row = farm.coordinator.views.submission(name)
        other = await opened(farm)
        while not farm.coordinator.views.submission(other).incomplete:
            await grow(farm, name)
            await asyncio.sleep(silence_s / 10)
        assert row.is_open


async def test_many_clients_that_send_one_batch_at_once_count_it_once(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        roots = await farm.evaluate(GRAPH, "a", "b", "c")
        name = await opened(farm)
        views = await asyncio.gather(*(grow(farm, name, *roots) for _ in range(8)))
        assert {(view.root_count, view.counts.total, view.derivations) for view in views} == {(3, 6, 6)}


async def opened_by(farm: OpenedFarm, client: str, key: str = "run-1", evaluates: str = "") -> str:
    wish = SubmitRequest(roots=(), open=True, client=client, idempotency_key=key, evaluates=evaluates)
    return (await farm.client.submit(wish)).id


async def refusal_of(asked: Awaitable[SubmissionView]) -> str:
    try:
        await asked
    except RefusedError as refusal:
        return refusal.reason if refusal.http_status == 409 else str(refusal)
    return ""


async def grow_by(farm: OpenedFarm, submission: str, client: str, *roots: RootRequest) -> str:
    """The submission grows by a client; returns the code of the refusal, empty where it was taken."""
    return await refusal_of(farm.client.grow(submission, GrowRequest(roots=roots, client=client)))


async def seal_by(farm: OpenedFarm, submission: str, client: str, drvs: int) -> str:
    return await refusal_of(farm.client.seal(submission, SealRequest(client=client, drv_count=drvs)))


async def test_two_clients_with_one_key_are_one_wish_or_the_second_is_refused_while_the_first_is_open(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm:
        a, b, c, tool = await farm.evaluate(GRAPH, "a", "b", "c", "tool")
        name = await opened_by(farm, "first")
        assert await grow_by(farm, name, "first", a) == ""
        assert await opened_by(farm, "second") == name
        # The same derivation under its other name is no other wish; the same name for another derivation is.
        assert await grow_by(farm, name, "second", RootRequest(attr="also-a", drv=a.drv)) == ""
        assert await grow_by(farm, name, "other", RootRequest(attr="a", drv=tool.drv)) == "other_wish"
        # What the first has not named it may yet name.
        assert await grow_by(farm, name, "second", a, b) == "held"
        assert await seal_by(farm, name, "second", 2) == "held"
        assert (await farm.client.submission(name)).root_count == 1
        assert await grow_by(farm, name, "first", b, c) == ""
        assert await grow_by(farm, name, "second", a, b) == ""
        wish = SubmitRequest(roots=(a, b, c), idempotency_key="run-1")
        with pytest.raises(RefusedError, match="still grows by another client") as refused:
            await farm.client.submit(wish)
        assert refused.value.reason == "held"
        assert await seal_by(farm, name, "first", 3) == ""
        assert (await seal_by(farm, name, "second", 3), await seal_by(farm, name, "other", 2)) == ("", "other_wish")
        assert await grow_by(farm, name, "other", tool) == "other_wish"
        assert (await farm.client.submit(wish)).id == name
        with pytest.raises(RefusedError, match="has other roots"):
            await farm.client.submit(SubmitRequest(roots=(a, b), idempotency_key="run-1"))
        assert (await farm.client.submission(name)).root_count == 3


async def test_what_is_evaluated_from_other_words_is_refused_before_it_has_roots(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        name = await opened_by(farm, "first", evaluates="a" * 64)
        assert await opened_by(farm, "second", evaluates="a" * 64) == name
        with pytest.raises(RefusedError, match=f"'run-1' is that of submission {name}") as refused:
            await opened_by(farm, "other", evaluates="b" * 64)
        assert (refused.value.http_status, refused.value.reason) == (409, "conflict")
        # One that was closed before all had come is no answer to a repeat.
        await farm.client.seal(name, SealRequest(client="first", incomplete="its client was interrupted"))
        again = await opened_by(farm, "other", evaluates="b" * 64)
        assert again != name
    async with open_farm() as farm:
        assert await opened_by(farm, "third", evaluates="b" * 64) == again


async def test_a_client_that_starts_again_goes_on_where_it_was_once_the_one_before_is_silent(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_farm() as farm:
        a, b = await farm.evaluate(GRAPH, "a", "b")
        name = await opened_by(farm, "killed")
        assert await grow_by(farm, name, "killed", a) == ""
    # Whose turn it is outlives the coordinator.
    async with open_farm() as farm:
        assert await opened_by(farm, "again") == name
        assert [await grow_by(farm, name, "again", root) for root in (a, b)] == ["", "held"]
        with monkeypatch.context() as patched:
            patched.setattr(growth, "TURN_S", 0.0)
            assert await grow_by(farm, name, "again", b) == ""
        assert await grow_by(farm, name, "killed", a, b) == ""
        assert (await seal_by(farm, name, "killed", 2), await seal_by(farm, name, "again", 2)) == ("held", "")
        view = await farm.client.submission(name)
        assert (view.open, view.root_count, view.incomplete) == (False, 2, "")
