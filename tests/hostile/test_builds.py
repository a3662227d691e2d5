"""Builds that reach for the machine, on a farm as the README starts it: root, and no build users on the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.farm import Farm
from workers.build_users import HIGH_IDS

pytestmark = pytest.mark.e2e

#: Each build writes one line a try to its output: whether it could do what it must not. What is the host's is only
#: opened for writing, and given the mode that it has: on a farm that fails these tests they must do no harm.
GRAPH = """
let
  busybox = builtins.path {{ path = /bin/busybox; name = "busybox"; }};
  words = ''
    bb() {{ (exec -a busybox ${{busybox}} "$@"); }}
    can() {{ name=$1; shift; if (eval "$@") 2>/dev/null; then echo "$name: yes"; else echo "$name: no"; fi; }}
  '';
  build = name: script: extra: derivation ({{
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; salt = "{salt}";
    args = [ "-c" (words + "exec > $out\\n" + script) ];
  }} // extra);
in rec {{
  ids = build "ids" "bb cat /proc/self/uid_map /proc/self/gid_map" {{}};
  files = build "files" ''
    can core_pattern ': >> /proc/sys/kernel/core_pattern'
    can shell ': >> /bin/sh'
    can shell_mode 'bb chmod 755 /bin/sh'
    can device 'bb mknod /tmp/disk b 254 0'
    can setuid 'bb cp ${{busybox}} /tmp/su && bb chmod 4755 /tmp/su'
    can mount 'bb mount -t tmpfs none /tmp'
  '' {{}};
  devices = build "devices" "bb ls /dev" {{}};
  dependency = build "dependency" "echo GENUINE" {{}};
  tamper = build "tamper" ''
    can write 'bb chmod 644 ${{dependency}} && echo TAMPERED > ${{dependency}}'
    can remove 'bb rm -f ${{dependency}}'
    bb cat ${{dependency}}
  '' {{}};
  after = build "after" "read line < ${{tamper}}; bb cat ${{dependency}}" {{}};
  fixed = build "fixed" ''
    can hosts ': >> /etc/hosts'
    can resolver ': >> /etc/resolv.conf'
    can services ': >> /etc/services'
  '' {{ outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{fixed_hash}"; }};
}}
"""
NOTHING_FIXED = "hosts: no\nresolver: no\nservices: no\n"


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    made = Farm(tmp_path_factory.mktemp("builds"), workers=())
    try:
        made.start().wait_for_workers(1)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def said(farm: Farm) -> dict[str, str]:
    """What each build wrote, by name, as the farm's cache has it."""
    file = farm.root / "hostile.nix"
    fixed_hash = hashlib.sha256(NOTHING_FIXED.encode()).hexdigest()
    file.write_text(GRAPH.format(salt=farm.root, fixed_hash=fixed_hash))
    done = farm.build(file, "--json")
    submission = json.loads(done.stdout.splitlines()[-1])
    outputs = {root["attr"]: root["outputs"]["out"] for root in submission["roots"] if root["state"] == "done"}
    plain = farm.root / "plain"
    fetched = farm.fetch(plain, *outputs.values())
    assert fetched.returncode == 0, fetched.stderr
    return {name: Path(f"{plain}{path}").read_text() for name, path in outputs.items()}


def test_a_builder_is_a_user_of_its_own_on_the_host(said: dict[str, str]) -> None:
    users, groups = ([int(word) for word in line.split()] for line in said["ids"].splitlines())
    for inner, outer, count in (users, groups):
        assert inner != 0
        assert outer in HIGH_IDS
        assert count == 1


def test_a_build_cannot_write_to_anything_of_the_host(said: dict[str, str]) -> None:
    assert said["files"].splitlines() == [
        "core_pattern: no",
        "shell: no",
        "shell_mode: no",
        "device: no",
        "setuid: no",
        "mount: no",
    ]


def test_a_build_sees_no_device_but_those_that_nix_gives(said: dict[str, str]) -> None:
    known = {"fd", "full", "kvm", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty"}
    assert set(said["devices"].split()) <= known | {"urandom", "zero"}


def test_a_fixed_output_build_cannot_write_the_files_that_it_shares_with_the_host(said: dict[str, str]) -> None:
    assert said["fixed"] == NOTHING_FIXED


def test_a_build_cannot_change_an_input_that_the_next_build_uses(said: dict[str, str]) -> None:
    assert said["tamper"].splitlines() == ["write: no", "remove: no", "GENUINE"]
    assert said["after"] == "GENUINE\n"
