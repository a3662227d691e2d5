"""Namespaces of one daemon: what it sees of the host's accounts and files, and which network it has.

A build is a child of its daemon, so what the daemon cannot see a build cannot see. `infra.daemon.owner` reads a
`Confinement` from its arguments. The daemon's process enters it just before it becomes the daemon; the owner stays
outside and does what can only be done from there: it gives out the ids of a user namespace.

1. Mounts: a mount namespace of its own, in which directories lie read-only over others. Mounts that the host makes
   later still arrive (MS_SLAVE), mounts made here never leave.
2. Ids: an ordinary user's daemon is root of a user namespace that holds the user and some sub-uids, which
   `newuidmap` and `newgidmap` give out by /etc/subuid and /etc/subgid.
3. Network: a network namespace with a loopback of its own. A relay (slirp4netns) carries to the outside what builds
   send there. Routes of the namespace, which builds cannot change, prohibit the rest. The host's own addresses are
   prohibited, those too that it gets later. Without a relay there is no outside. The relay ends with the owner.

Linux only. This file stands alone, as `owner.py` does.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING or __name__ != "confinement":
    from infra.daemon import netlink
else:
    import netlink

#: Marks a confined command: `--confined OPTION... -- COMMAND...`.
CONFINED: Final = "--confined"
#: unshare(2), prctl(2), mount(2).
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWNET: Final = 0x4000_0000
PR_SET_DUMPABLE: Final = 4
MS_RDONLY: Final = 1
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
#: Exit status of a relay that cannot be started, as shells have it.
NOT_RUN: Final = 127
#: Flags that a read-only remount keeps (nosuid, nodev, noexec): a user namespace may not clear those of the host.
KEPT_FLAGS: Final = 2 | 4 | 8


#: Interface of the relay in the namespace, and its packets' size in bytes, which is the largest that it takes.
INTERFACE: Final = "tap0"
MTU: Final = 65_520


class ConfinementError(Exception):
    """The namespaces cannot be made; one sentence."""


class Network(NamedTuple):
    """A network of a daemon's own.

    Attributes:
        relay: slirp4netns and its switches; empty: there is no outside.
        network: IPv4 network of the namespace (`a.b.c.0/24`); the relay is its second address, names its third.
        deny: IPv4 networks that cannot be reached, beside the host's own addresses.
        allow: IPv4 networks that can be reached all the same.
    """

    relay: tuple[str, ...]
    network: str
    deny: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    def address(self, number: int) -> str:
        """Return an address of the namespace's network."""
        return f"{self.network.rpartition('.')[0]}.{number}"


class Confinement(NamedTuple):
    """The namespaces of one daemon; without anything it has those of its owner.

    Attributes:
        binds: (directory, place) pairs, in order: each directory lies read-only over its place.
        uid_map: Ids of a user namespace as (inner, outer, count) words of newuidmap(1); empty: no user namespace.
        gid_map: The same for groups.
        network: Its own network; None: the owner's.
    """

    binds: tuple[tuple[str, str], ...] = ()
    uid_map: tuple[int, ...] = ()
    gid_map: tuple[int, ...] = ()
    network: Network | None = None

    def words(self) -> list[str]:
        """Return the owner's arguments that stand before the command."""
        words = [CONFINED]
        for pair in self.binds:
            words += ["--bind", *pair]
        if self.uid_map:
            words += ["--ids", " ".join(map(str, self.uid_map)), " ".join(map(str, self.gid_map))]
        if (own := self.network) is not None:
            words += ["--network", own.network, " ".join(own.relay)]
            words += ["--routes", " ".join(own.deny), " ".join(own.allow)]
        return [*words, "--"] if len(words) > 1 else []


#: No namespaces of its own.
UNCONFINED: Final = Confinement()


def parse(words: Sequence[str]) -> tuple[Confinement, list[str]]:
    """Read back what `words` made and the command after it, as (confinement, command)."""
    rest = list(words)
    found = Confinement()
    if not rest or rest.pop(0) != CONFINED:
        return found, list(words)
    while (option := rest.pop(0)) != "--":
        first, second = rest.pop(0), rest.pop(0)
        if option == "--bind":
            found = found._replace(binds=(*found.binds, (first, second)))
        elif option == "--network":
            found = found._replace(network=Network(tuple(second.split()), first))
        elif option == "--routes" and found.network is not None:
            routes = found.network._replace(deny=tuple(first.split()), allow=tuple(second.split()))
            found = found._replace(network=routes)
        else:
            maps = [tuple(map(int, text.split())) for text in (first, second)]
            found = found._replace(uid_map=maps[0], gid_map=maps[1])
    return found, rest


class Launch:
    """One daemon on its way into its namespaces. Made before the fork; then `enter` in the child, `assist` outside."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        #: (read, write) ends: the child sends a byte once its namespaces are there, the owner once they are complete.
        self._entered = os.pipe()
        self._complete = os.pipe()
        #: Processes beside the daemon that live as long as it does.
        self.helpers: set[int] = set()
        #: The relay ends when this end of a pipe is closed, as the owner's death does.
        self._relay_lives = -1
        #: Receives changes to the host's addresses, from before they are first read.
        self._changes = netlink.open_socket(netlink.IPV4_ADDRESSES) if confinement.network else None
        self._addresses = netlink.ipv4_addresses() if confinement.network else []

    def enter(self) -> None:
        """Enter the namespaces; only in the process that becomes the daemon. Raises `ConfinementError`."""
        wanted = self._confinement
        os.close(self._entered[0])
        os.close(self._complete[1])
        try:
            kinds = CLONE_NEWNS
            kinds |= CLONE_NEWUSER if wanted.uid_map else 0
            kinds |= CLONE_NEWNET if wanted.network else 0
            _call("unshare", "namespaces", kinds)
            # What changes its rights is hidden from its own user, and the relay looks up its namespaces in /proc.
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            os.write(self._entered[1], b"1")
            if not os.read(self._complete[0], 1):
                raise ConfinementError("the namespaces stayed incomplete")
            if wanted.uid_map:
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
            _mount(wanted.binds)
            if wanted.network is not None:
                netlink.raise_loopback()
                _route(wanted.network, self._addresses)
        except OSError as error:
            raise ConfinementError(f"no namespaces for the daemon: {error.strerror}") from error
        os.close(self._entered[1])
        os.close(self._complete[0])

    def assist(self, daemon: int) -> None:
        """Complete the namespaces of the process from outside. Raises `ConfinementError`; the process ends then."""
        os.close(self._entered[1])
        os.close(self._complete[0])
        try:
            # Nothing comes where the process could not enter: its own message says why.
            if os.read(self._entered[0], 1):
                if self._confinement.uid_map:
                    _give_ids(daemon, "newuidmap", self._confinement.uid_map)
                    _give_ids(daemon, "newgidmap", self._confinement.gid_map)
                if self._confinement.network is not None:
                    self._relay(daemon, self._confinement.network)
                os.write(self._complete[1], b"1")
        finally:
            os.close(self._entered[0])
            os.close(self._complete[1])

    def _relay(self, daemon: int, network: Network) -> None:
        """Start the relay, wait until it works, and follow the host's addresses from now on."""
        if not network.relay:
            return
        ready, theirs_ready = os.pipe()
        theirs_lives, self._relay_lives = os.pipe()
        for descriptor in (theirs_ready, theirs_lives):
            os.set_inheritable(descriptor, True)
        words = [*network.relay, "--configure", f"--mtu={MTU}", f"--cidr={network.network}", "--disable-host-loopback"]
        words += [f"--ready-fd={theirs_ready}", f"--exit-fd={theirs_lives}", "--netns-type=path"]
        if self._confinement.uid_map:
            words.append(f"--userns-path=/proc/{daemon}/ns/user")
        words += [f"/proc/{daemon}/ns/net", INTERFACE]
        self.helpers.add(self._start_relay(words))
        for descriptor in (theirs_ready, theirs_lives):
            os.close(descriptor)
        came = os.read(ready, 1)
        os.close(ready)
        if not came:
            raise ConfinementError(f"the network did not come up: `{' '.join(words)}` ended")
        self._follow(daemon, network)

    def _start_relay(self, words: Sequence[str]) -> int:
        """Start the relay in a mount namespace that no change leaves, and return its process.

        The sandbox of slirp4netns 1.2 unmounts what it does not need and makes only the root private before. What is
        mounted on shared mounts below (the named network namespaces in /run/netns are) would be unmounted for the whole
        machine. In a user namespace the kernel keeps such changes in by itself.
        """
        relay = os.fork()
        if relay:
            return relay
        try:
            if not self._confinement.uid_map:
                _call("unshare", "the relay's mounts", CLONE_NEWNS)
                _call("mount", "/", None, b"/", None, MS_REC | MS_PRIVATE, None)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            os.execvp(words[0], list(words))  # noqa: S606 - the relay's command is this program's own
        finally:
            # Reached only where it cannot be started; the process that waits for it sees the end of its pipe.
            os._exit(NOT_RUN)

    def _follow(self, daemon: int, network: Network) -> None:
        """Prohibit addresses that the host gets later, too: the kernel announces each by SIGIO."""
        import fcntl  # noqa: PLC0415 - only where there is a network

        changes = self._changes
        if changes is None:
            return

        def changed(*_: object) -> None:
            changes.setblocking(False)
            try:
                while changes.recv(netlink.ANSWER_BYTES):
                    pass
            except OSError:
                pass  # all is read, or so much came that some was dropped: what is there now counts
            new = [address for address in netlink.ipv4_addresses() if address not in self._addresses]
            self._addresses += new
            if new:
                entered = os.fork()
                if entered == 0:
                    self._prohibit_from_outside(daemon, network, new)
                os.waitpid(entered, 0)

        signal.signal(signal.SIGIO, changed)
        descriptor = changes.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        changed()

    def _prohibit_from_outside(self, daemon: int, network: Network, addresses: Sequence[str]) -> None:
        """Enter the daemon's network and prohibit more; only in a process of its own, which ends."""
        try:
            for kind in (*(("user",) if self._confinement.uid_map else ()), "net"):
                _call("setns", kind, os.open(f"/proc/{daemon}/ns/{kind}", os.O_RDONLY), 0)
            _route(network, addresses)
        finally:
            os._exit(0)


def _mount(binds: Sequence[tuple[str, str]]) -> None:
    _call("mount", "/", None, b"/", None, MS_REC | MS_SLAVE, None)
    for source, target in binds:
        _call("mount", target, source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
        kept = os.statvfs(target).f_flag & KEPT_FLAGS
        _call("mount", target, None, target.encode(), None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept, None)


def _route(network: Network, host: Sequence[str]) -> None:
    for denied in (*network.deny, *host):
        netlink.prohibit(denied)
    if network.relay:
        for allowed in network.allow:
            netlink.allow(allowed, network.address(2))


def _give_ids(process: int, program: str, ids: Sequence[int]) -> None:
    words = [program, str(process), *map(str, ids)]
    try:
        child = os.posix_spawnp(program, words, os.environ)
    except OSError as error:
        raise ConfinementError(f"{program} cannot be started: {error.strerror}") from error
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise ConfinementError(f"`{' '.join(words)}` ended with status {code}")


def _call(name: str, subject: str, *arguments: object) -> None:
    """Call the C library, raising `ConfinementError` for what it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise ConfinementError(f"{name} of {subject} failed: {os.strerror(ctypes.get_errno())}")
