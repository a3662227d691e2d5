"""Files whose owners are shifted into a user namespace, as runtimes give them to pods with `hostUsers: false`."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

#: The first id on this machine of a pod's users, and how many there are.
ID_START: Final = 1_000_000
ID_COUNT: Final = 65_536

# Numbers of Linux' system calls and flags, which the C library of Debian 12 does not name; the same on all machines.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 1, 4
_MOUNT_ATTR_IDMAP: Final = 0x00100000
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _call(number: int, *arguments: object) -> int:
    got = int(_libc.syscall(number, *arguments))
    if got < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return got


@contextmanager
def _user_namespace() -> Iterator[int]:
    """Open a user namespace with the ids of a pod."""
    with subprocess.Popen(["unshare", "--user", "sleep", "60"]) as process:
        try:
            proc = Path("/proc", str(process.pid))
            while (proc / "ns" / "user").readlink() == Path("/proc/self/ns/user").readlink():
                time.sleep(0.01)
            for kind in ("uid", "gid"):
                (proc / f"{kind}_map").write_text(f"0 {ID_START} {ID_COUNT}")
            number = os.open(proc / "ns" / "user", os.O_RDONLY)
        finally:
            process.kill()
    try:
        yield number
    finally:
        os.close(number)


@contextmanager
def idmapped(root: Path, place: Path) -> Iterator[Path]:
    """Show an overlay mount's files below `place`, owned as a pod's user namespace sees them, with a new top layer.

    An overlay itself cannot be shifted, so each of its layers is, and they are laid over one another again.
    """
    layers = _layers(root)
    with ExitStack() as stack, _user_namespace() as namespace:
        shifted = []
        for number, layer in enumerate(layers):
            target = place / f"layer{number}"
            target.mkdir(parents=True)
            tree = _call(_OPEN_TREE, _AT_FDCWD, os.fsencode(layer), _OPEN_TREE_CLONE)
            wanted = _Attributes(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=namespace)
            size = ctypes.sizeof(wanted)
            _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), size)
            _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
            os.close(tree)
            stack.callback(_unmount, target)
            shifted.append(target)
        whole, upper, work = (place / name for name in ("files", "upper", "work"))
        for directory in (whole, upper, work):
            directory.mkdir()
            os.chown(directory, ID_START, ID_START)
        options = f"lowerdir={':'.join(map(str, shifted))},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", whole], check=True)
        stack.callback(_unmount, whole)
        yield whole


def _unmount(place: Path) -> None:
    # Lazily: what still ends there must not fail a test.
    subprocess.run(["umount", "--lazy", place], check=True)


def _layers(root: Path) -> list[str]:
    """Return the directories of an overlay mount, the uppermost first."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == str(root):
            options = dict(word.partition("=")[::2] for word in after.split()[2].split(","))
            # Relative to buildah's storage, where the line would else be too long.
            home = root.parents[1]
            lower = [str(Path(home, word)) for word in options["lowerdir"].split(":")]
            return [str(Path(home, options["upperdir"])), *lower] if "upperdir" in options else lower
    msg = f"{root} is no mount"
    raise AssertionError(msg)
