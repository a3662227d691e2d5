"""Variants of derivations are those that Nix itself makes of the same expression with one more variable."""

from __future__ import annotations

import subprocess
from pathlib import Path

from infra.nix import aterm
from infra.nix.store_path import StoreDir
from infra.nix.variant import variant_of
from infra.nix.verify import Verifier
from tests.support.patience import PATIENCE_S

STORE_DIR = StoreDir("/nix/store")
EXPRESSION = """
let
  shell = extra: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "true" ]; } // extra);
  fixed = shell { name = "fixed"; outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "%s"; };
  below = shell { name = "below"; outputs = [ "out" "dev" ]; needs = [ fixed ]; };
  text = "a \\"quoted\\" text";
  needs = [ below below.dev fixed ];
  top = extra: shell ({ name = "top-1.0"; outputs = [ "out" "doc" ]; inherit text needs; } // extra);
in [ (top { }) (top { DROVER_VARIANT = "duration"; }) ]
""" % ("0" * 64)


def test_a_variant_is_what_nix_makes_of_the_expression_with_one_more_variable(tmp_path: Path) -> None:
    command = ["nix-instantiate", "--store", str(tmp_path), "-E", EXPRESSION]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout.split()
    plain, expected = [path.partition("!")[0] for path in made]

    def read(drv: str) -> bytes:
        return (tmp_path / drv.lstrip("/")).read_bytes()

    verifier = Verifier(STORE_DIR)
    hashes: dict[str, str] = {}

    def learn(drv: str) -> None:
        for needed, _ in aterm.parse(read(drv)).input_drvs:
            learn(needed)
        hashes[drv] = verifier.add(drv, read(drv)).hash_modulo

    learn(plain)
    drv, data = variant_of(plain, aterm.parse(read(plain)), hashes, STORE_DIR, b"duration")
    assert (drv, data) == (expected, read(expected))
    assert verifier.add(drv, data).outputs != verifier.add(plain, read(plain)).outputs
