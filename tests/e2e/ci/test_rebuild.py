"""`drover rebuild` on a real farm: a mass rebuild is compared, built and reported; what cannot be compared is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.support.farm import Farm
from tests.support.package_set import DATA, ROOT, Package, PackageSet
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

SYSTEMS = "x86_64-linux,aarch64-darwin"
#: What a builder says so that a report would mention people, link, and end its own log.
NASTY = "no rule to make target </pre> @everyone https://evil.example ::error::x"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> PackageSet:
    """The set, and a head that changes the root, breaks one package and adds and removes one."""
    packages = PackageSet(tmp_path_factory.mktemp("rebuild") / "set")
    packages.change(ROOT, "second")
    packages.fail("app07", NASTY)
    packages.remove("app20")
    packages.put(Package("app21", (ROOT, "app01")))
    packages.commit("the mass rebuild")
    return packages


def rebuild(
    farm: Farm, *arguments: str | Path, cwd: Path | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        farm.command("rebuild", *arguments),
        env={**farm.environment, **(variables or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def attrs(report: dict[str, Any], **fields: str) -> set[str]:
    return {each["attr"] for each in report["attributes"] if all(each[name] == value for name, value in fields.items())}


def test_a_mass_rebuild_is_foreseen_built_and_reported_in_every_form(
    farm: Farm, packages: PackageSet, tmp_path: Path
) -> None:
    common = (packages.file, "--base", packages.first, "--systems", SYSTEMS, "--store", farm.eval_store)
    dry = rebuild(farm, *common, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    foreseen = report_of(dry)
    # One changed root is one line, although it changes everything for two systems.
    (first, *others) = foreseen["causes"]["causes"]
    assert (first["names"], first["reach"]) == ([f"{ROOT}-1.0"], 2 * 61)
    assert [cause["names"] for cause in others] == [["app07-1.0"]]
    size = foreseen["forecast"]
    assert (size["steps"], size["cached"], size["unknown"] <= size["steps"]) == (2 * 62, 0, True)
    assert {each["system"]: each["steps"] for each in size["systems"]} == {"x86_64-linux": 62, "aarch64-darwin": 62}
    assert not foreseen["is_built"]

    files = {name: tmp_path / name for name in ("markdown", "junit", "summary")}
    written = [word for name, path in files.items() for word in (f"--{name}", path)]
    done = rebuild(farm, *common, "--json", *written)
    assert done.returncode == 1, done.stderr
    report = report_of(done)
    both = {f"{system}.{name}" for system in SYSTEMS.split(",") for name in ("app07",)}
    assert attrs(report, verdict="newly failing") == both
    assert attrs(report, content="no-op") == {f"{system}.{name}" for system in SYSTEMS.split(",") for name in DATA}
    assert attrs(report, change="added") == {f"{system}.app21" for system in SYSTEMS.split(",")}
    assert attrs(report, change="removed") == {f"{system}.app20" for system in SYSTEMS.split(",")}
    really = attrs(report, content="different")
    assert len(really) == 2 * (61 - 1 - len(DATA))
    assert f"x86_64-linux.{ROOT}" in really
    assert [cause["name"] for cause in report["failures"]] == ["app07-1.0"] * 2
    assert NASTY in report["failures"][0]["log_tail"]

    text = done.stderr
    assert "2 newly failing, 0 fixed" in text
    assert "no-op rebuilds: aarch64-darwin.fonts, aarch64-darwin.icons" in text
    assert f'122 attributes  {ROOT}-1.0: environment text "{ROOT}: first" → "{ROOT}: second"' in text

    page = files["markdown"].read_text()
    assert page == files["summary"].read_text()
    assert len(page.encode()) <= 65_000
    assert "**2 newly failing, 0 fixed" in page
    assert "### Newly failing: 2 attributes, 2 root causes" in page
    assert "No-op rebuilds: 8 attributes" in page
    assert page.count("</pre>") == page.count("<pre>")
    assert "@everyone" not in page.replace("no rule to make target &lt;/pre&gt; @everyone", "")

    suites = ET.fromstring(files["junit"].read_text())  # noqa: S314 - our own
    assert {suite.get("name"): suite.get("failures") for suite in suites} == {
        "x86_64-linux": "1",
        "aarch64-darwin": "1",
    }

    # The same from the two submissions, and of the runner's own summary; another look builds nothing.
    ids = ("--base-submission", report["base"]["submission"], "--head-submission", report["head"]["submission"])
    again = rebuild(farm, *ids, "--json", "--only", "app*", variables={"GITHUB_STEP_SUMMARY": str(tmp_path / "job")})
    assert again.returncode == 1, again.stderr
    later = report_of(again)
    assert attrs(later, verdict="newly failing") == both
    assert later["causes"]["causes"][0]["names"] == [f"{ROOT}-1.0"]
    assert "newly failing" in (tmp_path / "job").read_text()


def test_a_fix_is_built_alone_and_a_subset_is_chosen_by_name_maintainer_and_dependents(
    farm: Farm, packages: PackageSet, tmp_path: Path
) -> None:
    broken = packages.git("rev-parse", "HEAD")
    packages.fix("app07")
    packages.touch("zlib", "a comment")
    head = packages.commit("fix app07, and touch zlib")
    common = (packages.file, "--base", broken, "--head", head, "--store", farm.eval_store, "--json")
    chosen = {
        ("--only", "app0*"): {f"app0{n}" for n in range(1, 10)},
        ("--regex", "^perlPackages.[cd]"): {"perlPackages.carp", "perlPackages.dbi"},
        ("--maintainer", "BOB"): {"git"},
        ("--at-most-dependents", "0", "--only", "[a-k]*"): {"git", *(f"app{n:02}" for n in (*range(2, 20), 21))},
    }
    for words, expected in chosen.items():
        done = rebuild(farm, *common, *words, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert attrs(report_of(done)) == expected, words
    files = [tmp_path / name for name in ("before.nix", "after.nix")]
    for file, text in zip(files, ("one", "two"), strict=True):
        derivation = f'derivation {{ name = "a"; system = "x86_64-linux"; builder = "/bin/sh"; text = "{text}"; }}'
        file.write_text(f"{{ a = {derivation}; }}")
    done = rebuild(
        farm, "--base-file", files[0], "--head-file", files[1], "--store", farm.eval_store, "--json", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert [change["after"] for change in report_of(done)["causes"]["causes"][0]["changes"]] == ["two"]
    done = rebuild(farm, *common, "--only", "app07", "--base-results", "known")
    assert done.returncode == 0, done.stderr
    assert attrs(report_of(done), verdict="fixed") == {"app07"}


def test_what_evaluates_on_one_side_only_is_reported_and_ends_with_status_3(
    farm: Farm, packages: PackageSet, tmp_path: Path
) -> None:
    base = packages.git("rev-parse", "HEAD")
    packages.fail_evaluation("perlPackages.uri", "is <b>broken</b>")
    packages.commit("does not evaluate")
    page = tmp_path / "page"
    common = (packages.file, "--base", base, "--store", farm.eval_store, "--dry-run")
    done = rebuild(farm, *common, "--json", "--markdown", page)
    assert done.returncode == 3, done.stderr
    report = report_of(done)
    assert attrs(report, change="no longer evaluates") == {"perlPackages.uri"}
    assert "perlPackages.uri is <b>broken</b>" in report["attributes"][0]["error"]
    assert "<b>" not in page.read_text()
    packages.fix("perlPackages.uri")
    packages.commit("evaluates again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_ended_leaves_no_checkout(farm: Farm, tmp_path: Path, number: signal.Signals) -> None:
    packages = PackageSet(tmp_path / "set")
    packages.edit("app01", forced="builtins.foldl' (sum: n: sum + n) 0 (builtins.genList (n: n) 100000000)")
    packages.commit("an evaluation without end")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = farm.command("rebuild", packages.file, "--base", packages.first, "--store", farm.eval_store)
    variables = {**farm.environment, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        while len(list(temporary.glob("drover-revision-*/files/set/default.nix"))) < 2:
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        _, errors = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 130, errors
    assert "interrupted; nothing was submitted" in errors
    assert list(temporary.glob("drover-revision-*")) == []


def test_what_cannot_be_compared_is_one_sentence(farm: Farm, packages: PackageSet, tmp_path: Path) -> None:
    spoilt = PackageSet(tmp_path / "spoilt")
    spoilt.spoil()
    spoilt.commit("no Nix")
    shallow = tmp_path / "shallow"
    subprocess.run(
        ["git", "clone", "-q", "--depth=1", f"file://{packages.directory}", shallow], check=True, env=os.environ
    )
    nowhere = tmp_path / "nowhere.nix"
    nowhere.write_text("{ }")
    file, store = packages.file, ("--store", farm.eval_store)
    refused: list[tuple[tuple[str | Path, ...], int, str]] = [
        ((file, "--base", "no-such-revision"), 3, "has no revision 'no-such-revision'; `git log"),
        ((shallow / "default.nix", "--base", packages.first), 3, "it is a shallow clone: fetch the rest with"),
        ((nowhere, "--base", "HEAD"), 3, "is in no git repository that can be read"),
        ((packages.directory / "other.nix", "--base", "HEAD"), 3, "revision HEAD has no other.nix"),
        ((spoilt.file, "--base", spoilt.first, *store), 3, "the head, HEAD"),
        (("--base-submission", "aaaaaaaaaa", "--head-submission", "bbbbbbbbbb"), 2, "aaaaaaaaaa"),
        ((), 2, "say what is compared"),
        (("--base", "a", "--head-file", "b"), 2, "say what is compared"),
        (("--base-file", "a"), 2, "--head-file is missing"),
        (("--base-submission", "a", "--head-submission", "b", "-A", "x"), 2, "leave --attr out"),
        ((file, "--base", "HEAD", "--regex", "("), 2, "is no regular expression"),
    ]
    for arguments, status, sentence in refused:
        done = rebuild(farm, *arguments)
        assert (done.returncode, sentence in done.stderr) == (status, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr

    packages.write("README", "not committed")
    same = rebuild(farm, file, "--base", "HEAD", *store, "--json")
    assert same.returncode == 0, same.stderr
    assert "no difference in 62 attributes; nothing is to be built" in same.stderr
    assert "not taken, because revisions are compared: what is not committed (README)" in same.stderr
