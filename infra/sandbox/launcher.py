"""Launcher of one program in a sandbox: a small program between us and it.

    python -I -S launcher.py SANDBOX COMMAND...

`SANDBOX` is the JSON of a `Sandbox`. The program sees a file system of its own in memory with a few directories of the
machine read-only in it, no process but its own, no network but (where it is wanted) an empty loopback, and runs as a
user that owns nothing of the machine, without capabilities, behind a filter of system calls and under limits. Its
standard streams are the launcher's; it has no other descriptor.

1. The launcher makes the namespaces and forks. It stays outside and returns the program's status.
2. The child is the first process of its namespace: it mounts, gives up its rights, and forks the program. The kernel
   ends all that runs in the namespace with it.
3. Each dies with the one above: the end of the coordinator, however it ends, ends all of it.

As root the program becomes the user `Sandbox.uid`, which nothing else has. An ordinary user's is the user itself in a
user namespace that maps it alone. Linux only. This file stands alone: it is run without the program's packages.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING or __name__ != "__main__":
    from infra.sandbox import system_calls
else:
    # Run in isolation, the directory of this file is not looked in; the standard library comes first. All is imported
    # here: once the sandbox is made there may be no library.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib: slow to import
    import system_calls

#: unshare(2): mounts, names, IPC, users, processes, network, control groups.
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWCGROUP: Final = 0x0200_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000
#: mount(2), umount2(2), mount_setattr(2).
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
MOUNT_SETATTR: Final = 442
AT_FDCWD: Final = -100
AT_RECURSIVE: Final = 0x8000
READ_ONLY: Final = 1 | MS_NOSUID | MS_NODEV
#: prctl(2).
PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38
#: capset(2), version 3.
_CAPABILITIES: Final = 0x2008_0522
#: Exit status where the sandbox cannot be made, or the command cannot be run in it.
NOT_MADE: Final = 126
NOT_RUN: Final = 127
#: Where the root of the sandbox lies on the machine while it is made; only the sandbox sees what is mounted there.
MAKING: Final = "/tmp"  # noqa: S108 - a place to mount at that every machine has
#: Its first process and the kernel's own devices.
DEVICES: Final = ("null", "zero", "full", "random", "urandom")
#: The program's user, as it sees it, where a user namespace maps it.
INNER_ID: Final = 1000
#: The kernel kills what runs here before all else when memory ends.
FIRST_TO_DIE: Final = 1000
#: What else runs on the machine comes first.
NICENESS: Final = 10
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1


class Sandbox(NamedTuple):
    """View and bounds of one program. Paths are absolute; sizes are bytes.

    Attributes:
        uid: User and group that it becomes; 0: the present one, in a user namespace.
        binds: (place on the machine, place in the sandbox) pairs, shown read-only.
        links: (target, place) pairs of symlinks.
        files: (place, text) pairs of small files.
        directories: Places that are the program's own.
        scratch_bytes: Size of all that it writes.
        scratch_files: Files and directories that it makes.
        processes: Processes and threads at one time.
        memory_bytes: Data of each process.
        loopback: Whether it has a loopback, on which nothing listens but itself.
    """

    uid: int
    binds: tuple[tuple[str, str], ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    directories: tuple[str, ...] = ("/tmp",)  # noqa: S108 - a place in the sandbox
    scratch_bytes: int = 256 * 1024 * 1024
    scratch_files: int = 100_000
    processes: int = 64
    memory_bytes: int = 2 * 1024 * 1024 * 1024
    loopback: bool = False

    def words(self) -> list[str]:
        """Return the launcher's arguments that stand before the command."""
        return [json.dumps(self._asdict())]


def main(words: list[str]) -> int:
    """Run the command in the sandbox; returns its exit status, 128 more than the signal that ended it."""
    sandbox, command = Sandbox(**json.loads(words[0])), words[1:]
    above = os.getppid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != above:
        return NOT_MADE
    try:
        _separate(sandbox)
    except OSError as error:
        return _complain(f"this machine refuses the namespaces of a sandbox: {error.strerror}")
    # Its end is that of the launcher, which alone holds the other end.
    launcher_lives, ours = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(ours)
        _be_first(sandbox, command, launcher_lives)
    os.close(launcher_lives)
    for descriptor in (0, 1):
        os.dup2(_null(), descriptor, inheritable=False)
    status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    return 128 - status if status < 0 else status


def _separate(sandbox: Sandbox) -> None:
    """Leave the machine's namespaces; processes begin anew with the next fork."""
    uid, gid = os.geteuid(), os.getegid()
    kinds = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP
    _call("unshare", kinds if sandbox.uid else kinds | CLONE_NEWUSER)
    if not sandbox.uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_ID} {uid} 1"),
            ("gid_map", f"{INNER_ID} {gid} 1"),
        ):
            _write(f"/proc/self/{name}", text)


def _be_first(sandbox: Sandbox, command: list[str], launcher_lives: int) -> None:
    """Be the first process of the namespace: make the rest of the sandbox, run the command; never returns."""
    status = NOT_MADE
    try:
        _write("/proc/self/oom_score_adj", str(FIRST_TO_DIE))
        os.nice(NICENESS)
        _make_root(sandbox)
        if sandbox.loopback:
            _raise_loopback()
        socket.sethostname("evaluation")
        _limit(sandbox)
        _give_up_rights(sandbox)
        # After the change of user, at which the kernel forgets it. What came before shows at the pipe.
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([launcher_lives], [], [], 0)[0]:
            os._exit(NOT_MADE)
        system_calls.install()
        program = os.fork()
        if program == 0:
            _become(command)
        for descriptor in (0, 1):
            os.dup2(_null(), descriptor, inheritable=False)
        ended = 0
        while ended != program:
            # Also collects what lost its parent.
            ended, found = os.wait()
            status = os.waitstatus_to_exitcode(found)
        status = 128 - status if status < 0 else status
    except OSError as error:
        _complain(f"the sandbox cannot be made: {error.strerror or error}{_named(error)}")
    finally:
        os._exit(status)


def _make_root(sandbox: Sandbox) -> None:
    """Make the file system of the sandbox and go into it; nothing of the machine's stays."""
    owner = sandbox.uid or INNER_ID
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    binds = (*sandbox.binds, *((f"/dev/{name}", f"/dev/{name}") for name in DEVICES))
    # Before something lies over them.
    sources = [os.open(source, os.O_PATH | os.O_CLOEXEC) for source, _ in binds]
    size = f"size={sandbox.scratch_bytes},nr_inodes={sandbox.scratch_files},mode=755"
    _mount("tmpfs", MAKING, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for source, (_, place) in zip(sources, binds, strict=True):
        _bind(source, MAKING + place)
        os.close(source)
    for place, text in sandbox.files:
        os.makedirs(os.path.dirname(MAKING + place), exist_ok=True)  # noqa: PTH103, PTH120 - pathlib: as above
        _write(MAKING + place, text, os.O_CREAT | os.O_EXCL)
    for target, place in sandbox.links:
        os.makedirs(os.path.dirname(MAKING + place), exist_ok=True)  # noqa: PTH103, PTH120 - as above
        os.symlink(target, MAKING + place)  # noqa: PTH211 - as above
    for place in sandbox.directories:
        os.makedirs(MAKING + place, exist_ok=True)  # noqa: PTH103 - as above
        os.chown(MAKING + place, owner, owner)
    os.mkdir(f"{MAKING}/proc")  # noqa: PTH102 - as above
    _mount("proc", f"{MAKING}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(MAKING)
    # Over itself, then away with what lies below: the kernel's own way without a directory for the old root.
    _call("syscall", _PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


#: pivot_root(2), which the C library does not have.
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}


def _bind(source: int, place: str) -> None:
    """Show an open file or directory of the machine read-only, with all that is mounted below it."""
    mode = os.fstat(source).st_mode
    if stat.S_ISDIR(mode):
        os.makedirs(place, exist_ok=True)  # noqa: PTH103 - as above
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)  # noqa: PTH103, PTH120 - as above
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _mount(f"/proc/self/fd/{source}", place, None, MS_BIND | MS_REC)
    flags = 1 | MS_NOSUID if stat.S_ISCHR(mode) else READ_ONLY
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, attributes, len(attributes))


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, name))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _limit(sandbox: Sandbox) -> None:
    """Limit each process; the user's count of processes is the sandbox's, since nothing else has the user."""
    for kind, most in (
        (resource.RLIMIT_NPROC, sandbox.processes),
        (resource.RLIMIT_DATA, sandbox.memory_bytes),
        (resource.RLIMIT_FSIZE, sandbox.scratch_bytes),
        (resource.RLIMIT_NOFILE, 4096),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))


def _give_up_rights(sandbox: Sandbox) -> None:
    if sandbox.uid:
        os.setgroups([])
        os.setresgid(sandbox.uid, sandbox.uid, sandbox.uid)
        os.setresuid(sandbox.uid, sandbox.uid, sandbox.uid)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    header, nothing = struct.pack("=Ii", _CAPABILITIES, 0), bytes(24)
    _call("capset", header, nothing)


def _become(command: list[str]) -> None:
    """Become the command; never returns."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        # Python ignores these, and what is ignored is inherited.
        signal.signal(number, signal.SIG_DFL)
    # What it becomes a child of may not be killed or traced by it: they are one user.
    try:
        os.setsid()
        os.execvp(command[0], command)  # noqa: S606 - the command is our own
    except OSError as error:
        _complain(f"{command[0]} cannot be started in the sandbox: {error.strerror}")
    os._exit(NOT_RUN)


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _write(path: str, text: str, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _mount(source: str | None, place: str, kind: str | None, flags: int, data: str = "") -> None:
    arguments: list[Any] = [None if text is None else text.encode() for text in (source, place, kind)]
    try:
        _call("mount", *arguments, flags, data.encode() or None)
    except OSError as error:
        raise OSError(error.errno, error.strerror, place) from None


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _call(name: str, *arguments: object) -> None:
    """Call the C library. Raises `OSError` for what it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _named(error: OSError) -> str:
    return f" ({error.filename.removeprefix(MAKING)})" if isinstance(error.filename, str) else ""


def _complain(sentence: str) -> int:
    os.write(2, f"{sentence}\n".encode())
    return NOT_MADE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
