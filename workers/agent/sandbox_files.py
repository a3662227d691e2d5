"""Files that a worker's builds see in place of the host's: /bin/sh, and /etc with the farm's build users.

Nix binds some of the host's files into sandboxes. What is bound is a copy of the worker's own, so that nothing which
a build might do to it reaches the host.

/etc is covered as a whole and not file by file: a program that replaces the host's /etc/passwd (`useradd` does)
would take away a mount that lies over it, in every mount namespace. The cover has copies of the files below and
links to the rest, which lies at `HOST`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Name in the cover at which the host's own /etc is mounted.
HOST = ".host"
#: Name of the farm's group of build users, and what the names of the users begin with.
GROUP = "drover-build"
#: Groups of the host that build users are members of, as Nix's own are: /dev/kvm belongs to it.
SHARED_GROUPS = ("kvm",)
#: Sockets by which libc asks a cache of the host's accounts, which does not know the farm's.
ACCOUNT_CACHES = (Path("/run/nscd"), Path("/var/run/nscd"))
_NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nnetworks: files\n"
_HOSTS = "127.0.0.1 localhost\n::1 localhost\n"


def copy_shell(busybox: str, directory: Path) -> str:
    """Copy a static busybox to `sh` in the directory, read-only and in one step; return the copy's path."""
    return str(_place(directory / "sh", Path(busybox).read_bytes(), 0o555))


def cover_etc(directory: Path, user_ids: Sequence[int], group_id: int, name_server: str) -> tuple[tuple[str, str], ...]:
    """Make the cover of /etc in `directory` (emptied first) and an empty directory beside it.

    Args:
        directory: Of the worker alone.
        user_ids: Ids of the build users, as their daemon sees them.
        group_id: Id of their group.
        name_server: Address that builds ask for names; empty where they have no network.

    Returns:
        Binds for a `Confinement`, in order.
    """
    etc, empty = directory / "etc", directory / "empty"
    shutil.rmtree(etc, ignore_errors=True)
    (etc / HOST).mkdir(parents=True)
    empty.mkdir(exist_ok=True)
    files = _files(user_ids, group_id, name_server)
    for entry in Path("/etc").iterdir():
        if entry.name not in files:
            # A link is copied, since a relative one means something else at another depth.
            target = entry.readlink() if entry.is_symlink() else Path(HOST, entry.name)
            (etc / entry.name).symlink_to(target)
    for name, text in files.items():
        _place(etc / name, text.encode(errors="surrogateescape"), 0o444)
    caches = {str(place.resolve()) for place in ACCOUNT_CACHES if place.is_dir()}
    return (("/etc", str(etc / HOST)), (str(etc), "/etc"), *((str(empty), place) for place in sorted(caches)))


def _files(user_ids: Sequence[int], group_id: int, name_server: str) -> Mapping[str, str]:
    users = {f"{GROUP}-{number}": uid for number, uid in enumerate(user_ids, start=1)}
    members = ",".join(users)
    passwd = [line for line in _lines("passwd") if line.partition(":")[0] not in users]
    passwd += [f"{name}:x:{uid}:{group_id}:drover builds:/var/empty:/bin/false" for name, uid in users.items()]
    group = [_with_members(line, members) for line in _lines("group") if line.partition(":")[0] != GROUP]
    resolver = [line for line in _lines("resolv.conf") if re.match(r"\s*(search|domain|options)\s", line)]
    return {
        "passwd": _text(passwd),
        "group": _text([*group, f"{GROUP}:x:{group_id}:{members}"]),
        "nsswitch.conf": _NSSWITCH,
        "hosts": _text(_lines("hosts")) or _HOSTS,
        "services": _text(_lines("services")),
        "resolv.conf": _text([*resolver, f"nameserver {name_server}"] if name_server else []),
    }


def _with_members(line: str, members: str) -> str:
    if line.partition(":")[0] not in SHARED_GROUPS or line.count(":") != 3:
        return line
    return f"{line}{'' if line.endswith(':') else ','}{members}"


def _lines(name: str) -> list[str]:
    try:
        return Path("/etc", name).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _place(path: Path, data: bytes, mode: int) -> Path:
    """Write a file under its name in one step: a daemon that starts meanwhile sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
    Path(temporary).replace(path)
    return path
