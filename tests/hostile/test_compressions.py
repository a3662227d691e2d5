"""A cache stores NARs as its settings say, whoever sends them, and a plain Nix reads them."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.hostile.conftest import PLAIN_WRITER
from tests.support.farm import Farm, nix_store
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e


def narinfo(address: str, path: str) -> dict[str, str]:
    with urllib.request.urlopen(f"{address}/{path.rpartition('/')[2][:32]}.narinfo", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_what_is_built_and_what_is_pushed_is_stored_as_the_cache_says_and_read_by_nix(
    pair_farm: Farm, tmp_path: Path
) -> None:
    source = tmp_path / "brought"
    source.write_bytes(os.urandom(3_000_000))
    file = tmp_path / "default.nix"
    file.write_text(
        f"""derivation {{
          name = "built"; system = "x86_64-linux"; builder = "/bin/sh"; src = {source};
          args = [ "-c" "echo $src > $out" ];
        }}"""
    )
    built = pair_farm.build(file, "--json")
    assert built.returncode == 0, built.stderr
    path = json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    assert narinfo(pair_farm.cache_url, path)["Compression"] == "xz"
    fetched = pair_farm.fetch(tmp_path / "fetched", path)
    assert fetched.returncode == 0, fetched.stderr

    # By drover, with what it refers to: the source, which the client had sent to the other cache.
    token = tmp_path / "token"
    token.write_text(PLAIN_WRITER)
    to_plain = ("--cache", "plain", "--token-file", token)
    pushed = pair_farm.drover("cache", "push", path, "--store", tmp_path / "fetched", *to_plain, "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["published"] == 2
    plain = f"{pair_farm.cache_url}/plain"
    info = narinfo(plain, path)
    assert (info["Compression"], info["FileSize"]) == ("none", info["NarSize"])
    options = {"substituters": plain, "require-sigs": "false", "narinfo-cache-negative-ttl": "0"}
    read = nix_store(tmp_path / "read", "-r", path, options=options)
    assert read.returncode == 0, read.stderr
    assert nix_store(tmp_path / "read", "--verify", "--check-contents").returncode == 0

    # By Nix, which compresses as it is told: kept as it came.
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login ci password {PLAIN_WRITER}\n")
    other = tmp_path / "other"
    other.write_text("added by hand")
    added = nix_store(tmp_path / "fetched", "--add", str(other)).stdout.strip()
    copy = ["nix", "--extra-experimental-features", "nix-command", "copy", "--store", str(tmp_path / "fetched")]
    copied = subprocess.run(
        [*copy, "--to", f"{plain}?compression=zstd", "--option", "netrc-file", netrc, added],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert copied.returncode == 0, copied.stderr
    assert narinfo(plain, added)["Compression"] == "zstd"
