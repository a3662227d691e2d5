"""Remote evaluations that attack: each ends as an error of its own, and the others and the farm go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest
import zstandard

from coordinator.api.evaluations import EvaluationState, EvaluationView
from coordinator.api.requests import RemoteEvaluationRequest, TrackRequest
from coordinator.api.sent_streams import in_thread
from coordinator.api.trees import MAX_DEPTH, compressed
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import OwnerSettings
from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments.store import EnvironmentStore
from coordinator.remote_evaluation.errors import RemoteFailedError
from coordinator.remote_evaluation.frames import BadFrameError, FrameKind
from coordinator.remote_evaluation.sandboxed_run import running
from coordinator.remote_evaluation.sandboxes import ENVIRONMENT, Sandboxes, SandboxLimits
from infra.cache.catalog.database import FencingToken
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, write_events
from infra.process import run
from tests.support.git_server import commit, git, serving_git
from tests.support.ordinary import OrdinaryUser
from tests.support.patience import PATIENCE_S
from tests.support.remote import DERIVATION, Files, RemoteFarm, events, remote_farm

MIB = 2**20
SECRET = "never-to-be-seen"  # noqa: S105 - what an attack looks for
FORBIDDEN = "forbidden in restricted mode"


@pytest.fixture
async def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RemoteFarm]:
    monkeypatch.setenv("DROVER_TEST_SECRET", SECRET)
    async with remote_farm(tmp_path) as farm:
        yield farm


@pytest.fixture
def sandboxes(tmp_path: Path) -> Sandboxes:
    """Sandboxes for programs of one's own: an evaluator that was taken over."""
    return Sandboxes.found(SandboxLimits(512 * MIB, 64 * MIB, 10_000), 2, tmp_path)


def text_of(view: EvaluationView) -> str:
    return json.dumps(dataclasses.asdict(view))


async def test_a_tree_is_evaluated_and_what_it_holds_is_submitted(farm: RemoteFarm) -> None:
    text = '{ name ? "x" }: { a = import ./sub.nix name; }'
    sub = 'name: derivation { inherit name; src = ./data; system = "x86_64-linux"; builder = "/bin/sh"; }'
    files: Files = {"default.nix": text, "sub.nix": sub, "data/file": "hello", "link": Path("data")}
    view = await farm.evaluate(files, argstrs=(("name", "told"),))
    assert (view.state, view.error, view.failed) == (EvaluationState.DONE, "", ())
    submission = await farm.client.submission(view.submission)
    assert [(root.attr, root.drv.endswith("-told.drv")) for root in submission.roots] == [("a", True)]


async def test_nothing_of_the_machine_can_be_read_and_the_rest_of_the_evaluation_goes_on(farm: RemoteFarm) -> None:
    state = farm.settings.state_dir
    own_tree = await farm.send(events({"default.nix": "{ }", "secret": SECRET}))
    bad = {
        "passwd": 'builtins.readFile "/etc/passwd"',
        "passwd-import": "import /etc/passwd",
        "passwd-literal": '"${/etc/passwd}"',
        "passwd-list": 'toString (builtins.attrNames (builtins.readDir "/etc"))',
        "token": f'builtins.readFile "{state}/api-token"',
        "token-literal": f"builtins.path {{ path = {state}/api-token; }}",
        "trees": f'toString (builtins.attrNames (builtins.readDir "{state}/remote-evaluation/trees"))',
        "other-tree": f'builtins.hashFile "sha256" "{state}/remote-evaluation/trees/{own_tree}.nar.zst"',
        "environment": 'builtins.readFile "/proc/self/environ"',
        "parent": "import ../../etc/passwd",
        "search-path": "import <nixpkgs>",
        "git": f'builtins.fetchGit "file://{state}"',
        "variable": '"${builtins.getEnv "DROVER_TEST_SECRET"}nothing"',
        "exec": 'builtins.exec [ "cat" "/etc/passwd" ]',
        "native": 'builtins.importNative ./x.so "f"',
        "import-from-derivation": f"import {DERIVATION % 'made'}",
    }
    good = DERIVATION % "good"
    attrs = "".join(f'{name} = builtins.throw "read: ${{{value}}}"; ' for name, value in bad.items())
    view = await farm.evaluate({"default.nix": f"{{ good = {good}; {attrs} }}"})
    assert view.state is EvaluationState.DONE
    assert [root.attr for root in (await farm.client.submission(view.submission)).roots] == ["good"]
    errors = {each.attr: each.error for each in view.failed}
    assert errors.keys() == bad.keys()
    # Only this one has a value, which is empty.
    assert errors.pop("variable") == "read: nothing"
    assert not [name for name, error in errors.items() if error.startswith("read: ")]
    assert FORBIDDEN in errors["passwd"]
    assert FORBIDDEN in errors["token"]
    assert SECRET not in text_of(view)


async def test_nothing_is_fetched_from_this_machine_or_from_a_metadata_service(tmp_path: Path) -> None:
    # A host is allowed, so that there is a way out at all.
    async with remote_farm(tmp_path, allowed_hosts=("localhost", "metadata.test"), allowed_schemes=("http",)) as farm:
        own = farm.coordinator.ready.url
        addresses = {
            "own": f"{own}/healthz",
            "named": own.replace("127.0.0.1", "localhost") + "/healthz",
            "allowed-name": "http://localhost/healthz",
            "metadata": "http://169.254.169.254/latest/meta-data/",
            "numbers": "http://2130706433/",
            "six": "http://[::1]/",
            "userinfo": "http://localhost@127.0.0.1/",
            "file": "file:///etc/passwd",
        }
        attrs = "".join(f'{name} = builtins.readFile (builtins.fetchurl "{url}"); ' for name, url in addresses.items())
        view = await farm.evaluate({"default.nix": f"{{ good = {DERIVATION % 'good'}; {attrs} }}"})
    assert view.state is EvaluationState.DONE
    errors = {each.attr: each.error for each in view.failed}
    assert errors.keys() == addresses.keys()
    assert [name for name, error in errors.items() if FORBIDDEN not in error] == ["allowed-name"]
    assert "unable to download" in errors["allowed-name"]


async def test_settings_in_a_tree_count_for_nothing(farm: RemoteFarm) -> None:
    conf = "allow-unsafe-native-code-during-evaluation = true\nrestrict-eval = false\nplugin-files = /work/tree/p.so\n"
    flake = (
        "{ nixConfig = { allow-unsafe-native-code-during-evaluation = true; restrict-eval = false; "
        'allow-import-from-derivation = true; plugin-files = "/work/tree/p.so"; }; '
        'outputs = _: { a = throw "exec: ${toString (builtins ? exec)}, ${builtins.getEnv "HOME"}"; '
        "b = builtins.readFile /etc/passwd; c = %s; }; }" % (DERIVATION % "good")
    )
    files: Files = {
        "flake.nix": flake,
        **dict.fromkeys(("nix.conf", ".config/nix/nix.conf", "etc/nix/nix.conf"), conf),
        ".git/config": "[core]\n\tfsmonitor = touch /work/tree/pwned\n",
    }
    views = [await farm.evaluate(files, file=f".#{attr}") for attr in "abc"]
    assert [view.state for view in views] == [EvaluationState.FAILED, EvaluationState.FAILED, EvaluationState.DONE]
    assert "exec: ,;" in views[0].error
    assert "restricted mode" in views[1].error or "pure" in views[1].error


#: Hours, in little memory.
LOOP = """
let
  l = builtins.genList (x: x) 1000;
  over = f: builtins.foldl' (a: x: f a x) 0 l;
in over (a: x: over (b: y: over (c: z: over (d: w: %s))))
"""


@pytest.mark.parametrize(
    ("expression", "memory_mib", "timeout_s", "says"),
    [
        # With more memory than the loop has garbage, so that it is the time which ends it.
        (LOOP % "d + w", 1024, 3, "the evaluation did not end within 3 s"),
        (LOOP % f'builtins.trace "{"x" * 9000}" (d + w)', 1024, 3, "the evaluation did not end within 3 s"),
        ("let f = x: f (x + 1); in f 0", 512, 0, "stack overflow"),
        ("let f = n: if n == 0 then [ 1 ] else f (n - 1) ++ f (n - 1); in f 40", 512, 0, "needs more than 384 MiB"),
    ],
    ids=["forever", "prints", "recursion", "memory"],
)
async def test_an_evaluation_without_end_ends_by_itself_and_another_goes_on(
    tmp_path: Path, expression: str, memory_mib: int, timeout_s: int, says: str
) -> None:
    async with remote_farm(tmp_path, memory_mib=memory_mib) as farm:
        bad = await farm.begin({"default.nix": expression}, timeout_s=timeout_s)
        other = await farm.evaluate({"default.nix": DERIVATION % "other"})
        assert other.state is EvaluationState.DONE
        ended = await farm.end(bad.id)
        assert ended.state is EvaluationState.FAILED
        assert says in ended.error
        # And its place is free again.
        assert (await farm.evaluate({"default.nix": DERIVATION % "after"})).state is EvaluationState.DONE


async def test_an_evaluation_is_ended_that_takes_longer_than_the_farm_lets_it(tmp_path: Path) -> None:
    async with remote_farm(tmp_path, timeout_s=3) as farm:
        bad = await farm.evaluate({"default.nix": LOOP % "d + w"})
        assert "took longer than 3 s" in bad.error


async def test_an_evaluation_waits_for_a_place_and_no_more_of_them_than_may(tmp_path: Path) -> None:
    async with remote_farm(tmp_path, at_once=1, waiting=1) as farm:
        runs = await farm.begin({"default.nix": LOOP % "d + w"})
        waits = await farm.begin({"default.nix": DERIVATION % "waits"})
        with pytest.raises(RefusedError, match="1 evaluations wait already"):
            await farm.begin({"default.nix": "{ }"})
        assert (await farm.client.cancel_evaluation(runs.id)).state is EvaluationState.CANCELLED
        assert (await farm.end(waits.id)).state is EvaluationState.DONE


async def submitted(farm: RemoteFarm, evaluation: str) -> EvaluationView:
    """Wait until an evaluation that goes on has a submission."""
    view = await farm.client.evaluation(evaluation)
    while not (view.submission or view.state.ended):
        view = await farm.client.evaluation(evaluation, view.state)
    return view


#: A root that is there at once, and one that never is.
STREAMS = f"{{ early = {DERIVATION % 'early'}; late = {LOOP % 'd + w'}; }}"


async def test_roots_are_submitted_while_the_rest_is_evaluated_with_all_terms(tmp_path: Path) -> None:
    terms = {"branch": "main", "pull": "7", "commit": "0f3a", "tags": {"job": "nightly"}, "priority": 3, "label": "x"}
    async with remote_farm(tmp_path) as farm:
        with pytest.raises(RefusedError, match="only a submission with a branch or a pull request supersedes"):
            await farm.begin({"default.nix": STREAMS}, supersede=True)
        begun = await farm.begin({"default.nix": STREAMS}, **terms, fail_fast=True, deadline_s=900, supersede=True)
        view = await submitted(farm, begun.id)
        assert (view.state, view.roots) == (EvaluationState.EVALUATING, 1)
        submission = await farm.client.submission(view.submission)
        assert {name: getattr(submission, name) for name in terms} == terms
        assert (submission.open, submission.fail_fast, submission.deadline_at > 0) == (True, True, True)
        assert (await farm.client.cancel_evaluation(begun.id)).state is EvaluationState.CANCELLED
        submission = await farm.client.submission(view.submission)
        assert (submission.open, submission.root_count) == (False, 1)
        assert submission.incomplete == "its evaluation was cancelled before all was evaluated"


async def test_an_evaluation_belongs_to_its_owner_and_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_TOKEN", "o" * 32)
    owner = OwnerSettings(name="other", tokens=("env:OTHER_TOKEN",))
    async with remote_farm(tmp_path, owner) as farm, ApiClient(farm.coordinator.ready.url, "o" * 32) as other:
        begun = await farm.begin({"default.nix": STREAMS}, idempotency_key="run-1")
        for attempt in (other.evaluation(begun.id), other.cancel_evaluation(begun.id)):
            with pytest.raises(RefusedError, match="there is no evaluation") as refused:
                await attempt
            assert refused.value.http_status == 404
        # A repeat is the one that goes on, of the same owner only; another wish is none.
        assert (await farm.begin({"default.nix": STREAMS}, idempotency_key="run-1")).id == begun.id
        with pytest.raises(RefusedError, match=f"'run-1' is that of evaluation {begun.id}") as refused:
            await farm.begin({"default.nix": STREAMS}, idempotency_key="run-1", attrs=("early",))
        assert refused.value.http_status == 409
        tree = await farm.send(events({"default.nix": STREAMS}))
        theirs = await other.evaluate(RemoteEvaluationRequest(tree=tree, file="default.nix", idempotency_key="run-1"))
        assert theirs.id != begun.id
        # The farm's own token does for all.
        assert (await farm.client.cancel_evaluation(theirs.id)).state is EvaluationState.CANCELLED
        first = await submitted(farm, begun.id)
    # The coordinator ends in the middle: its client begins again, and goes on in the same submission.
    async with remote_farm(tmp_path, owner) as farm:
        with pytest.raises(RefusedError, match="begin it again"):
            await farm.client.evaluation(begun.id)
        again = await farm.begin({"default.nix": STREAMS}, idempotency_key="run-1")
        assert (await submitted(farm, again.id)).submission == first.submission
        assert (await farm.client.submission(first.submission)).root_count == 1
        assert len(await farm.client.submissions()) == 1


def bomb() -> Iterator[bytes]:
    """Yield a frame of files of a megabyte of nothing without end, some 60 bytes each."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()

    def files() -> Iterator[NarEvent]:
        yield NarDirectory(b"")
        for number in range(10**7):
            yield NarFile(b"%07d" % number, False, MIB)
            yield NarData(bytes(MIB))

    for piece in write_events(files()):
        yield compressor.compress(piece) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def many(count: int) -> Iterator[NarEvent]:
    yield NarDirectory(b"")
    for number in range(count):
        yield NarFile(b"%07d" % number, False, 0)
    yield NarDirectoryEnd()


TREES = {
    "a symlink to a place": (events({"link": Path("/etc/passwd")}), "may lie outside of the tree"),
    "a symlink upwards": (events({"sub/link": Path("../../x")}), "may lie outside of the tree"),
    "a symlink over another": (events({"a/b/up": Path("../.."), "n": Path("a/b/up/../x")}), "may lie outside"),
    "control characters": (events({"a\x1b]0;owned\x07": ""}), "control character"),
    "a new line": (events({"a\nb": ""}), "control character"),
    "bytes": (events({"a\udcff": ""}), "control character"),
    "deep": (events({"/".join("d" * (MAX_DEPTH + 1)): ""}), "deeper than"),
    "long": (events({"/".join(["x" * 200] * 12): ""}), "has a path of more than"),
    "entries": (many(1_000_000), "more than 1000 files"),
}


async def test_a_hostile_tree_is_refused_by_a_sentence_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    async with remote_farm(tmp_path, tree_entries=1000, tree_mib=4) as farm:

        async def refused(frames: Iterable[bytes], name: str) -> str:
            with pytest.raises(RefusedError) as refusal:
                await farm.client.send_tree(name, in_thread(iter(frames)))
            assert (refusal.value.http_status, refusal.value.reason) == (422, "bad_tree")
            return str(refusal.value)

        for what, (nar_events, says) in TREES.items():
            assert says in await refused(compressed(write_events(nar_events)), "0" * 64), what
        assert "more than 4194304 bytes" in await refused(bomb(), "0" * 64)
        good = b"".join(write_events(events({"a": "b"})))
        whole, name = b"".join(compressed([good])), hashlib.sha256(good).hexdigest()
        assert "not the one that it is named" in await refused([whole], "0" * 64)
        assert "cut short" in await refused([whole[:-5]], name)
        assert "something follows" in await refused([whole, b"more"], name)
        assert "not valid zstd" in await refused([b"nonsense"], name)
        assert "is no NAR" in await refused(compressed([b"nonsense" * 100]), name)
        assert "single file" in await refused(compressed(write_events([NarFile(b"", False, 0)])), name)
        assert not list((farm.settings.state_dir / "remote-evaluation" / "trees").iterdir())
        with pytest.raises(RefusedError) as refusal:
            await farm.client.send_tree("../../api-token", in_thread(iter([whole])))
        assert refusal.value.http_status in {400, 404}
        assert (await farm.evaluate({"default.nix": DERIVATION % "after"})).state is EvaluationState.DONE


async def in_sandbox(sandboxes: Sandboxes, script: str, slot: int = 0) -> str:
    done = await run(
        sandboxes.command(slot, ["sh", "-c", script]), env=ENVIRONMENT, timeout_s=PATIENCE_S, max_output_bytes=MIB
    )
    return (done.stdout + done.stderr).decode(errors="replace")


async def test_an_evaluator_that_is_taken_over_sees_and_reaches_nothing(
    sandboxes: Sandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROVER_TEST_SECRET", SECRET)
    (tmp_path / "api-token").write_text(SECRET)
    said = await in_sandbox(
        sandboxes,
        f"cat {tmp_path}/api-token; ls {tmp_path}; cat /etc/shadow; env; cat /proc/*/environ; ls /root /home; "
        "echo processes $(ls /proc | grep -c '^[0-9]'); echo user $(id -u); grep -E 'CapEff|NoNewPrivs|Seccomp:' "
        "/proc/self/status; unshare -Ur true; mount -t tmpfs x /tmp; echo x > /usr/bin/x; echo x > /etc/passwd; "
        "ls -A /dev; wc -l < /proc/net/route",
    )
    assert SECRET not in said
    words = " ".join(said.split())
    assert "CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2" in words
    assert "unshare failed: Operation not permitted" in words
    assert "cannot create /usr/bin/x: Read-only file system" in words
    assert "full null random urandom zero" in words
    # `sh`, its substitution and `ls`, and the first process.
    assert "processes 5" in words or "processes 4" in words
    assert f"user {sandboxes.uid(0) or 1000} " in words


async def test_no_socket_of_a_family_that_namespaces_do_not_confine(sandboxes: Sandboxes) -> None:
    script = (
        f"{sys.executable} -I -S -c 'import socket\n"
        "for family in (16, 17, 38, 40):\n"
        "    try: socket.socket(family, socket.SOCK_DGRAM if family == 16 else socket.SOCK_STREAM)\n"
        "    except OSError as error: print(family, error.errno)\n"
        "'"
    )
    assert (await in_sandbox(sandboxes, script)).split() == ["16", "97", "17", "97", "38", "97", "40", "97"]


@pytest.mark.parametrize(
    "script",
    [
        "kill -9 -1; kill -9 1; exit 3",
        ":(){ :|:& };:; b() { b | b & }; b; wait",
        "cat /dev/zero > /work/fill; i=0; while [ $i -lt 20000 ]; do : > /work/$i || exit 3; i=$((i+1)); done",
        f"{sys.executable} -I -S -c 'x = [bytearray(64 * 2**20) for _ in range(1000)]'",
        "yes >&2",
        "yes",
    ],
    ids=["kills", "forks", "fills", "eats", "complains", "talks"],
)
async def test_an_evaluator_that_is_taken_over_harms_no_other(sandboxes: Sandboxes, script: str) -> None:
    """The other one answers before and after, so it lived through it."""
    async with running(sandboxes.command(1, ["cat"]), 512 * MIB, 60.0) as other:
        await other.send(FrameKind.MESSAGES, b"before")
        assert await other.receive() == (FrameKind.MESSAGES, b"before")
        with pytest.raises((RemoteFailedError, BadFrameError)):
            async with running(sandboxes.command(0, ["bash", "-c", script]), 512 * MIB, 8.0) as bad:
                await bad.receive()
        await other.send(FrameKind.MESSAGES, b"after")
        assert await other.receive() == (FrameKind.MESSAGES, b"after")


@pytest.mark.parametrize("dumb", [False, True], ids=["smart", "dumb"])
async def test_a_revision_of_an_allowed_git_server_is_evaluated_without_its_filters_and_hooks(
    tmp_path: Path, dumb: bool
) -> None:
    repository = tmp_path / "repositories" / "one"
    files = {
        "default.nix": '{ a = derivation { name = builtins.readFile ./name; src = ./sub; system = "x86_64-linux"; '
        'builder = "/bin/sh"; }; }',
        "name": "wanted",
        "sub/x-1": "",
        "sub-1/y": "",
        ".gitattributes": "name filter=evil\n",
    }
    wanted = commit(repository, files)
    commit(repository, {"name": "later"})
    git(repository, "update-server-info")
    with serving_git(tmp_path / "repositories", dumb=dumb) as port:
        hosts = {"allowed_hosts": (f"localhost:{port}",), "allowed_schemes": ("http",)}
        async with remote_farm(tmp_path, **hosts, network_allow=("127.0.0.1/32", "::1/128")) as farm:

            async def evaluated(**ask: str) -> EvaluationView:
                view = await farm.client.evaluate(RemoteEvaluationRequest(file="default.nix", **ask))
                return await farm.end(view.id)

            url = f"http://localhost:{port}/one/.git"
            view = await evaluated(git=url, rev=wanted)
            assert (view.state, view.error) == (EvaluationState.DONE, "")
            submission = await farm.client.submission(view.submission)
            assert [root.drv.endswith("-wanted.drv") for root in submission.roots] == [True]
            missing = await evaluated(git=url, rev="0123456789012345678901234567890123456789")
            assert missing.state is EvaluationState.FAILED
            assert "0123456789012345678901234567890123456789" in missing.error
            absent = await evaluated(git=f"http://localhost:{port}/two", rev="main")
            assert "main of http://localhost" in absent.error
            for refused, says in {
                f"http://127.0.0.1:{port}/one": "does not fetch from 127.0.0.1",
                f"http://me:secret@localhost:{port}/one": "has a name or password",
                f"file://{repository}": "by http only",
                "ssh://localhost/one": "by http only",
                "ext::sh -c x": "by http only",
                f"http://localhost:{port}/one --upload-pack=x": "blanks",
            }.items():
                with pytest.raises(RefusedError, match=says):
                    await evaluated(git=refused, rev="main")


async def test_a_tracked_branch_with_a_flake_is_evaluated_in_the_sandbox_and_nothing_of_it_is_submitted(
    tmp_path: Path,
) -> None:
    def flake(tool: str) -> dict[str, str]:
        return {"flake.nix": "{ outputs = _: { packages.x86_64-linux.tool = " + tool + "; }; }"}

    repository = tmp_path / "repositories" / "one"
    lock = json.dumps({"nodes": {"root": {}}, "root": "root", "version": 7})
    first = commit(repository, {**flake(DERIVATION % "one"), "flake.lock": lock})
    with serving_git(tmp_path / "repositories") as port:
        host = f"localhost:{port}"
        tracked = EnvironmentSettings(git_hosts=(host,), git_schemes=("http",))
        remote = {"allowed_hosts": (host,), "allowed_schemes": ("http",), "network_allow": ("127.0.0.1/32", "::1/128")}
        track = TrackRequest(kind="git", url=f"http://{host}/one/.git", ref="main", system="x86_64-linux")
        async with remote_farm(tmp_path, None, tracked, **remote) as farm:
            view = await farm.client.track("dev", track)
            assert [(each.number, each.mark) for each in view.revisions] == [(1, first)]
            assert await made(farm, "dev", 1) == ["one"]
            assert await farm.client.submissions() == []
            # One that cannot be evaluated changes nothing.
            commit(repository, flake('throw "torn"'))
            with pytest.raises(RefusedError, match=r"cannot be evaluated: .*torn"):
                await farm.client.look("dev")


async def made(farm: RemoteFarm, environment: str, revision: int) -> list[str]:
    """Return the names of what a revision of an environment consists of."""
    url = f"sqlite+aiosqlite:///{farm.settings.state_dir}/environments.sqlite3"
    store = EnvironmentStore.open(url, FencingToken(0, 0))
    content = (await store.contents(environment, [revision]))[revision]
    await store.close()
    return [path.partition("-")[2] for path in content.paths]


async def test_an_allowed_host_that_means_a_private_address_is_not_reached(tmp_path: Path) -> None:
    with serving_git(tmp_path) as port:
        hosts = {"allowed_hosts": (f"localhost:{port}",), "allowed_schemes": ("http",)}
        async with remote_farm(tmp_path, **hosts) as farm:
            ask = RemoteEvaluationRequest(git=f"http://localhost:{port}/one", rev="main", file="default.nix")
            view = await farm.end((await farm.client.evaluate(ask)).id)
    assert view.state is EvaluationState.FAILED
    assert "cannot be fetched" in view.error


PROBE = """
import subprocess, sys
from pathlib import Path
from coordinator.errors import CoordinatorError
from coordinator.remote_evaluation.sandboxes import ENVIRONMENT, Sandboxes, SandboxLimits
try:
    found = Sandboxes.found(SandboxLimits(2**29, 2**26, 10000), 1, Path(sys.argv[1]))
except CoordinatorError as error:
    sys.exit(str(error))
print(subprocess.run(found.command(0, ["sh", "-c", sys.argv[2]]), env=ENVIRONMENT).returncode)
"""


def test_an_ordinary_user_has_the_sandbox_where_there_are_user_namespaces(tmp_path: Path) -> None:
    user = OrdinaryUser(tmp_path)
    script = (
        f"id -u; ls {user.home}; kill -9 {os.getpid()}; grep CapEff /proc/self/status; nix --version; unshare -Ur true"
    )
    done = user.run(sys.executable, "-c", PROBE, user.home, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "CapEff:", "0000000000000000", "nix", "(Nix)", "2.8.0", "1"]
    assert "No such file or directory" in done.stderr
    assert "unshare failed: Operation not permitted" in done.stderr
    none = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ("unshare", "-U", "--map-current-user", "--keep-caps", "sh", "-c", none, "sh")
    refused = user.run(*command, sys.executable, "-c", PROBE, user.home, "true")
    assert refused.returncode == 1
    assert re.fullmatch(
        "remote evaluation is off: this machine refuses the namespaces of a sandbox: .*; run the coordinator as root, "
        "or allow user namespaces to its user.",
        refused.stderr.strip(),
    )


async def test_it_is_off_until_the_operator_switches_it_on(tmp_path: Path) -> None:
    async with remote_farm(tmp_path, enabled=False) as farm:
        for attempt in (
            farm.send(events({"a": ""})),
            farm.client.evaluate(RemoteEvaluationRequest(tree="0" * 64, file="a")),
        ):
            with pytest.raises(RefusedError, match="switches it on with `enabled = true` in") as refusal:
                await attempt
            assert refusal.value.reason == "remote_off"
