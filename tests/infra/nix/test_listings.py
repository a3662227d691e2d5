"""Listings: what the installed Nix writes for the same tree, for any tree, and within a limit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import nar_files
from infra.nix.errors import FormatError
from infra.nix.listing import NarLister
from infra.nix.nar import NarData, NarFile, write_events

MANY = 10_000_000


def listing(nar: bytes, piece: int = MANY, limit: int = MANY) -> bytes:
    lister = NarLister(limit)
    for start in range(0, len(nar), piece):
        lister.feed(nar[start : start + piece])
    return lister.close()


def make_tree(root: Path) -> None:
    (root / "bin").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "bin/run").write_text("#!/bin/sh\nexit\n")
    (root / "bin/run").chmod(0o755)
    (root / "bin/nothing").touch()
    (root / "bin/bare").touch(mode=0o755)
    for length in range(1, 18):
        (root / f"bin/{'n' * length}").write_bytes(b"x" * length)
    (root / 'odd "q" \\ ü').write_text("odd")
    (root / "link \x02\r").symlink_to("to\tthe/\nplace \x01\x7f")
    (root / "a-link").symlink_to("bin/run")
    (root / "a").mkdir()
    (root / "a/b").mkdir()
    (root / "a/b/c").write_text("deep")
    (root / "a.txt").write_text("before or after a")


def test_it_is_byte_for_byte_what_nix_writes(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    (tmp_path / "file").write_text("one file")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "NIX_CONFIG": "build-users-group =\nsubstituters =\nexperimental-features = nix-command\n",
    }
    environment.pop("NIX_REMOTE", None)
    cache = tmp_path / "cache"
    for name in ("tree", "file"):
        added = subprocess.run(
            ["nix-store", "--store", str(tmp_path / "store"), "--add", str(tmp_path / name)],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        subprocess.run(
            ["nix", "copy", "--store", str(tmp_path / "store"), "--to", f"file://{cache}?write-nar-listing=1", added],
            env=environment, capture_output=True, check=True,
        )  # fmt: skip
        nar = b"".join(nar_files.dump(tmp_path / name))
        theirs = (cache / f"{Path(added).name[:32]}.ls").read_bytes()
        assert listing(nar) == theirs
        assert listing(nar, piece=7) == theirs


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.binary(max_size=40), max_size=6))
def test_every_offset_is_where_the_files_bytes_are(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("tree") / "tree"
    root.mkdir()
    for name, content in files.items():
        (root / name).mkdir()
        (root / name / "file").write_bytes(content)
    nar = b"".join(nar_files.dump(root))
    entries = json.loads(listing(nar))["root"]["entries"]
    assert list(entries) == sorted(files)
    for name, content in files.items():
        node = entries[name]["entries"]["file"]
        assert nar[node["narOffset"] : node["narOffset"] + node["size"]] == content


def test_a_listing_has_a_limit_and_a_nar_must_be_whole(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    nar = b"".join(nar_files.dump(tmp_path / "tree"))
    with pytest.raises(FormatError, match="longer than 100 bytes"):
        listing(nar, limit=100)
    with pytest.raises(FormatError, match="cut short"):
        listing(nar[:-8])
    one = b"".join(write_events([NarFile(b"", executable=False, size=3), NarData(b"abc")]))
    assert listing(one) == b'{"version":1,"root":{"type":"regular","size":3,"narOffset":96}}'
