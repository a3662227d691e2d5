"""Bisections of a package set's history on a farm: what is evaluated, built, known, interrupted and refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import BUSYBOX, waiting_for
from tests.support.farm import Farm, nix_store
from tests.support.package_set import PackageSet
from tests.support.patience import PATIENCE_S

Change = Callable[[PackageSet], None]
COMMITS = 40
#: What a commit's evaluation imports, which is null as that of the others.
IMPORTED = """import (derivation {
  name = "imported-null"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo null > $out" ]; })"""


class History:
    """Forty commits after the first, of which every other one changes `git`; it fails from one on, which imports."""

    def __init__(self, directory: Path, *, bad: int, broken: tuple[int, ...] = (), before: str = "") -> None:
        """`broken` commits do not evaluate; `before` is a shell line of good builds, but for the first commit's."""
        self.packages = PackageSet(directory / "set")
        self.line = [self.packages.first]
        for number in range(1, COMMITS + 1):
            if number % 2:
                self.packages.touch("git", f"commit {number}")
            if number == 1 and before:
                self.packages.edit("git", script=before)
            if number == bad:
                self.packages.fail("git", "no rule to make target")
            forced = IMPORTED if number == bad else "null"
            forced = f'throw "git is broken by {number}"' if number in broken else forced
            self.packages.edit("git", forced=forced)
            self.line.append(self.packages.commit(f"commit {number}"))

    def command(self, farm: Farm, *arguments: str, good: str = "", bad: str = "", attr: str = "git") -> list[str]:
        ends = ("--good", good or self.line[0], "--bad", bad or self.line[-1])
        return farm.command(
            "bisect", self.packages.file, "-A", attr, *ends, "--store", farm.eval_store, "--json", *arguments
        )

    @property
    def state(self) -> Path:
        return self.packages.directory / ".git/drover-bisect.json"


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    directory = tmp_path / "temporary"
    directory.mkdir()
    return directory


@pytest.fixture
def bisect(farm: Farm, temporary: Path) -> Iterator[Callable[[list[str]], subprocess.CompletedProcess[str]]]:
    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**farm.environment, "TMPDIR": str(temporary)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    yield run
    assert list(temporary.iterdir()) == []


def builds_of(farm: Farm, document: dict[str, Any]) -> list[int]:
    """Return how often each tested derivation was built."""
    return [len(farm.begun(each["step"])) for each in document["tested"]]


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_the_first_bad_commit_of_forty_is_found_with_few_builds_and_what_the_farm_knows_is_not_built(
    farm: Farm, tmp_path: Path, bisect: Callable[[list[str]], subprocess.CompletedProcess[str]]
) -> None:
    history = History(tmp_path, bad=27, broken=(20, 25))
    # Both ends are known before: one in the cache, one to fail.
    assert farm.build(history.packages.file, "-A", "git").returncode == 1
    history.packages.git("checkout", "-q", history.line[0])
    assert farm.build(history.packages.file, "-A", "git").returncode == 0
    history.packages.git("checkout", "-q", "main")
    done = bisect(history.command(farm))
    assert done.returncode == 0, done.stderr
    found = answer_of(done)
    assert found["first_bad"]["revision"] == history.line[27]
    assert found["first_bad"]["subject"] == "commit 27"
    assert "imported by the evaluation of git" in {view["label"] for view in farm.api("submissions")}
    assert found["first_bad"]["author"] == "Ada <ada@example.org>"
    assert found["last_good"]["revision"] == history.line[26]
    assert found["untestable_before_it"] == []
    assert set(found["not_evaluated"]) <= {history.line[20], history.line[25]}
    assert (found["cached"], found["known"]) == (1, 1)
    # Twenty-two derivations stand behind the commits.
    assert 1 <= found["built"] <= 12
    assert found["built"] + 2 == len(found["tested"])
    assert builds_of(farm, found) == [1] * len(found["tested"])
    assert found["evaluated"] < len(history.line)
    # The commit changed the comment and the script of its one package.
    [cause] = found["difference"]["causes"]
    assert cause["way"] == []
    assert {change["field"] for change in cause["changes"]} <= {"argument", "environment"}
    assert "exit" in found["why"]
    assert not history.state.exists()
    # All is known now; the answer for people has the same commit and what differs.
    again = bisect([word for word in history.command(farm) if word != "--json"])
    assert again.returncode == 0, again.stderr
    assert f"first bad commit: {history.line[27]}" in again.stdout
    assert "0 derivations built" in again.stdout
    assert "environment comment" in again.stdout


def test_a_bisection_that_is_interrupted_goes_on_with_the_same_command(
    farm: Farm,
    gates: Path,
    tmp_path: Path,
    temporary: Path,
    bisect: Callable[[list[str]], subprocess.CompletedProcess[str]],
) -> None:
    history = History(tmp_path, bad=33, before=waiting_for("bisect"))
    command = history.command(farm)
    environment = {**farm.environment, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while sum(each["label"].startswith("bisect git") for each in running(farm)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Another one at the same time would do the same work.
        other = bisect_refused(command, environment)
        assert "another drover bisect uses" in other
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert f"what is known is in {history.state}: the same command goes on" in said
    assert list(temporary.iterdir()) == []
    before = json.loads(history.state.read_text())
    refused = bisect(history.command(farm, "--until", "differs"))
    assert refused.returncode == 2
    assert f"{history.state} is of another bisection, of git from {history.line[0][:12]} to " in refused.stderr
    (gates / "bisect").touch()
    done = bisect(command)
    assert done.returncode == 0, done.stderr
    found = answer_of(done)
    assert found["first_bad"]["revision"] == history.line[33]
    assert f"going on with {len(before['evaluated'])} evaluations" in done.stderr
    assert found["evaluated"] + len(before["evaluated"]) <= len(history.line)
    assert builds_of(farm, found) == [1] * len(found["tested"])
    assert not history.state.exists()


def running(farm: Farm) -> list[dict[str, Any]]:
    return [each for each in farm.api("submissions") if each["state"] == "running"]


def bisect_refused(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    return done.stderr


def test_commits_that_cannot_be_tested_before_the_first_bad_one_leave_a_range_that_says_so(
    farm: Farm, tmp_path: Path, bisect: Callable[[list[str]], subprocess.CompletedProcess[str]]
) -> None:
    history = History(tmp_path, bad=14, broken=(12, 13))
    done = bisect([word for word in history.command(farm) if word != "--json"])
    assert done.returncode == 3, done.stderr
    assert f"first bad commit: {history.line[14]}, or one of 2 before it that cannot be tested" in done.stdout
    assert history.line[12] in done.stdout
    assert "git is broken by 13" in done.stdout


def test_what_cannot_be_meant_is_one_sentence(
    farm: Farm, tmp_path: Path, bisect: Callable[[list[str]], subprocess.CompletedProcess[str]]
) -> None:
    history = History(tmp_path, bad=2, broken=(40,))
    shallow = tmp_path / "shallow"
    history.packages.git("clone", "-q", "--depth=1", f"file://{history.packages.directory}", str(shallow))

    def refusal(*arguments: str, **ends: str) -> str:
        done = bisect(history.command(farm, *arguments, **ends))
        assert done.returncode in {2, 3}
        assert not history.state.exists()
        [line] = [line for line in done.stderr.splitlines() if line.startswith("drover: ")]
        return line

    assert "has no revision 'nothing'" in refusal(good="nothing")
    assert "is no ancestor of the bad one" in refusal(good=history.line[9], bad=history.line[3])
    assert "are the same" in refusal(bad=history.line[0])
    assert f"the bad commit {history.line[40][:12]} cannot be tested: " in (said := refusal())
    assert "git is broken by 40" in said
    assert "'nothing' not found" in refusal(attr="nothing", bad=history.line[3])
    assert "is a set of several derivations" in refusal(attr="perlPackages", bad=history.line[3])
    assert f"the bad commit {history.line[1][:12]} is not bad: it is built" in refusal(bad=history.line[1])
    assert "have the same derivation" in refusal(good=history.line[3], bad=history.line[4])
    history.packages.write("README", "not committed")
    command = history.command(farm, bad=history.line[3])
    command[2] = str(shallow / "default.nix")
    assert "shallow clone" in bisect(command).stderr
    done = bisect(history.command(farm, bad=history.line[3]))
    assert done.returncode == 0
    assert done.stderr.count("changes of the working tree that are not committed") == 1


_KINDS = """
{ comment, text, seconds }: derivation {
  name = "kind"; system = "x86_64-linux"; builder = "/bin/sh"; salt = "%s";
  args = [ "-c" "sleep ${seconds}; echo ${text} $out > $out" ];
  inherit comment;
} // { meta.timeout = 20; }
"""


def test_the_first_commit_that_differs_is_slower_or_takes_too_long_is_found(
    farm: Farm, tmp_path: Path, bisect: Callable[[list[str]], subprocess.CompletedProcess[str]]
) -> None:
    """What is in the cache and was never built here is measured by a variant of it.

    Of the times a busy machine may take a second or two that are not the builder's.
    """
    packages = PackageSet(tmp_path / "set")
    packages.write("kind.nix", _KINDS % tmp_path)
    seconds = [*["1"] * 5, *["12"] * 2, "1000", "1000"]
    line = []
    for number, each in enumerate(seconds):
        text = "second" if number >= 3 else "first"
        call = f'import ./kind.nix {{ comment = "{number}"; text = "{text}"; seconds = "{each}"; }}'
        packages.write("default.nix", call)
        line.append(packages.commit(f"commit {number}"))
    # As if from another farm.
    packages.git("checkout", "-q", line[0])
    path = built_elsewhere(farm, packages.file)
    packages.git("checkout", "-q", "main")
    pushed = farm.drover("cache", "push", path, "--store", farm.eval_store)
    assert pushed.returncode == 0, pushed.stderr
    expected = {"differs": (4, 3), "slower": (6, 5), "timed-out": (8, 7)}
    why = ""
    for until, (bad, first) in expected.items():
        ends = ("--good", line[0], "--bad", line[bad], "--until", until, "--factor", "4")
        done = bisect(farm.command("bisect", packages.file, *ends, "--store", farm.eval_store, "--json"))
        assert done.returncode == 0, done.stderr
        found = answer_of(done)
        assert found["first_bad"]["revision"] == line[first], done.stderr
        assert ("building a variant to measure it" in done.stderr) == (until == "slower")
        why = found["why"]
    assert why.startswith("kind failed: ")


def built_elsewhere(farm: Farm, file: Path) -> str:
    """Build on this machine, in the store that the client evaluates into; return the output."""
    instantiate = ["nix-instantiate", "--store", str(farm.eval_store), str(file)]
    drv = subprocess.run(instantiate, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout.strip()
    done = nix_store(farm.eval_store, "-r", drv, options={"sandbox": "true", **BUSYBOX})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
