"""Sources of environments: files below the operator's directories, and git over real HTTP, within their bounds."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.evaluations import EvaluationState, EvaluationView, FailedAttrView
from coordinator.api.requests import RemoteEvaluationRequest, RootRequest
from coordinator.defaults import OPERATOR
from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments import evaluated, git_source
from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.evaluated import EvaluatedSources
from coordinator.environments.model import SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent, wishes_of
from coordinator.environments.sources import GIT_AT_ONCE, BoundedSources
from coordinator.wishes.model import WishedDerivation
from infra.nix.store_path import StoreDir
from infra.process import Completed
from tests.support.cache import store_path
from tests.support.git_server import commit, git, serving_git
from tests.support.patience import PATIENCE_S

LINUX = "x86_64-linux"


async def read(settings: EnvironmentSettings, source: TrackedSource, seen: str = "") -> SourceContent | None:
    with tempfile.TemporaryDirectory() as directory:
        sources = BoundedSources(settings, Path(directory) / "git")
        try:
            return await sources.read(source, seen)
        finally:
            assert not list(sources.directory.glob("*"))


async def refusal(settings: EnvironmentSettings, source: TrackedSource) -> str:
    with pytest.raises(EnvironmentSourceError) as refused:
        await read(settings, source)
    return str(refused.value)


async def test_a_file_is_read_below_the_operators_directories_alone_wherever_links_lead(tmp_path: Path) -> None:
    allowed, elsewhere = tmp_path / "allowed", tmp_path / "elsewhere"
    for directory in (allowed / ".flox/env", allowed / "empty", elsewhere):
        directory.mkdir(parents=True)
    (allowed / ".flox/env/manifest.lock").write_text("{}")
    (elsewhere / "secret").write_text("secret")
    (allowed / "link").symlink_to(elsewhere / "secret")
    os.mkfifo(allowed / "pipe")
    settings = EnvironmentSettings(directories=(allowed,))

    def file(path: Path | str) -> TrackedSource:
        return TrackedSource(SourceKind.FILE, str(path))

    found = await read(settings, file(allowed))
    assert found is not None
    assert (found.name, found.data) == ("manifest.lock", b"{}")
    assert await read(settings, file(allowed), found.mark) is None
    for path in (elsewhere / "secret", allowed / "link", allowed / "../elsewhere/secret", "relative", "/nothing"):
        said = await refusal(settings, file(path))
        assert "does not track files there" in said
        assert "secret" not in said
    assert "is no regular file" in await refusal(settings, file(allowed / "pipe"))
    assert "has none of" in await refusal(settings, file(allowed / "empty"))
    assert "cannot be read: No such file" in await refusal(settings, file(allowed / "gone"))
    assert "this farm tracks no files" in await refusal(EnvironmentSettings(), file(allowed))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory of repositories, and its address."""
    with serving_git(tmp_path) as port:
        yield tmp_path, f"127.0.0.1:{port}"


def bounds(host: str, mib: int = 64, timeout_s: float = PATIENCE_S) -> EnvironmentSettings:
    return EnvironmentSettings(git_hosts=(host,), git_schemes=("http",), git_mib=mib, git_timeout_s=timeout_s)


async def test_a_branch_is_looked_at_and_fetched_when_it_moved_forward_or_back(served: tuple[Path, str]) -> None:
    root, host = served
    first = commit(root / "repository", {"env/list": store_path("a"), "manifest.lock": "{}"})
    source = TrackedSource(SourceKind.GIT, "env/list", f"http://{host}/repository/.git", "main")
    settings = bounds(host)
    found = await read(settings, source)
    assert found == SourceContent(first, "list", store_path("a").encode())
    assert await read(settings, source, first) is None
    second = commit(root / "repository", {"env/list": store_path("b")})
    found = await read(settings, source, first)
    assert found == SourceContent(second, "list", store_path("b").encode())
    git(root / "repository", "reset", "--quiet", "--hard", first)
    back = await read(settings, source, second)
    assert back is not None
    assert back.mark == first
    # Without a file and a ref: a known name at HEAD. A tag with a message stands for its commit.
    git(root / "repository", "tag", "-m", "released", "v1", second)
    for ref, mark in (("", first), ("v1", second)):
        known = await read(settings, TrackedSource(SourceKind.GIT, "", source.url, ref))
        assert known is not None
        assert (known.mark, known.name) == (mark, "manifest.lock")
    # Of a branch and a tag of one name it is the branch, and that alone is compared with what was seen.
    git(root / "repository", "tag", "main", second)
    found = await read(settings, source, second)
    assert found is not None
    assert found.mark == first
    assert await read(settings, source, first) is None


async def test_of_a_hundred_thousand_branches_one_is_looked_at(served: tuple[Path, str]) -> None:
    root, host = served
    there = commit(root / "many", {"list": store_path("a")})
    refs = "".join(f"{there} refs/heads/b{number:06}\n" for number in range(100_000))
    (root / "many/.git/packed-refs").write_text("# pack-refs with: peeled fully-peeled sorted \n" + refs)
    source = TrackedSource(SourceKind.GIT, "list", f"http://{host}/many/.git", "b099999")
    found = await read(bounds(host), source)
    assert found is not None
    assert found.mark == there


async def test_a_repository_that_is_gone_too_large_or_too_slow_is_refused_with_the_reason(
    served: tuple[Path, str],
) -> None:
    root, host = served
    commit(root / "large", {"list": store_path("a"), "blob": os.urandom(1_200_000).hex()})
    url = f"http://{host}/large/.git"
    for source, settings, said in (
        (TrackedSource(SourceKind.GIT, "list", f"http://{host}/gone/.git"), bounds(host), "cannot be looked at"),
        (TrackedSource(SourceKind.GIT, "list", url, "gone"), bounds(host), "has no branch or tag gone"),
        (TrackedSource(SourceKind.GIT, "no/such", url), bounds(host), "HEAD of .* has no file no/such"),
        (TrackedSource(SourceKind.GIT, "list", url), bounds(host, mib=1), "may have 1 MiB at most"),
    ):
        with pytest.raises(EnvironmentSourceError, match=said):
            await read(settings, source)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        source = TrackedSource(SourceKind.GIT, "list", f"http://{host}/x")
        assert "took longer than 0.5 s" in await refusal(bounds(host, timeout_s=0.5), source)


async def test_few_repositories_are_looked_at_at_one_time_and_the_limit_of_time_is_that_of_a_whole_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, fetching = 0, 0

    async def run(command: Sequence[str], **_: object) -> Completed:
        nonlocal most, fetching
        if "fetch" in command:
            fetching += 1
            most = max(most, fetching)
            try:
                await asyncio.Event().wait()
            finally:
                fetching -= 1
        return Completed(0, f"{'a' * 40}\tHEAD\n".encode(), b"")

    monkeypatch.setattr(git_source, "run", run)
    sources = BoundedSources(bounds("git.example", timeout_s=2), tmp_path / "git")
    # A coordinator that was killed has left one.
    (tmp_path / "git/left").mkdir(parents=True)
    sources.clear()
    source = TrackedSource(SourceKind.GIT, "list", "http://git.example/x")
    refused = await asyncio.gather(*(sources.read(source, "") for _ in range(GIT_AT_ONCE + 2)), return_exceptions=True)
    assert all("took longer than 2 s" in str(each) for each in refused), refused
    assert 0 < most <= GIT_AT_ONCE
    assert list((tmp_path / "git").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TrackedSource(SourceKind.GIT, url="file:///etc"), "by https, http only, and not by file"),
        (TrackedSource(SourceKind.GIT, url="ext::sh -c true"), "not by ext"),
        (TrackedSource(SourceKind.GIT, url="--upload-pack=touch x"), "not by a path"),
        (TrackedSource(SourceKind.GIT, url="https://elsewhere.example/x"), "does not track repositories of elsewhere"),
        (TrackedSource(SourceKind.GIT, url="https://git.example:444/x"), "does not track repositories of git.example"),
        (TrackedSource(SourceKind.GIT, url="https://me:secret@git.example/x"), "has a name or password"),
        (TrackedSource(SourceKind.GIT, url="https://git.example/x\n"), "control characters"),
        (TrackedSource(SourceKind.GIT, url="https://git.example/x", ref="--all"), "is no name of a branch"),
        (TrackedSource(SourceKind.GIT, url="https://git.example/x", ref="a..b"), "is no name of a branch"),
        (TrackedSource(SourceKind.GIT, "../x", url="https://git.example/x"), "by its path in the tree"),
        (TrackedSource(SourceKind.GIT, "env/", url="https://git.example/x"), "by its path in the tree"),
    ],
)
async def test_an_address_that_the_operator_does_not_allow_starts_no_program(
    source: TrackedSource, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    settings = EnvironmentSettings(git_hosts=("git.example",), git_schemes=("https", "http"))
    refused = await refusal(settings, source)
    assert said in refused
    assert "secret" not in refused
    assert "this farm tracks no git" in await refusal(EnvironmentSettings(), source)


def test_what_must_be_evaluated_or_is_empty_is_refused_with_the_way_that_there_is() -> None:
    for name, data, said in (
        ("flake.lock", b'{"nodes": {"root": {}}, "root": "root", "version": 7}', "evaluate it in CI"),
        ("list", b"# nothing\n", "names no package"),
    ):
        with pytest.raises(EnvironmentSourceError, match=said):
            wishes_of(SourceContent("m", name, data), StoreDir("/nix/store"), LINUX)


class ScriptedEvaluations:
    """Remote evaluation whose evaluations end as scripted, once they may."""

    def __init__(self, **ends: EvaluationView) -> None:
        self.off = ""
        self.ends = ends
        self.begun: list[RemoteEvaluationRequest] = []
        self.may_end = asyncio.Event()

    def begin(self, ask: RemoteEvaluationRequest, owner: str, *, submits: bool = True) -> EvaluationView:
        assert (owner, submits) == (OPERATOR, False)
        self.begun.append(ask)
        return EvaluationView(id=f"eval-{len(self.begun)}", state=EvaluationState.QUEUED)

    async def view(self, name: str, may_see: Callable[[str], bool], seen: str = "") -> EvaluationView:
        assert may_see("whoever")
        ask = self.begun[int(name.removeprefix("eval-")) - 1]
        if seen:
            await self.may_end.wait()
        elif not self.may_end.is_set():
            return EvaluationView(id=name, state=EvaluationState.EVALUATING)
        return replace(self.ends[ask.file.partition("#")[2].partition(".")[0]], id=name)

    def found(self, name: str) -> Sequence[RootRequest]:
        assert name.startswith("eval-")
        return (RootRequest(attr="tool", drv=store_path("tool.drv")),)


LOCK = SourceContent("c1", "flake.lock", b'{"nodes": {"root": {}}, "root": "root", "version": 7}')
REPOSITORY = TrackedSource(SourceKind.GIT, url="https://git.test/one", path="dev/flake.lock", system=LINUX)


async def test_a_look_takes_the_evaluation_that_an_earlier_one_began_and_a_flake_need_not_have_all_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = EvaluationView(id="", state=EvaluationState.DONE)
    absent = EvaluationView(id="", state=EvaluationState.FAILED, error="it does not provide attribute 'devShells'")
    evaluations = ScriptedEvaluations(packages=done, devShells=absent)
    room = EvaluatedSources(evaluations, StoreDir("/nix/store"))
    monkeypatch.setattr(evaluated, "WAITED_S", 0.0)
    for _ in range(2):
        with pytest.raises(EnvironmentSourceError, match="is still being evaluated"):
            await room.wishes(REPOSITORY, LOCK)
    assert [(each.git, each.rev, each.file) for each in evaluations.begun] == [
        (REPOSITORY.url, "c1", f"dev#packages.{LINUX}")
    ]
    monkeypatch.setattr(evaluated, "WAITED_S", 60.0)
    evaluations.may_end.set()
    found = await room.wishes(REPOSITORY, LOCK)
    assert [(wish.name, wish.target) for wish in found.wishes] == [
        ("tool", WishedDerivation(store_path("tool.drv"), ()))
    ]
    # A part that cannot be evaluated is not left out.
    part = FailedAttrView(attr="other", error="torn")
    evaluations.ends["packages"] = replace(done, failed=(part,), failed_count=1)
    with pytest.raises(EnvironmentSourceError, match="cannot be evaluated: other: torn"):
        await room.wishes(REPOSITORY, LOCK)
    evaluations.off = "remote evaluation is off; the operator switches it on."
    with pytest.raises(EnvironmentSourceError, match=r"push NAME --submission ID`\. Here remote evaluation is off"):
        await room.wishes(REPOSITORY, LOCK)
    with pytest.raises(EnvironmentSourceError, match=r"push NAME --submission ID`\.$"):
        await room.wishes(replace(REPOSITORY, kind=SourceKind.FILE), LOCK)
