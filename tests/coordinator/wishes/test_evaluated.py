"""Wishes of flakes, configurations and files, evaluated by real Nix; what is wrong with them is one sentence."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.cli.evaluation import EvaluationRequest
from coordinator.cli.wish_reading import WishRequest, read_lists, wishes_of
from coordinator.client.closure import LocalStore
from coordinator.errors import CoordinatorError
from coordinator.wishes.model import WishedAttribute, WishedPaths, WishList, WishSource
from tests.support.wishes import store_path

LINUX, MAC = "x86_64-linux", "aarch64-darwin"
FLAKE = """{
  outputs = { self }:
    let made = name: system: derivation { inherit name system; builder = "/bin/sh"; };
    in {
      packages.x86_64-linux.default = made "plain" "x86_64-linux";
      packages.x86_64-linux.paid = throw "Package 'paid' has an unfree license.";
      packages.aarch64-darwin.default = made "plain" "aarch64-darwin";
      nixosConfigurations.box.config.system.build.toplevel = made "nixos-system-box" "x86_64-linux";
      darwinConfigurations.mac.system = made "darwin-system" "aarch64-darwin";
    };
}
"""
FILE = """{ a = derivation { name = "a"; system = "x86_64-linux"; builder = "/b"; outputs = [ "out" "dev" ]; }; }"""


def read(
    tmp_path: Path,
    *sources: str,
    kind: WishSource | None = None,
    attrs: tuple[str, ...] = (),
    systems: tuple[str, ...] = (LINUX, MAC),
) -> WishList:
    evaluation = EvaluationRequest(attrs=attrs, systems=systems, evaluators=1, eval_cache=False)
    request = WishRequest(sources, evaluation, kind, ("--option", "substituters", ""), str(tmp_path / "store"))
    return asyncio.run(wishes_of(request, lambda _: None))


def test_attributes_become_the_paths_of_their_derivations_for_each_system(tmp_path: Path) -> None:
    flake = tmp_path / "flake"
    flake.mkdir()
    (flake / "flake.nix").write_text(FLAKE)
    (flake / "flake.lock").write_text('{"nodes": {"root": {}}, "root": "root", "version": 7}')
    (tmp_path / "some.nix").write_text(FILE)
    configurations = [f"path:{flake}#nixosConfigurations.box", f"path:{flake}#darwinConfigurations.mac"]
    found = read(tmp_path, f"{flake}/flake.lock", *configurations, f"{tmp_path}/some.nix", attrs=("a",))
    names = {}
    for wish in found.wishes:
        if isinstance(wish.target, WishedPaths):
            assert wish.target.derivation is not None
            names[wish.name, wish.system] = [output.path[44:] for output in wish.target.outputs]
    assert names == {
        ("packages.default", LINUX): ["plain"],
        ("packages.default", MAC): ["plain"],
        ("nixosConfigurations.box", LINUX): ["nixos-system-box"],
        ("darwinConfigurations.mac", MAC): ["darwin-system"],
        ("a", LINUX): ["a-dev", "a"],
    }
    # The same as a list of derivations, which say their systems themselves.
    targets = [wish.target for wish in found.wishes]
    listed = tmp_path / "drvs"
    listed.write_text("\n".join(each.derivation or "" for each in targets if isinstance(each, WishedPaths)))
    again = read(tmp_path, str(listed), systems=(MAC,))
    assert {wish.system for wish in again.wishes} == {LINUX, MAC}
    assert [wish.target for wish in again.wishes] == [each for each in targets if isinstance(each, WishedPaths)]
    (refused,) = (wish for wish in found.wishes if isinstance(wish.target, WishedAttribute))
    assert (refused.name, sorted(refused.marks)) == ("packages.paid", ["unfree"])
    assert found.notes[0].startswith(f"packages.paid on {LINUX}: Package 'paid' has an unfree license")


def test_a_flake_in_the_store_is_evaluated_and_no_path_to_copy() -> None:
    flake, path = store_path("source"), store_path("a-1")
    request = WishRequest((f"{flake}#tool", path), EvaluationRequest(systems=(LINUX,), evaluators=1, eval_cache=False))
    tool, listed = read_lists(request, LocalStore()).wishes
    assert tool.target == WishedAttribute(flake, f"packages.{LINUX}.tool")
    assert isinstance(listed.target, WishedPaths)
    assert listed.target.paths == (path,)


def test_what_is_not_there_torn_or_of_another_form_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torn.lock").write_text('{"lockfile-version": 1, "pack')
    (tmp_path / "some.nix").write_text(FILE)
    for source, kind, sentence in (
        ("torn.lock", None, "torn.lock: it is not whole or no JSON"),
        ("no.lock", None, "no.lock: it does not exist; name a lock, a list, a Nix file or FLAKE#ATTR"),
        ("torn.lock", WishSource.DEVBOX, "torn.lock: it is not whole or no JSON"),
        ("some.nix", WishSource.FLOX, "some.nix: it is not whole or no JSON"),
        ("", None, "it has none of .flox/env/manifest.lock, devbox.lock, flake.lock, flake.nix, default.nix; name"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CoordinatorError) as caught:
            read(tmp_path, str(tmp_path / (source or "empty")), kind=kind)
        assert sentence in str(caught.value)
    with pytest.raises(CoordinatorError, match="attribute 'gone' in selection path 'gone' not found; correct it"):
        read(tmp_path, str(tmp_path / "some.nix"), attrs=("gone",))
