"""Terms of submissions through the API: what supersedes, what a deadline ends, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.api import limits
from coordinator.api.models import Ended, SubmissionState
from coordinator.api.requests import SubmitRequest
from coordinator.cli import exit_status, submission_commands
from coordinator.cli.submissions import wait
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import Settings
from coordinator.main import open_coordinator
from coordinator.readmodel import views
from scheduler import terms
from tests.coordinator.test_origins import client_of, owned, wish_of
from tests.support.graphs import Maker
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S

__all__ = ["owned"]


async def end_of(client: ApiClient, submission: str) -> SubmissionState:
    async with asyncio.timeout(PATIENCE_S):
        async for event in client.watch(submission):
            if isinstance(event, Ended):
                return event.submission.state
    raise AssertionError(submission)


async def test_a_newer_one_of_the_same_branch_and_label_supersedes_the_older_also_after_a_restart(
    owned: Settings,
) -> None:
    maker = Maker()
    async with (
        open_coordinator(owned, no_workers) as coordinator,
        client_of(coordinator, "ci") as ci,
        client_of(coordinator, "people") as people,
    ):
        wish = await wish_of(ci, maker.plain("a"), maker.plain("b"), branch="main", label="x", priority=3)
        old = (await ci.submit(wish)).id
        kept = [
            (await ci.submit(wish.model_copy(update=more))).id
            for more in ({"label": "y"}, {"pull": "1"}, {"branch": "other"}, {"tags": {"repository": "o/r"}})
        ]
        kept.append((await people.submit(wish)).id)
        new = (await ci.submit(wish.model_copy(update={"supersede": True}))).id
        assert await end_of(ci, old) is SubmissionState.SUPERSEDED
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator) as client:
        view = await client.submission(old)
        assert (view.state, view.superseded_by, view.priority) == (SubmissionState.SUPERSEDED, new, 3)
        assert exit_status.ended_status(view.state) == exit_status.SUPERSEDED
        states = {name: (await client.submission(name)).state for name in (*kept, new)}
        assert set(states.values()) == {SubmissionState.RUNNING}


async def test_a_deadline_ends_a_submission(owned: Settings) -> None:
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        view = await client.submit(await wish_of(client, Maker().plain("a"), deadline_s=1))
        assert view.deadline_at > view.created_at
        assert await end_of(client, view.id) is SubmissionState.EXPIRED
        with pytest.raises(RefusedError, match="was expired"):
            await client.retry(view.id)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"deadline_at": 1.0}, "deadline has passed"),
        ({"deadline_at": 1e10, "deadline_s": 5}, "give one of them"),
        ({"supersede": True}, "name one of them"),
    ],
)
async def test_terms_that_cannot_be_are_refused(owned: Settings, told: dict[str, object], says: str) -> None:
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        wish = await wish_of(client, Maker().plain("a"), **told)
        with pytest.raises(RefusedError, match=says):
            await client.submit(wish)
        assert await client.submissions() == []


def test_a_priority_beyond_the_bounds_and_a_weight_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="priority"):
        SubmitRequest.model_validate({"roots": [{"attr": "x", "drv": "/d"}], "priority": 6})
    with pytest.raises(ValueError, match="weight"):
        Settings.model_validate({"state_dir": tmp_path, "owners": [{"name": "ci", "tokens": ["env:X"], "weight": 0}]})


def test_clients_and_the_core_have_the_same_bounds_of_a_priority() -> None:
    assert (limits.LOWEST_PRIORITY, limits.HIGHEST_PRIORITY) == (terms.LOWEST_PRIORITY, terms.HIGHEST_PRIORITY)


async def test_a_bump_puts_a_submission_before_the_others_of_its_owner(owned: Settings) -> None:
    maker = Maker()
    async with (
        open_coordinator(owned, no_workers) as coordinator,
        client_of(coordinator, "ci") as ci,
        client_of(coordinator, "people") as people,
    ):
        first = await ci.submit(await wish_of(ci, maker.plain("a"), priority=2))
        other = await people.submit(await wish_of(people, maker.plain("b"), priority=5))
        second = await ci.submit(await wish_of(ci, maker.plain("c")))
        assert (await ci.bump(second.id)).priority == 3, "one above all that wait of its owner, and no other's"
        assert (await ci.bump(second.id)).priority == 3, "a repeat changes nothing"
        assert (await ci.bump(second.id, -5)).priority == -5
        with pytest.raises(RefusedError, match="people's"):
            await ci.bump(other.id)
        await ci.cancel(first.id)
        assert (await ci.bump(first.id, 5)).priority == 2, "it has ended"
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator) as client:
        assert (await client.submission(second.id)).priority == -5
        assert (await client.bump(other.id, 0)).priority == 0, "the farm's own token changes all"


async def test_submissions_are_listed_by_what_they_say_and_how_they_are(
    owned: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker()
    async with (
        open_coordinator(owned, no_workers) as coordinator,
        client_of(coordinator, "ci") as ci,
        client_of(coordinator, "people") as people,
    ):
        said = {"branch": "main", "pull": "12", "label": "nightly", "tags": {"job": "a=b"}}
        told = await ci.submit(await wish_of(ci, maker.plain("a"), **said))
        plain = await people.submit(await wish_of(people, maker.plain("b")))
        await people.cancel(plain.id)

        async def listed(**filters: str) -> list[str]:
            return [view.id for view in await ci.submissions(filters=filters)]

        assert await listed() == [plain.id, told.id]
        for filters in ({"branch": "main"}, {"pull": "12"}, {"label": "nightly"}, {"tag": "job=a=b"}, {"owner": "ci"}):
            assert await listed(**filters) == [told.id], filters
        assert await listed(state="cancelled,failed") == [plain.id]
        assert await listed(within="600") == [plain.id, told.id]
        assert await listed(branch="main", state="failed") == []
        for filters in ({"state": "odd"}, {"tag": "job"}, {"tag": "=x"}, {"within": "0"}, {"within": "2h"}):
            with pytest.raises(RefusedError) as refused:
                await listed(**filters)
            assert refused.value.http_status == 400
        # A page of what is let through may be empty although more follow.
        monkeypatch.setattr(views, "SUBMISSIONS_LOOKED_AT", 1)
        assert await listed(branch="main") == [told.id]


async def test_a_wait_ends_with_the_worst_end_and_says_what_it_waits_for(
    owned: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    maker = Maker()
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        wish = await wish_of(client, maker.plain("a"), branch="main")
        first, late = (await client.submit(wish)).id, (await client.submit(wish)).id
        assert await wait(client, [first, late], 1, as_json=False) == exit_status.INFRASTRUCTURE
        assert f"Wait again: drover wait {first} {late}" in capfd.readouterr().err
        waiting = asyncio.create_task(wait(client, [first, late, first], 0, as_json=False))
        await client.cancel(first)
        newest = (await client.submit(wish.model_copy(update={"supersede": True}))).id
        assert await waiting == exit_status.SUPERSEDED
        lines = capfd.readouterr().err
        assert f"{first}: cancelled, 0 of 1 steps done" in lines
        assert f"{late}: superseded, 0 of 1 steps done" in lines
        with pytest.raises(RefusedError, match="there is no submission"):
            await wait(client, [newest, "none"], 0, as_json=False)


def test_the_words_of_the_command_are_the_states_that_there_are() -> None:
    assert tuple(SubmissionState) == submission_commands.STATES
