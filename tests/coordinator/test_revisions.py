"""Revisions of a git repository are checked out beside it, and what is wrong with one is one sentence."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.revisions import Repository
from tests.support.package_set import PackageSet


@pytest.fixture
def packages(tmp_path: Path) -> PackageSet:
    return PackageSet(tmp_path / "set")


def clone(packages: PackageSet, to: Path, how: str) -> Path:
    subprocess.run(["git", "clone", "-q", how, f"file://{packages.directory}", str(to)], check=True)
    return to


async def repository(path: Path) -> Repository:
    return await Repository.around(path, os.environ)


async def test_a_checkout_has_the_files_of_its_commit_and_leaves_repository_and_temporary_directory_as_they_were(
    packages: PackageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    packages.write(".gitattributes", "README export-ignore\n")
    packages.write("README", "kept\n")
    packages.write(".git/hooks/post-index-change", f"#!/bin/sh\ntouch {tmp_path}/hook\n")
    (packages.directory / ".git/hooks/post-index-change").chmod(0o755)
    second = packages.commit("a file that archives leave out")
    packages.change("zlib", "changed and not committed")
    before = packages.git("status", "--porcelain")
    (tmp_path / "hook").unlink()
    found = await repository(packages.file)
    assert found.root == packages.directory
    # As git calls it for a hook: its variables point at the repository that it runs for.
    found = await Repository.around(packages.file, {**os.environ, "GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/no/index"})
    assert await found.uncommitted() == ("pkgs/zlib.nix",)
    async with found.checkout(await found.commit_of("main")) as head, found.checkout(packages.first) as base:
        assert head.directory.name == base.directory.name == "set"
        assert (head.directory / "README").read_text() == "kept\n"
        assert not (base.directory / "README").exists()
        assert "changed" not in (head.directory / "pkgs/zlib.nix").read_text()
        assert not (head.directory / ".git").exists()
    assert await found.commit_of(second[:8]) == second
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "hook").exists()
    assert packages.git("status", "--porcelain") == before


async def test_a_checkout_that_fails_or_is_left_by_an_error_is_cleaned_up(
    packages: PackageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = await repository(packages.directory)
    with pytest.raises(KeyboardInterrupt):
        async with found.checkout(packages.first):
            raise KeyboardInterrupt
    with pytest.raises(EvaluationError, match=r"^revision 0{12} of .* cannot be checked out: "):
        async with found.checkout("0" * 40):
            pass
    assert list((tmp_path / "temporary").iterdir()) == []


async def test_submodules_are_named_because_they_are_empty(packages: PackageSet) -> None:
    packages.git("update-index", "--add", "--cacheinfo", f"160000,{packages.first},vendor/other")
    packages.git("commit", "-q", "-m", "a submodule")
    found = await repository(packages.directory)
    async with found.checkout(await found.commit_of("HEAD")) as head:
        assert head.submodules == ("vendor/other",)


@pytest.mark.parametrize("revision", ["", "nothing", "--all", "0" * 40, "HEAD:default.nix", "a\nb"])
async def test_a_revision_that_does_not_exist_is_named(packages: PackageSet, revision: str) -> None:
    found = await repository(packages.directory)
    with pytest.raises(EvaluationError) as error:
        await found.commit_of(revision)
    assert str(error.value).startswith(f"{packages.directory} has no revision {revision!r}; `git log ")


async def test_a_shallow_clone_says_how_to_get_the_rest(packages: PackageSet, tmp_path: Path) -> None:
    packages.change("zlib", "second")
    packages.commit("second")
    found = await repository(clone(packages, tmp_path / "clone", "--depth=1"))
    assert await found.commit_of("HEAD")
    with pytest.raises(EvaluationError, match="shallow clone: fetch the rest with `git fetch --unshallow`"):
        await found.commit_of(packages.first)


async def test_a_bare_repository_is_checked_out_too_and_a_directory_without_one_is_refused(
    packages: PackageSet, tmp_path: Path
) -> None:
    found = await repository(clone(packages, tmp_path / "bare.git", "--bare"))
    async with found.checkout(await found.commit_of("main")) as head:
        assert head.directory.name == "bare"
        assert (head.directory / "default.nix").exists()
    assert await found.uncommitted() == ()
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    with pytest.raises(EvaluationError, match="is in no git repository that can be read: not a git repository"):
        await repository(nowhere)
