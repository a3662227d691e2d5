"""What a submission says of itself, whose it is, and that its key makes it one however often it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from coordinator.api.models import SubmissionView
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.cli.commands import cli
from coordinator.cli.origin import ClaimedOrigin, TagError, origin_of, parse_tags
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import OwnerSettings, Settings
from coordinator.main import Coordinator, open_coordinator
from coordinator.security.clients import ClientTokens
from coordinator.security.tokens import TokenError
from scheduler.events import SubmissionExpired
from scheduler.model import SubmissionId
from tests.support.graphs import Made, Maker
from tests.support.local_fleet import no_workers
from tests.support.proxy import Fault, FaultyProxy

TOKENS = {"ci": "c" * 32, "people": "p" * 32}


@pytest.fixture
def owned(tmp_path: Path) -> Settings:
    owners = []
    for name, token in TOKENS.items():
        file = tmp_path / name
        file.write_text(token)
        file.chmod(0o600)
        owners.append(OwnerSettings(name=name, tokens=(str(file),)))
    return Settings(state_dir=tmp_path / "farm", port=0, owners=tuple(owners))


def client_of(coordinator: Coordinator, owner: str = "", url: str = "") -> ApiClient:
    token = TOKENS.get(owner) or coordinator.ready.token_file.read_text().strip()
    return ApiClient(url or coordinator.ready.url, token)


async def wish_of(client: ApiClient, *made: Made, **more: object) -> SubmitRequest:
    """A wish for derivations that are sent first."""
    await client.send_derivations(in_thread(encode_derivations((each.name, each.data) for each in made)))
    roots = [RootRequest(attr=each.name, drv=each.drv) for each in made]
    return SubmitRequest.model_validate({"roots": roots, **more})


def ids(views: Iterable[SubmissionView]) -> set[str]:
    return {view.id for view in views}


async def test_what_a_submission_says_is_kept_and_whose_it_is_follows_from_its_token(owned: Settings) -> None:
    maker = Maker()
    told = {"branch": "main", "pull": "12", "commit": "0f3a", "tags": {"job": "nightly build", "a/b": "ü"}}
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        wish = await wish_of(client, maker.plain("a"), label="x", **told)
        name = (await client.submit(wish)).id
        claimed = {**wish.model_dump(mode="json"), "owner": "people"}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKENS['ci']}"}) as session:
            url = f"{coordinator.ready.url}/api/v1/submissions"
            async with session.post(url, data=json.dumps(claimed)) as refused:
                assert refused.status == 400
        async with client_of(coordinator) as farm_client:
            assert (await farm_client.submit(wish)).owner == "api"
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator) as client:
        view = await client.submission(name)
    assert (view.owner, view.branch, view.pull, view.commit, dict(view.tags)) == ("ci", *told.values())


async def test_one_key_is_one_submission_for_its_owner_also_after_a_restart(owned: Settings) -> None:
    maker = Maker()
    a, b = maker.plain("a"), maker.plain("b")
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        wish = await wish_of(client, a, idempotency_key="run-1")
        # Two at once: one of them waits for the other.
        first = ids(await asyncio.gather(client.submit(wish), client.submit(wish), client.submit(wish)))
        assert len(first) == 1
        again = wish.model_copy(update={"traceparent": "00-1", "tags": {"attempt": "2"}, "retry_failed": True})
        assert {(await client.submit(again)).id} == first
        async with client_of(coordinator, "people") as other:
            assert {(await other.submit(wish)).id}.isdisjoint(first)
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as client:
        assert {(await client.submit(wish)).id} == first
        for another in (await wish_of(client, b, idempotency_key="run-1"), wish.model_copy(update={"label": "y"})):
            with pytest.raises(RefusedError, match=f"'run-1' is that of submission {min(first)}") as refused:
                await client.submit(another)
            assert refused.value.reason == "conflict"
        # The key is forgotten with its submission.
        await client.cancel(min(first))
        await coordinator.engine.offer(SubmissionExpired(SubmissionId(min(first))))
        assert {(await client.submit(another)).id}.isdisjoint(first)


async def test_an_answer_that_is_lost_makes_no_second_submission(owned: Settings) -> None:
    async with open_coordinator(owned, no_workers) as coordinator, client_of(coordinator, "ci") as direct:
        wish = await wish_of(direct, Maker().plain("a"))
        port = int(coordinator.ready.url.rpartition(":")[2])
        async with FaultyProxy(port) as proxy, client_of(coordinator, "ci", proxy.endpoint) as client:
            await client.farm()
            proxy.fail(Fault.CUT_ANSWER, where="POST /api/v1/submissions")
            view = await client.submit(wish)
            assert proxy.failed == 1
            assert [each.id for each in await client.submissions()] == [view.id]
            # Without a key of its own every call is another submission.
            assert (await client.submit(wish)).id != view.id


async def test_an_owner_changes_its_own_submissions_and_nothing_else(owned: Settings) -> None:
    async with (
        open_coordinator(owned, no_workers) as coordinator,
        client_of(coordinator, "ci") as ci,
        client_of(coordinator, "people") as people,
        client_of(coordinator) as operator,
    ):
        wish = await wish_of(ci, Maker().plain("a"))
        names = [(await ci.submit(wish)).id, (await ci.submit(wish)).id]
        for refused in (people.cancel(names[0]), people.retry(names[0]), ci.collect("default", dry_run=True)):
            with pytest.raises(RefusedError) as error:
                await refused
            assert error.value.reason == "forbidden"
        assert (await ci.cancel(names[0])).state == (await operator.cancel(names[1])).state == "cancelled"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("branch", "a\x1b[2Jb", "pattern"),
        ("branch", "b" * 256, "255"),
        ("pull", "1\n2", "pattern"),
        ("commit", "c" * 129, "128"),
        ("tags", {"a b": "x"}, "tags"),
        ("tags", {"": "x"}, "tags"),
        ("tags", {"a": "\x00"}, "pattern"),
        ("tags", {f"k{number}": "v" for number in range(17)}, "16"),
        ("tags", {"k": "v" * 257}, "256"),
        ("idempotency_key", "a b", "pattern"),
        ("idempotency_key", "k" * 256, "255"),
    ],
)
async def test_what_nobody_could_show_is_refused_with_one_sentence(
    owned: Settings, field: str, value: object, says: str
) -> None:
    async with open_coordinator(owned, no_workers) as coordinator, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {TOKENS['ci']}"}
        body = json.dumps({"roots": [{"attr": "x", "drv": "/d"}], field: value})
        async with session.post(f"{coordinator.ready.url}/api/v1/submissions", data=body, headers=headers) as answer:
            message = (await answer.json())["error"]["message"]
    assert answer.status == 400
    assert field in message
    assert says in message


def test_two_owners_have_no_token_in_common_and_one_without_tokens_is_refused() -> None:
    with pytest.raises(TokenError, match="ci and people have the same token"):
        ClientTokens("f" * 32, {"ci": ["x" * 32], "people": ["x" * 32]})
    with pytest.raises(ValueError, match="ci has no tokens"):
        OwnerSettings(name="ci")
    with pytest.raises(ValueError, match="weight"):
        OwnerSettings(name="api", weight=0)


GITHUB = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_SHA": "abc",
    "GITHUB_REPOSITORY": "o/r",
    "GITHUB_RUN_ID": "7",
}
RUNNERS = {
    "a push on GitHub": (
        {**GITHUB, "GITHUB_REF": "refs/heads/main"},
        ClaimedOrigin("main", "", "abc", {"repository": "o/r", "run": "7"}),
    ),
    "a pull request on Forgejo": (
        {**GITHUB, "GITHUB_REF": "refs/pull/12/head", "GITHUB_HEAD_REF": "fix/it", "FORGEJO_ACTIONS": "true"},
        ClaimedOrigin("fix/it", "12", "abc", {"repository": "o/r", "run": "7"}),
    ),
    "a tag on GitHub": (
        {**GITHUB, "GITHUB_REF": "refs/tags/v1"},
        ClaimedOrigin("", "", "abc", {"repository": "o/r", "run": "7"}),
    ),
    "a merge request on GitLab": (
        {
            "GITLAB_CI": "true",
            "CI_COMMIT_SHA": "abc",
            "CI_MERGE_REQUEST_IID": "3",
            "CI_MERGE_REQUEST_SOURCE_BRANCH_NAME": "fix",
            "CI_PROJECT_PATH": "g/p",
        },
        ClaimedOrigin("fix", "3", "abc", {"repository": "g/p"}),
    ),
    "a branch on Buildkite": (
        {
            "BUILDKITE": "true",
            "BUILDKITE_COMMIT": "HEAD",
            "BUILDKITE_BRANCH": "main",
            "BUILDKITE_PULL_REQUEST": "false",
        },
        ClaimedOrigin("main"),
    ),
    "a branch that the farm would refuse": (
        {**GITHUB, "GITHUB_REF": f"refs/heads/{'b' * 300}"},
        ClaimedOrigin("", "", "abc", {"repository": "o/r", "run": "7"}),
    ),
    "no runner": ({"CI": "true", "GITHUB_SHA": "abc"}, ClaimedOrigin()),
}


@pytest.mark.parametrize("name", RUNNERS)
def test_the_runner_s_environment_says_whence_a_submission_comes(name: str) -> None:
    environment, expected = RUNNERS[name]
    assert origin_of(environment) == expected


def test_what_the_command_says_wins_over_its_runner() -> None:
    runner = ClaimedOrigin("main", "12", "abc", {"run": "7", "job": "x"})
    said = ClaimedOrigin("mine", tags={"run": "8"})
    assert said.over(runner) == ClaimedOrigin("mine", "", "abc", {"run": "8", "job": "x"})
    assert len(ClaimedOrigin(tags={f"k{n}": "" for n in range(16)}).over(runner).tags) == 16


@pytest.mark.parametrize("words", [("a",), ("=x",), ("a b=x",), ("a=\x07",), ("a=1", "a=2"), ("k" * 65 + "=v",)])
def test_silly_tags_are_refused_before_anything_is_evaluated(words: tuple[str, ...]) -> None:
    with pytest.raises(TagError):
        parse_tags(words)
    arguments = [part for word in words for part in ("--tag", word)]
    result = CliRunner().invoke(cli, ["build", "default.nix", *arguments])
    assert result.exit_code == 2
    assert "tag" in result.output.lower()
