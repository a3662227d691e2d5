"""`drover build --remote` on a real farm: a working tree with changes, a revision of a git server, errors, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.process_tree import Process, process_tree, still_alive
from tests.e2e.conftest import BUSYBOX
from tests.support.farm import Farm, WorkerSpec
from tests.support.git_server import commit, git, serving_git
from tests.support.patience import PATIENCE_S
from tests.support.processes import processes_with

pytestmark = pytest.mark.e2e

SETTINGS = """
[remote_evaluation]
enabled = true
at_once = 2
memory_mib = 1024
allowed_hosts = ["localhost:%d"]
allowed_schemes = ["http"]
network_allow = ["127.0.0.1/32", "::1/128"]
"""
BUILD = """
{ name ? "plain" }:
let
  build = name: script: derivation {
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/bin"; src = ./sub;
  };
in {
  text = build name "echo made of $(cat $src/text); echo > $out";
  broken = throw "not this one";
  misspelt = { text = 1; }.txet;
  forever = let l = builtins.genList (x: x) 1000000; in
    builtins.foldl' (a: x: builtins.foldl' (b: y: b + y) a l) 0 l;
}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("served") / "one"
    commit(repository, {"nix/default.nix": BUILD, "nix/sub/text": "the-commit"})
    return repository


@pytest.fixture(scope="module")
def port(repository: Path) -> Iterator[int]:
    with serving_git(repository.parent) as port:
        yield port


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Farm]:
    worker = WorkerSpec("one", slots=2, nix_options=BUSYBOX)
    farm = Farm(tmp_path_factory.mktemp("remote"), [worker], settings=SETTINGS % port)
    try:
        farm.start().wait_for_workers(1)
        yield farm
    finally:
        farm.stop()
        farm.clear()


def built(farm: Farm, *arguments: str | Path) -> tuple[int, str, str]:
    """Build remotely; returns the status, what was said, and the log of the root."""
    done = farm.drover("build", "--remote", *arguments, "--json")
    said = done.stdout + done.stderr
    if not done.stdout.strip():
        return done.returncode, said, ""
    root = json.loads(done.stdout)["roots"][0]
    return done.returncode, said, farm.drover("log", root["step"]).stdout


def test_a_working_tree_is_built_as_it_stands(farm: Farm, repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", str(repository), "clone")
    clone = tmp_path / "clone"
    (clone / "nix/sub/text").write_text("not-committed-yet")
    (clone / "untracked").write_text("")
    status, said, log = built(farm, clone / "nix", "-A", "text", "--argstr", "name", "dirty")
    assert (status, "made of not-committed-yet" in log) == (0, True), said
    assert "1 files are not sent, because git does not track them" in said
    assert "sent 2 files of" in said
    # The same tree again is there already.
    status, said, _ = built(farm, clone / "nix", "-A", "text")
    assert (status, "sent 2 files of" in said) == (0, False), said


def test_a_revision_is_built_from_its_git_server(farm: Farm, repository: Path, port: int) -> None:
    rev = git(repository, "rev-parse", "HEAD")
    url = f"http://localhost:{port}/one/.git"
    status, said, log = built(farm, "--git", url, "--rev", rev, "nix", "-A", "text")
    assert (status, "made of the-commit" in log) == (0, True), said


def test_what_cannot_be_evaluated_is_said_and_the_rest_is_built(farm: Farm, repository: Path, tmp_path: Path) -> None:
    status, said, _ = built(farm, repository / "nix/default.nix", "-A", "text", "-A", "broken")
    assert status == 3, said
    assert "broken cannot be evaluated: not this one" in said
    # A throw has no place in Nix 2.8; what has one keeps it, by its name in the tree.
    status, said, _ = built(farm, repository / "nix/default.nix", "-A", "text", "-A", "misspelt")
    assert (status, '"position":"nix/default.nix:10:' in said) == (3, True), said
    status, said, _ = built(farm, repository / "nix", "-A", "nothing")
    assert (status, "attribute 'nothing' in selection path 'nothing' not found" in said) == (3, True), said
    status, said, _ = built(farm, "--git", "https://elsewhere.test/one", "--rev", "main", "nix")
    assert (status, "by http only" in said) == (2, True), said
    (tmp_path / "default.nix").write_text("{ }")
    status, said, _ = built(farm, tmp_path / "default.nix")
    assert (status, "lies in no git repository" in said) == (2, True), said


FLAKE = """
{
  inputs = {
    lib.url = "git+http://localhost:%d/lib/.git?ref=main";
    sub.url = "path:./sub";
    other.url = "git+http://127.0.0.1:%d/other/.git?ref=main";
  };
  outputs = { self, lib, sub, other }: {
    checks.x86_64-linux.a = lib.make "a" sub.text;
    checks.x86_64-linux.b = lib.make "b" other.text;
    packages.x86_64-linux.a = self.checks.x86_64-linux.a;
  };
}
"""
LIB = """
{ outputs = _: { make = name: text: derivation {
  inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo ${text}; echo > $out" ];
}; }; }
"""


def test_a_flake_is_built_with_its_locked_inputs(farm: Farm, repository: Path, port: int) -> None:
    served = repository.parent
    commit(served / "lib", {"flake.nix": LIB})
    commit(served / "other", {"flake.nix": '{ outputs = _: { text = "of-the-other"; }; }'})
    flake = served / "flake"
    commit(flake, {"flake.nix": FLAKE % (port, port), "sub/flake.nix": '{ outputs = _: { text = "of-the-sub"; }; }'})
    status, said, _ = built(farm, f"{flake}#checks")
    assert (status, "it has no flake.lock: make it with `nix flake lock`" in said) == (3, True), said
    words = ("--extra-experimental-features", "nix-command flakes", "flake", "lock", "--store", served / "store")
    subprocess.run(["nix", *words, flake], check=True, capture_output=True, timeout=PATIENCE_S)
    commit(flake, {})
    status, said, log = built(farm, f"{flake}#a")
    assert (status, "of-the-sub" in log) == (0, True), said
    # The host of the third input is none that is allowed, and costs the first two nothing.
    status, said, log = built(farm, f"{flake}#checks")
    assert (status, "of-the-sub" in log) == (3, True), said
    assert f"checks.x86_64-linux.b cannot be evaluated: access to URI 'http://127.0.0.1:{port}/other/.git'" in said
    assert f"this farm does not fetch from 127.0.0.1:{port}; ask its operator" in said


def test_an_interrupted_evaluation_goes_on_and_can_be_watched_and_ended(farm: Farm, repository: Path) -> None:
    command = farm.command("build", "--remote", repository / "nix", "-A", "forever")
    client = subprocess.Popen(
        command, env=farm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert client.stdout is not None
    for line in client.stdout:
        if "the coordinator evaluates" in line:
            break
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 130
    assert "the coordinator goes on evaluating" in said
    found = re.search(r"drover cancel (eval-[0-9a-f]+)", said)
    assert found is not None, said
    assert farm.api(f"evaluations/{found[1]}")["state"] == "evaluating"
    ended = farm.drover("cancel", found[1])
    assert (ended.returncode, ended.stdout) == (0, f"cancelled {found[1]}; nothing of it is submitted\n")
    watched = farm.drover("watch", found[1])
    assert (watched.returncode, "was cancelled" in watched.stderr) == (3, True), watched.stderr


def evaluators(farm: Farm) -> set[Process]:
    """Return the programs of a farm's evaluations. Farms of other tests, which run beside this one, have such too."""
    of_all = set(processes_with("coordinator.remote_evaluation.program"))
    return {process for process in process_tree(farm.pid) if process.pid in of_all}


def test_a_coordinator_that_is_killed_in_the_middle_leaves_nothing_and_the_client_goes_on(
    farm: Farm, repository: Path
) -> None:
    known = {view["id"] for view in farm.api("submissions")}
    command = farm.command("build", "--remote", repository / "nix", "-A", "text", "-A", "forever")
    client = subprocess.Popen(
        command, env=farm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert client.stdout is not None
    said = ""
    for line in client.stdout:
        said += line
        if "what it has found is built already" in line:
            break
    before = evaluators(farm)
    assert before, said
    farm.kill()
    farm.start().wait_for_workers(1)
    assert not still_alive(before)
    trees = (farm.state / "remote-evaluation" / "trees").glob("new-*")
    assert list(trees) == []
    for line in client.stdout:
        said += line
        if "what it has found is built already" in line:
            break
    assert "the coordinator has started anew and knows the evaluation no more; it begins again" in said
    # One submission, which is open still.
    [view] = [view for view in farm.api("submissions") if view["id"] not in known]
    assert (view["open"], view["root_count"]) == (True, 1)
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=PATIENCE_S)
    found = re.search(r"drover cancel (eval-[0-9a-f]+)", errors)
    assert found is not None, errors
    ended = farm.drover("cancel", found[1])
    assert f"what it found is built: drover cancel {view['id']}" in ended.stdout
    assert farm.drover("wait", view["id"]).returncode == 3
