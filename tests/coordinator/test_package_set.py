"""The package set that tests of mass rebuilds share is what they take it for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.package_set import DATA, ROOT, SYSTEMS, PackageSet
from tests.support.patience import PATIENCE_S


def derivations(packages: PackageSet, store: Path, system: str) -> dict[str, str]:
    """Return package -> derivation; the names of the set are unique."""
    command = ["nix-instantiate", str(packages.file), "--store", str(store), "--argstr", "system", system]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return {path.partition("-")[2].rpartition("-")[0]: path for path in done.stdout.split()}


def test_the_set_has_sixty_packages_for_two_systems_and_its_changes_reach_what_needs_them(tmp_path: Path) -> None:
    packages = PackageSet(tmp_path / "set")
    store = tmp_path / "store"
    first = {system: derivations(packages, store, system) for system in SYSTEMS}
    assert all(len(found) == len(packages.packages) >= 60 for found in first.values())
    assert not set(first[SYSTEMS[0]].values()) & set(first[SYSTEMS[1]].values())

    packages.touch("zlib", "a comment")
    second = derivations(packages, store, SYSTEMS[0])
    changed = {name for name, path in second.items() if path != first[SYSTEMS[0]][name]}
    assert {"zlib", "openssl", "git", "requests", "app01", "app02"} <= changed
    assert not {ROOT, "ncurses", *DATA} & changed

    packages.touch(ROOT, "a comment")
    third = derivations(packages, store, SYSTEMS[0])
    assert not set(second.values()) & set(third.values())


def test_a_history_changes_what_it_is_asked_to_at_each_commit(tmp_path: Path) -> None:
    packages = PackageSet(tmp_path / "set")
    revisions = packages.history(
        6, {3: lambda these: these.fail_evaluation("python3"), 4: lambda these: these.fix("python3")}
    )
    log = packages.git("log", "--format=%H", "--reverse").split()
    assert log == [packages.first, *revisions]
    assert 'throw "python3' in packages.git("show", f"{revisions[3]}:pkgs/python3.nix")
    assert 'throw "python3' not in packages.git("show", f"{revisions[4]}:pkgs/python3.nix")
    assert packages.git("diff", "--name-only", revisions[2], revisions[3]).split() == ["README", "pkgs/python3.nix"]
    packages.spoil()
    assert packages.git("status", "--porcelain") == "M default.nix"
