"""Fresh machines for tests: namespaces of this one, each booted by the real systemd, in a network of their own.

A machine's /usr, /etc, /var and /nix lie over this machine's, so its packages are those that are installed here; what
it writes is gone with it. /etc/drover, /opt and the state of services are as on a new machine, but for an environment
of Python with the locked dependencies: the one that runs the tests, whose installation takes a minute. Needs root, as
the sandbox does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tests.support.patience import PATIENCE_S

T = TypeVar("T")
#: What stands in every unit, and in a login of root.
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where the tests are killed, so is what they have started.
WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
#: Only ends a test that hangs.
WITHIN_S: Final = PATIENCE_S
_CLONE_NEWNET: Final = 0x40000000
#: What an overlay has of a directory below is not seen.
_OPAQUE: Final = "trusted.overlay.opaque"
#: Makes the root of a machine and becomes its systemd. Kernel variables are this machine's: they are left alone.
_BOOT: Final = """
set -eu
dir=$1 image=$2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$dir/root"
cd "$dir/root"
mkdir proc sys run dev tmp root home srv mnt
cp -a /bin /sbin /lib /lib64 .
for part in usr etc var opt nix; do
  mkdir -p $part "$dir/$part/upper" "$dir/$part/work" "$image/$part"
  below=$image/$part:/$part
  [ $part != opt ] || below=$image/opt
  mount -t overlay overlay -o "redirect_dir=on,lowerdir=$below,upperdir=$dir/$part/upper,workdir=$dir/$part/work" $part
done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for place in run dev tmp; do mount -t tmpfs -o mode=755 tmpfs $place; done
chmod 1777 tmp
mkdir -p dev/net dev/shm dev/pts
for node in null zero full random urandom tty net/tun kvm $3; do
  [ ! -e /dev/$node ] || { touch dev/$node; mount --bind /dev/$node dev/$node; }
done
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ip link set lo up
mkdir -p .before
pivot_root . .before
umount -l /.before
export container=drover-test
exec env -i container=drover-test PATH="$PATH" /lib/systemd/systemd --system --unit=basic.target --show-status=no
"""


def quietly(*command: str | Path) -> str:
    """Run a command that must succeed; return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def layer(place: Path, repository: Path, files: Mapping[str, str]) -> Path:
    """Return the directory that lies over this machine's in every machine: an environment of Python, and `files`."""
    for opaque in ("etc/drover", "var/lib/drover", "var/lib/drover-worker"):
        (place / opaque).mkdir(parents=True)
        os.setxattr(place / opaque, _OPAQUE, b"y")
    venv = place / "opt" / "drover" / ".venv"
    here = Path(sys.prefix)
    (venv / "bin").mkdir(parents=True)
    python = "/usr/bin/python3"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    told = quietly(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    assert told == version, f"{python} is {told}: the packages of this environment are for {version}"
    (venv / "bin" / "python").symlink_to(python)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    # Links where that works: it is a gigabyte. What is changed below is written anew.
    if subprocess.run(["cp", "-al", here / "lib", venv / "lib"], capture_output=True, check=False).returncode:
        shutil.rmtree(venv / "lib", ignore_errors=True)
        quietly("cp", "-a", here / "lib", venv / "lib")
    for script in (here / "bin").iterdir():
        head = script.read_bytes() if script.is_file() and not script.is_symlink() else b""
        if head.startswith(b"#!") and str(here).encode() in head[:200]:
            copy = venv / "bin" / script.name
            copy.write_bytes(head.replace(str(here).encode(), b"/opt/drover/.venv"))
            copy.chmod(0o755)
    packages = venv / "lib" / f"python{version}" / "site-packages"
    for finder in packages.glob("__editable__*.py"):
        text = finder.read_text()
        finder.unlink()
        finder.write_text(text.replace(str(repository), "/opt/drover"))
    (venv / ".drover-stamp").write_text(_stamp(repository))
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
        (place / name).chmod(0o755 if text.startswith("#!") else 0o644)
    units = place / "etc" / "systemd" / "system"
    units.mkdir(parents=True, exist_ok=True)
    for unit in ("systemd-sysctl", "systemd-modules-load", "systemd-journal-flush", "systemd-udevd"):
        (units / f"{unit}.service").symlink_to(os.devnull)
    return place


def _stamp(repository: Path) -> str:
    """Return what `./run setup` writes of an environment that is whole, in /opt/drover."""
    line = next(text for text in (repository / "run").read_text().splitlines() if text.strip().startswith("wanted="))
    script = f"set -eu; LOCK=infra/requirements.lock; python=/usr/bin/python3; pwd() {{ echo /opt/drover; }}; {line}"
    return quietly("sh", "-c", f'cd "{repository}"; {script}; printf %s "$wanted"')


def in_network(pid: int, function: Callable[[], T]) -> T:
    """Call a function in the network of a process, in a thread of its own; what it opens stays in that network."""
    found: list[T] = []

    def run() -> None:
        with Path(f"/proc/{pid}/ns/net").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        found.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


class Network:
    """A network with this test at one address: a bridge in a namespace that is nobody's else."""

    def __init__(self, *addresses: str) -> None:
        """`addresses` are those of the test itself, with the lengths of their prefixes."""
        self._holder = subprocess.Popen([*WITH_US, "unshare", "--net", "sleep", "infinity"])
        self.pid = self._holder.pid
        self._count = 0
        own = Path("/proc/self/ns/net").readlink()
        await_(lambda: Path(f"/proc/{self.pid}/ns/net").readlink() != own, "the network is not there")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", "lan", "type", "bridge")
        self.run("ip", "link", "set", "lan", "up")
        for address in addresses:
            self.run("ip", "addr", "add", address, "dev", "lan")

    def run(self, *command: str) -> str:
        return quietly(*self.prefix, *command)

    @property
    def prefix(self) -> Sequence[str]:
        """Return the words that make a command run in the network, with the files of this machine."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net")

    def listen(self, address: str, port: int) -> socket.socket:
        return in_network(self.pid, lambda: socket.create_server((address, port)))

    def plug(self, pid: int, address: str, device: str = "eth0") -> None:
        """Give a machine a cable and an address, with the length of its prefix; the first is its way to all others."""
        self._count += 1
        port = f"port{self._count}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", device, "netns", str(pid))
        self.run("ip", "link", "set", port, "master", "lan", "up")
        there = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
        quietly(*there, "addr", "add", address, "dev", device)
        quietly(*there, "link", "set", device, "up")
        if device == "eth0":
            quietly(*there, "route", "add", "default", "dev", device)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class Machine:
    """One machine, from its boot to its end."""

    def __init__(self, name: str, place: Path, image: Path, devices: Sequence[str] = ()) -> None:
        self.name = name
        self._place = place / name
        self._groups = _control_groups() / f"drover-test-{os.getpid()}-{name}"
        (self._place / "root").mkdir(parents=True)
        self._groups.mkdir()
        boot = self._place / "boot.sh"
        boot.write_text(_BOOT)
        kinds = ("--mount", "--pid", "--fork", "--uts", "--net", "--ipc", "--cgroup", "--kill-child")
        join = 'echo 0 > "$1/cgroup.procs"; shift; exec "$@"'
        log = (self._place / "boot.log").open("wb")
        self._process = subprocess.Popen(
            ["sh", "-c", join, "sh", self._groups, *WITH_US, "unshare", *kinds,
             "sh", boot, self._place, image, " ".join(devices)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={"PATH": PATH},
        )  # fmt: skip
        log.close()
        self.pid = await_(self._first, f"machine {name} did not start: {self._place}/boot.log")
        await_(self._booted, f"machine {name} did not boot: {self._place}/boot.log")
        self.run("hostname", name)

    def _first(self) -> int:
        assert self._process.poll() is None, (self._place / "boot.log").read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _booted(self) -> bool:
        assert self._process.poll() is None, (self._place / "boot.log").read_text()
        return self.run("systemctl", "is-active", "basic.target").returncode == 0

    def command(self, *words: str | Path, **environment: str) -> list[str]:
        """Return what runs a command as root of the machine."""
        variables = [f"{name}={value}" for name, value in {"PATH": PATH, "HOME": "/root", **environment}.items()]
        kinds = ("--mount", "--pid", "--uts", "--net", "--ipc", "--cgroup")
        return ["nsenter", "--target", str(self.pid), *kinds, "--wdns=/", "env", "-i", *variables, *map(str, words)]

    def run(self, *words: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), input=given, capture_output=True, text=True, check=False)

    def read(self, path: str) -> str:
        ran = self.run("cat", path)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def log(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit).stdout

    def until(self, words: str, unit: str) -> None:
        """Wait until a unit has written something."""
        try:
            await_(lambda: words in self.log(unit), words)
        except AssertionError as error:
            error.add_note(self.log(unit)[-4000:])
            raise

    def close(self) -> None:
        """Switch it off: whatever runs on it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        for folder, _, _ in os.walk(self._groups, topdown=False):
            await_(partial(_removed, folder), f"{folder} is not empty")


def _removed(folder: str) -> bool:
    try:
        Path(folder).rmdir()
    except OSError:
        return False
    return True


def _control_groups() -> Path:
    """Return where this machine has control groups of version 2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    message = "control groups of version 2 are not mounted"
    raise RuntimeError(message)


def await_(ready: Callable[[], T], otherwise: str) -> T:
    """Wait until a function returns something true; return that."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := ready()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
    return found
