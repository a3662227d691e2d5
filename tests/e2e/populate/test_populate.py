"""A lock for two systems is in the cache and proven, by whatever way each of its paths is to be had."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

from infra.nix import aterm
from tests.e2e.populate.conftest import PopulatedFarm, evaluate, fetched_by_nix, nix_instantiate
from tests.support.package_set import SYSTEMS, Package
from tests.support.patience import PATIENCE_S
from tests.support.upstreams import Lie
from tests.support.wishes import flake_entry, store_path

NATIVE, MAC = SYSTEMS
#: Thirty packages of the set that stand on others.
THIRTY = [f"app{n:02d}" for n in range(1, 21)] + [
    *("curl", "git", "libxml2", "openssl", "perl", "python3", "readline", "ruby", "sqlite", "zlib")
]


def outcomes(report: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(each["name"], each["system"]): each["outcome"] for each in report["wishes"]}


def test_a_lock_of_two_systems_is_built_and_each_closure_is_fetched_by_a_plain_client(
    populated: PopulatedFarm, tmp_path: Path
) -> None:
    lock = populated.lock("tools", [populated.entry(attr, system) for attr in THIRTY for system in SYSTEMS])
    markdown = tmp_path / "report.markdown"
    status, report = populated.populate(lock, "--markdown", markdown)
    assert status == 0, report
    assert report["systems"] == {NATIVE: {"built": 30}, MAC: {"built": 30}}
    assert {each["proof"]["state"] for each in report["wishes"]} == {"proven"}
    assert report["proof"]["means"] == "nix"
    assert "60 of 60 proven" in markdown.read_text()
    # Beside the command's own proof: a client of the test's, for a package of each system.
    for system in SYSTEMS:
        fetched_by_nix(populated.farm, tmp_path / f"client-{system}", populated.output("git", system))
    # Nothing is done again.
    status, again = populated.populate(lock, "--proof", "own")
    assert status == 0
    assert again["systems"] == {NATIVE: {"here": 30}, MAC: {"here": 30}}
    assert again["submissions"] == []
    assert {each["proof"]["state"] for each in again["wishes"]} == {"proven"}
    # Attributes of a file are wishes as well.
    systems = ("--systems", ",".join(SYSTEMS))
    status, attributes = populated.populate(populated.packages.file, "-A", "git", *systems, "--proof", "none")
    assert (status, outcomes(attributes)) == (0, {("git", NATIVE): "here", ("git", MAC): "here"})


def test_a_tampered_lock_is_drift_with_both_paths_and_the_first_differing_input(
    populated: PopulatedFarm, tmp_path: Path
) -> None:
    before = populated.derivations
    assert populated.populate(populated.lock("true", [populated.entry("ruby", NATIVE)]), "--proof", "none")[0] == 0
    # Another revision of the set, of which a lock names a derivation with the outputs of the first.
    populated.packages.change("openssl", "other")
    changed = evaluate(populated.farm, populated.packages)
    populated.packages.change("openssl", "first")
    swapped = populated.entry("ruby", NATIVE, derivation=changed["ruby", NATIVE][0])
    elsewhere = {"out": "/nix/store/00000000000000000000000000000000-sqlite-1.0"}
    edited = populated.entry("sqlite", MAC, outputs=elsewhere)
    lock = populated.lock("tampered", [swapped, edited, populated.entry("zlib", NATIVE)])
    status, report = populated.populate(lock)
    assert status == 9
    found = {each["name"]: each for each in report["wishes"]}
    assert {name: each["outcome"] for name, each in found.items() if name != "zlib"} == {
        "ruby": "drift",
        "sqlite": "drift",
    }
    drift = found["ruby"]["drift"]
    assert drift["listed"] == before["ruby", NATIVE][1].outputs[0].path
    assert drift["made"] == changed["ruby", NATIVE][1].outputs[0].path
    assert drift["difference"] == (
        "the first differing input is openssl-1.0: environment text, 'openssl: first' to 'openssl: other'"
    )
    assert found["sqlite"]["drift"]["listed"] == elsewhere["out"]
    assert found["sqlite"]["drift"]["made"] == populated.output("sqlite", MAC)
    # The rest of the list is had all the same.
    assert found["zlib"]["proof"]["state"] == "proven"
    shown = populated.farm.drover("populate", lock, "--store", populated.farm.eval_store, "--proof", "none")
    assert f"listed {drift['listed']}" in shown.stdout
    assert drift["difference"] in shown.stdout


def test_an_entry_whose_derivation_is_unknown_is_evaluated_compared_and_built(
    populated: PopulatedFarm, tmp_path: Path
) -> None:
    flake = populated.root / "flake"
    flake.mkdir()
    (flake / "tool.nix").write_text(
        f"""derivation {{
          name = "tool"; system = "{NATIVE}"; builder = "/bin/sh"; args = [ "-c" "echo $salt > $out" ];
          salt = "{flake}";
        }}"""
    )
    (flake / "flake.nix").write_text(f"{{ outputs = _: {{ packages.{NATIVE}.tool = import ./tool.nix; }}; }}")
    git = ["git", "-C", str(flake), "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a tool"]):
        subprocess.run([*git, *words], check=True, timeout=PATIENCE_S)
    revision = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    drv = nix_instantiate(tmp_path / "elsewhere", flake / "tool.nix").strip()
    made = aterm.parse(Path(f"{tmp_path}/elsewhere{drv}").read_bytes()).outputs[0].path
    wrong = store_path("tool")

    def entry(name: str, path: str) -> dict[str, Any]:
        url = {"locked-url": f"git+file://{flake}?rev={revision.stdout.strip()}", "unfree": False}
        attr = {"locked-flake-attr-path": f"packages.{NATIVE}.tool", "outputs-to-install": ["out"]}
        return flake_entry(name, NATIVE, outputs={"out": path}, **url, **attr)

    status, report = populated.populate(populated.lock("flakes", [entry("tool", made), entry("edited", wrong)]))
    assert status == 9, report
    assert outcomes(report) == {("tool", NATIVE): "built", ("edited", NATIVE): "drift"}
    drift = next(each["drift"] for each in report["wishes"] if each["name"] == "edited")
    assert (drift["listed"], drift["made"], drift["derivation"]) == (wrong, made, drv)
    # What is to be had is compared too where that is wanted.
    status, report = populated.populate(populated.lock("flakes", [entry("tool", made)]), "--evaluate")
    assert (status, outcomes(report)) == (0, {("tool", NATIVE): "here"})


def test_of_ten_paths_of_an_upstream_two_are_bad_and_are_built(populated: PopulatedFarm, tmp_path: Path) -> None:
    ten = [f"lib{n}" for n in range(10)]
    add_packages(populated, ten)
    for attr in ten:
        populated.offer(attr)
    populated.upstream.lie(populated.output("lib3"), Lie.WRONG_NAR)
    populated.upstream.lie(populated.output("lib6"), Lie.WRONG_KEY)
    nowhere = {"install_id": "gone", "system": NATIVE, "priority": 5}
    nowhere["store_path"] = "/nix/store/00000000000000000000000000000000-gone"
    lock = populated.lock("ten", [*(populated.entry(attr, NATIVE) for attr in ten), nowhere])
    status, report = populated.populate(lock, "--no-build", "--proof", "none")
    assert status == 8
    reasons = {each["name"]: each["reason"] for each in report["wishes"] if each["outcome"] == "refused"}
    assert reasons.keys() == {"lib3", "lib6"}
    assert "sent a wrong NAR" in reasons["lib3"]
    assert "without a valid signature" in reasons["lib6"]
    status, report = populated.populate(lock)
    assert status == 8, "the path without a derivation is nowhere"
    assert report["systems"][NATIVE] == {"here": 8, "built": 2, "nowhere": 1}
    assert {each["proof"]["state"] for each in report["wishes"] if each["name"] != "gone"} == {"proven"}
    fetched_by_nix(populated.farm, tmp_path / "client", *(populated.output(attr) for attr in ten))


def test_only_what_is_new_of_two_lists_is_had_and_what_was_cut_goes_on(populated: PopulatedFarm) -> None:
    names = [f"new{n}" for n in range(6)]
    add_packages(populated, names)
    old = populated.lock("old", [populated.entry(attr, NATIVE) for attr in names[:3]])
    new = populated.lock("new", [populated.entry(attr, NATIVE) for attr in names])
    for attr in names[3:]:
        populated.offer(attr)
    # Interrupted while the upstream sends nothing, and the farm is killed before it does.
    upstream = populated.upstream
    upstream.open.clear()
    upstream.wanted.clear()
    command = populated.farm.command("populate", "--diff", old, new, "--store", populated.farm.eval_store)
    running = subprocess.Popen(
        command, env=populated.farm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    populated.at_upstream(upstream.wanted.wait())
    # The upstream is asked before the client has read which run it has begun.
    assert running.stdout is not None
    assert any("paths to look for (mirror-" in line for line in running.stdout)
    populated.farm.kill()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, said
    assert "The same command goes on from there." in said
    assert "end that: drover cancel mirror-" in said
    populated.at_upstream(opened(populated))
    populated.farm.start().wait_for_workers(2)
    status, report = populated.populate("--diff", old, new)
    assert status == 0, report
    assert (report["unchanged"], report["systems"][NATIVE]) == (3, {"mirrored": 3})
    assert {name for name, _ in outcomes(report)} == set(names[3:])


async def opened(populated: PopulatedFarm) -> None:
    populated.upstream.open.set()


def add_packages(populated: PopulatedFarm, names: list[str]) -> None:
    """Add packages that stand on nothing, and evaluate them."""
    for name in names:
        populated.packages.put(Package(name, needs=()))
    populated.derivations |= evaluate(populated.farm, populated.packages)
