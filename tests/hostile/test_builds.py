"""Builds that reach for the machine, on a farm as the README starts it: root, and no build users on the machine.

"Outside" is a network namespace behind a cable, whose near end gives this machine an address after the farm's start.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from infra.daemon import netlink
from tests.support.farm import Farm
from tests.support.link import Link, open_link
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port
from workers.agent.build_users import HIGH_IDS

pytestmark = pytest.mark.e2e

#: Each build writes one line a try to its output and its log: whether it could do what it must not. What is the
#: host's is only opened for writing, and given the mode that it has: on a farm that fails this it must do no harm.
GRAPH = """
let
  busybox = builtins.path {{ path = /bin/busybox; name = "busybox"; }};
  words = ''
    bb() {{ (exec -a busybox ${{busybox}} "$@"); }}
    can() {{ name=$1; shift; if (eval "$@") 2>/dev/null; then echo "$name: yes"; else echo "$name: no"; fi; }}
  '';
  build = name: script: extra: derivation ({{
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; salt = "{salt}";
    args = [ "-c" (words + "main() {{\\n" + script + "\\n}}\\nmain > $out; bb cat $out") ];
  }} // extra);
  fetch = name: url: derivation {{
    inherit name; system = "x86_64-linux"; builder = "builtin:fetchurl"; inherit url; salt = "{salt}";
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{hello_hash}";
  }};
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
  fetch_coordinator = fetch "fetch_coordinator" "http://127.0.0.1:{port}/healthz";
  fetch_machine = fetch "fetch_machine" "http://{machine}:{here}/hello";
  fetch_new_address = fetch "fetch_new_address" "http://{new_address}:{here}/hello";
  fetch_metadata = fetch "fetch_metadata" "http://169.254.169.254/";
  fetch_outside = fetch "fetch_outside" "http://{outside}/hello";
  fetch_by_name = fetch "fetch_by_name" "http://outside.drover.test:{outside_port}/hello";
  fetch_machine_by_name = fetch "fetch_machine_by_name" "http://machine.drover.test:{here}/hello";
  resolver = build "resolver" "bb cat /etc/resolv.conf" {{
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{resolver_hash}";
  }};
  sockets = build "sockets" "bb grep -c @{salt} /proc/net/unix || :" {{
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "{none_hash}";
  }};
}}
"""
WAIT_FOR_PORT = """
import socket, sys, time
while True:
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()
        break
    except OSError:
        time.sleep(0.05)
"""
#: Answers for the names `NAME=ADDRESS...` of its arguments.
NAME_SERVER = """
import ipaddress, socket, sys
names = dict(word.split("=") for word in sys.argv[1:])
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 53))
print("ready", flush=True)
while True:
    asked, client = server.recvfrom(512)
    labels, at = [], 12
    while asked[at]:
        labels.append(asked[at + 1 : at + 1 + asked[at]].decode().lower())
        at += 1 + asked[at]
    address = names.get(".".join(labels))
    found = address is not None and asked[at + 1 : at + 3] == b"\\0\\1"
    head = asked[:2] + (b"\\x81\\x80" if address else b"\\x81\\x83") + bytes([0, 1, 0, found, 0, 0, 0, 0])
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + ipaddress.IPv4Address(address).packed if found else b""
    server.sendto(head + asked[12 : at + 5] + record, client)
"""
#: What builds have: slirp4netns, the third address of their network.
RESOLVER = "nameserver 10.0.2.3\n"
NOTHING_FIXED = "hosts: no\nresolver: no\nservices: no\n"


class NamingFarm(Farm):
    """A farm whose machine asks the name server that the file `name_server` names."""

    def __init__(self, root: Path) -> None:
        # What cannot be reached is not tried five times, and each name is fetched although all have one content.
        settings = 'nix_options = { download-attempts = "1" }\nsources = { across_names = false }'
        super().__init__(root, workers=(), settings=settings)
        self.name_server = root / "resolv.conf"
        self.name_server.write_text("nameserver 127.0.0.1\n")

    def command(self, *arguments: str | Path) -> list[str]:
        over = f"mount --bind '{self.name_server}' /etc/resolv.conf && exec \"$@\""
        return ["unshare", "--mount", "sh", "-c", over, "sh", *super().command(*arguments)]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamingFarm]:
    made = NamingFarm(tmp_path_factory.mktemp("builds"))
    try:
        made.start().wait_for_workers(1)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def link(farm: NamingFarm) -> Iterator[Link]:
    with open_link() as made:
        yield made


@pytest.fixture(scope="module")
def said(farm: NamingFarm, link: Link) -> Iterator[dict[str, str]]:
    """Return what each build wrote to its log, by name: one that fails has one as well."""
    with ExitStack() as stack:
        served = farm.root / "served"
        served.mkdir()
        (served / "hello").write_text(str(farm.root))
        # What answers on every address of this machine, the new one included, without asking for anything.
        here = stack.enter_context(web_server(served, ()))
        outside = stack.enter_context(web_server(served, link.prefix()))
        names = {"outside.drover.test": link.there, "machine.drover.test": link.here}
        stack.enter_context(name_server(names, link.prefix()))
        farm.name_server.write_text(f"nameserver {link.there}\n")
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{farm.root}")
        # Other tests' cables apart, which come and go.
        own = next(address for address in netlink.ipv4_addresses() if not address.startswith("10.213."))
        file = farm.root / "hostile.nix"
        file.write_text(
            GRAPH.format(
                salt=farm.root,
                fixed_hash=sha256(NOTHING_FIXED),
                hello_hash=sha256(str(farm.root)),
                none_hash=sha256("0\n"),
                port=farm.port,
                machine=own,
                here=here,
                new_address=link.here,
                outside=f"{link.there}:{outside}",
                outside_port=outside,
                resolver_hash=sha256(RESOLVER),
            )
        )
        done = farm.build(file, "--json")
        ended = json.loads(done.stdout.splitlines()[-1])
        logs = {root["attr"]: farm.drover("log", root["step"]).stdout for root in ended["roots"]}
        yield logs | {f"{root['attr']}: state": root["state"] for root in ended["roots"]}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def web_server(directory: Path, prefix: Sequence[str]) -> Iterator[int]:
    """A web server on all addresses, run by the command `prefix`; gives its port."""
    port = free_port()
    argv = [*prefix, sys.executable, "-m", "http.server", str(port), "--bind", "0.0.0.0", "--directory", str(directory)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            probe = [*prefix, sys.executable, "-c", WAIT_FOR_PORT, str(port)]
            subprocess.run(probe, check=True, timeout=PATIENCE_S)
            yield port
        finally:
            server.kill()


@contextmanager
def name_server(names: Mapping[str, str], prefix: Sequence[str]) -> Iterator[None]:
    """A name server that knows these names, run by the command `prefix`."""
    words = [f"{name}={address}" for name, address in names.items()]
    with subprocess.Popen([*prefix, sys.executable, "-c", NAME_SERVER, *words], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()


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


def test_a_fixed_output_build_reaches_the_outside_and_neither_farm_nor_machine(said: dict[str, str]) -> None:
    assert said["fetch_outside: state"] == "done"
    for place in ("coordinator", "machine", "new_address", "metadata"):
        assert "unable to download" in said[f"fetch_{place}"], place


def test_a_fixed_output_build_resolves_names_and_what_is_denied_stays_so_by_name(said: dict[str, str]) -> None:
    assert said["resolver: state"] == "done", said["resolver"]
    assert said["fetch_by_name: state"] == "done", said["fetch_by_name"]
    # The name has an address, and that is denied: a name that has none is another message.
    assert "unable to download" in said["fetch_machine_by_name"]
    assert "resolve" not in said["fetch_machine_by_name"]


def test_a_fixed_output_build_sees_no_abstract_socket_of_the_machine(said: dict[str, str]) -> None:
    assert said["sockets"] == "0\n"


def test_a_build_cannot_change_an_input_that_the_next_build_uses(said: dict[str, str]) -> None:
    assert said["tamper"].splitlines() == ["write: no", "remove: no", "GENUINE"]
    assert said["after"] == "GENUINE\n"
