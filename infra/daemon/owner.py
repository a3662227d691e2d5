"""Owner of one daemon and all its descendants: a small program between us and `nix-daemon --stdio`.

    python -I -S owner.py [--confined OPTION... --] COMMAND...

What stands before the command is a `Confinement` (`infra.daemon.confinement`): the namespaces that the daemon enters.

Nix kills the process group of a builder. A process that called setsid or was forked twice has left it, and a daemon
that is killed kills no builder. So the owner is a *subreaper* (prctl(2)): a descendant that loses its parent becomes
its child, and it ends only when it has no child left. It ends with its daemon: the descendants that are left then are
killed. SIGTERM, SIGINT and SIGHUP make it kill all of them at once; the death of the owner sends its daemon SIGTERM.
SIGUSR1 makes it kill those that lost their parent: what a build left that has ended while the daemon goes on.

The streams are the daemon's alone: the owner closes its own, so the daemon's end shows as their end, and hanging up
(also by the death of the holder of the other ends) reaches the daemon directly.

Subreapers are Linux's. Elsewhere the owner knows its daemon's process group only, and a process that left it survives.
This file stands alone: it is run without the program's packages, which take longer to import than it takes to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING or __name__ != "__main__":
    from infra.daemon import confinement
else:
    # Run in isolation, the directory of this file is not looked in; the standard library comes first.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib: as below
    import confinement

#: prctl(2).
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
#: Seconds between two looks at what is left, and until the owner gives up (a process in an uninterruptible wait).
LOOK_AGAIN_S: Final = 0.005
GIVE_UP_S: Final = 20.0
#: Exit status where the command cannot be run, as shells have it.
NOT_RUN: Final = 127
LINUX: Final = sys.platform == "linux"


def main(words: Sequence[str]) -> int:
    """Run the command, end what it leaves behind, and return its exit status (or end by its signal)."""
    confined, command = confinement.parse(words)
    launch = confinement.Launch(confined) if any(confined) else None
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    owner = os.getpid()
    daemon = os.fork()
    if daemon == 0:
        _become(command, owner, launch)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        # Not only closed: the next file that is opened would take the number, and stand where a stream is expected.
        os.dup2(nothing, descriptor, inheritable=False)
    if launch is not None:
        _assist(launch, daemon)

    _listen(daemon, frozenset({daemon} | (launch.helpers if launch is not None else set())))
    status = 0
    ended = 0
    while ended != daemon:
        # Also collects orphans that ended.
        ended, status = os.wait()
    _end_rest(daemon)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(owner, -code)
    return code


def _listen(daemon: int, kept: frozenset[int]) -> None:
    """Take the signals by which builds are ended; `kept` are the owner's children that are no build's."""

    def end(_number: int, _frame: FrameType | None) -> None:
        _kill_all(daemon)

    def end_orphans(_number: int, _frame: FrameType | None) -> None:
        _kill_orphans(kept)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    if LINUX:
        signal.signal(signal.SIGUSR1, end_orphans)


def _end_rest(daemon: int) -> None:
    """Kill until no child is left."""
    deadline = time.monotonic() + GIVE_UP_S
    while _has_children() and time.monotonic() < deadline:
        _kill_all(daemon)
        time.sleep(LOOK_AGAIN_S)
    if not LINUX:
        _kill_all(daemon)


def _become(command: Sequence[str], owner: int, launch: confinement.Launch | None) -> None:
    """Become the command; never returns."""
    # Python ignores these, and what is ignored is inherited: a builder's `yes | head` would never end.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        if launch is not None:
            launch.enter()
        if LINUX:
            # After the namespaces: the kernel forgets it when a process gets other credentials.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == owner:
            os.execvp(command[0], list(command))  # noqa: S606 - the daemon's command is the operator's
    except confinement.ConfinementError as error:
        _complain(str(error))
    except OSError as error:
        _complain(f"{command[0]} cannot be started: {error.strerror}")
    os._exit(NOT_RUN)


def _assist(launch: confinement.Launch, daemon: int) -> None:
    """Complete the daemon's namespaces; where that fails, the daemon never begins."""
    try:
        launch.assist(daemon)
    except confinement.ConfinementError as error:
        _complain(str(error))


def _complain(sentence: str) -> None:
    os.write(2, f"{sentence}\n".encode())


def _has_children() -> bool:
    """Collect the children that ended; return whether any is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _kill_all(daemon: int) -> None:
    """Send SIGKILL to every descendant; what is forked meanwhile is found by the next call."""
    if not LINUX:
        _kill(-daemon)
        return
    for pid in descendants(os.getpid(), parents()):
        _kill(pid)


def _kill_orphans(kept: frozenset[int]) -> None:
    """Kill what became a child of the owner and is none of `kept`, with all below it; the main loop collects them."""
    # Twice, since the kernel may leave one out while another one ends. Nearly every build leaves nothing, and a look at
    # all processes of the machine costs some 10 ms.
    if _own_children() <= kept and _own_children() <= kept:
        return
    deadline = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        above = parents()
        orphans = [pid for pid, parent in above.items() if parent == os.getpid() and pid not in kept]
        alive = [pid for pid in orphans if not _has_ended(pid)]
        if not alive:
            return
        for pid in (below for orphan in alive for below in (orphan, *descendants(orphan, above))):
            _kill(pid)
        time.sleep(LOOK_AGAIN_S)


def _own_children() -> frozenset[int]:
    """Return this process's children; itself instead of them where the kernel does not list them."""
    own = os.getpid()
    try:
        with open(f"/proc/{own}/task/{own}/children", "rb") as file:  # noqa: PTH123 - pathlib: as below
            return frozenset(map(int, file.read().split()))
    except (OSError, ValueError):
        return frozenset((own,))


def _has_ended(pid: int) -> bool:
    """Collect a child that ended; whether it is gone."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def parents() -> dict[int, int]:
    """Return process -> parent of all processes, from /proc; nothing where there is none."""
    found: dict[int, int] = {}
    if not LINUX:
        return found
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib takes longer to import than this to run
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
                    # pid (name) state ppid ...; the name may hold anything, parentheses and blanks included.
                    found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile
    return found


def descendants(root: int, parent_of: Mapping[int, int]) -> list[int]:
    """Return all processes below `root`, parents before children."""
    children: dict[int, list[int]] = {}
    for pid, parent in parent_of.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    layer = [root]
    while layer:
        layer = [child for pid in layer for child in children.get(pid, ())]
        found += layer
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
