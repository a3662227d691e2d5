"""Isolation of a worker's builds from its machine, chosen once at the worker's start.

| worker | builders are | by |
| --- | --- | --- |
| root, store of its own | users of a range that is this store's alone | `build_users`, in a mount namespace |
| root, the machine's store | the machine's build users (`nixbld`), else as above | the locks of that store |
| an ordinary user with sub-uids, store of its own | sub-uids of a part that is this store's alone | a user namespace |
| an ordinary user otherwise | the user itself, in Nix's sandbox | nothing: `shortfall` says what to install |
| macOS | the build users of the installed Nix | the installed Nix |

Daemons that build have a network of their own where the worker is root or has sub-uids: fixed-output builds reach the
outside through slirp4netns, and neither this machine nor the farm nor link-local addresses (`network_deny`,
`network_allow`). The rest of the daemons never build, and have the machine's network.

An operator's `build-users-group` is taken as it is. What is promised here is measured by a canary, not believed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.daemon import UNCONFINED, Confinement, Network, netlink, owner
from workers.agent.build_users import (
    MACHINE_REGISTRY,
    SPARE_IDS,
    IdRange,
    NoBuildUsersError,
    account_ids,
    claim,
    own_ids,
    sub_ids,
)
from workers.agent.sandbox_files import GROUP, copy_shell, cover_etc
from workers.agent.settings import HostSpec, WorkerSettings, offer

_log = logging.getLogger(__name__)

#: Inner id of the first build user in a user namespace, as Nix's own set-up counts them.
FIRST_INNER_ID = 30_001
#: Networks that a daemon's own may have; builds do not reach machines in it.
NETWORKS = ("10.0.2.0/24", "192.168.242.0/24", "172.30.242.0/24")
#: What no build has business with: link-local addresses, among them the metadata of most clouds; those of the others.
ALWAYS_DENIED = ("0.0.0.0/8", "169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32")
#: The message where there is no relay.
NO_OUTSIDE = (
    "fixed-output builds have no network: install `slirp4netns`, let the worker's user open /dev/net/tun "
    "(`chmod 666 /dev/net/tun`), and start the worker again."
)
#: How the relay gives up rights of its own.
RELAY_SWITCHES = ("--enable-sandbox", "--enable-seccomp")
#: Seconds that a trial of the namespaces may take.
TRIAL_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Isolation:
    """Isolation with which a worker's daemons are started.

    Attributes:
        machine: The machine, with the shell and the build users of the worker's own.
        confinement: Namespaces of daemons that do not build.
        building: Namespaces of daemons that build.
        environment: Variables of every daemon.
        shortfall: What is weaker than it could be and what to do about it, one sentence; empty where nothing is.
    """

    machine: HostSpec
    confinement: Confinement = UNCONFINED
    building: Confinement = UNCONFINED
    environment: Mapping[str, str] = field(default_factory=dict)
    shortfall: str = ""


def isolate(settings: WorkerSettings, machine: HostSpec) -> Isolation:
    """Prepare a worker's isolation; blocks, and only for the holder of the worker's lock. Logs what falls short."""
    if sys.platform != "linux":
        return Isolation(machine)
    directory = settings.state_dir / "sandbox"
    if machine.busybox:
        machine = replace(machine, busybox=copy_shell(machine.busybox, directory))
    network = _network(settings)
    root = os.geteuid() == 0
    found = Isolation(machine)
    if _wants_build_users(settings, machine, root=root):
        try:
            found = _with_build_users(settings, machine, directory, network, root=root)
        except NoBuildUsersError as error:
            found = replace(found, shortfall=str(error))
    if root and not found.building.network:
        found = _with_network(found, network)
    if found.building.network is not None and not found.building.network.relay:
        found = replace(found, shortfall=f"{found.shortfall} {NO_OUTSIDE}".strip())
    if found.shortfall:
        _log.warning("worker %s isolates its builds less than it could: %s", settings.name, found.shortfall)
    return found


def _wants_build_users(settings: WorkerSettings, machine: HostSpec, *, root: bool) -> bool:
    if "build-users-group" in settings.nix_options:
        return False
    return bool(settings.store) or (root and not machine.has_build_users)


def _with_build_users(
    settings: WorkerSettings, machine: HostSpec, directory: Path, network: Network, *, root: bool
) -> Isolation:
    """Raises `NoBuildUsersError` where the worker cannot have any."""
    slots = offer(settings, machine).slots
    confine = _confine_root if root else _confine_user
    plain = confine(settings, slots, directory, network.address(3) if network.relay else "")
    building = _tried(plain, network)
    # Where Nix locks the users in use: beside the paths, so that the lock is the store's own.
    state = {"NIX_STATE_DIR": f"{settings.store}/nix/var/nix"} if settings.store else {}
    # A user namespace does not have the group of /dev/kvm.
    kvm = machine.has_kvm and (root or bool(Path("/dev/kvm").stat().st_mode & 0o006))
    return Isolation(replace(machine, build_users_group=GROUP, has_kvm=kvm), plain, building, state)


def _with_network(found: Isolation, network: Network) -> Isolation:
    """Add a network to builds that have no users of the worker's own."""
    try:
        return replace(found, building=_tried(UNCONFINED, network))
    except NoBuildUsersError as error:
        return replace(found, shortfall=found.shortfall or str(error))


def _network(settings: WorkerSettings) -> Network:
    """Return the network of daemons that build, without an outside where the relay is not installed."""
    program = shutil.which("slirp4netns")
    denied = [*ALWAYS_DENIED, *settings.network_deny]
    for host in settings.farm_hosts:
        denied += addresses_of(host)
    return Network(
        relay=(program, *RELAY_SWITCHES) if program else (),
        network=_free_network(),
        deny=tuple(denied),
        allow=settings.network_allow,
    )


def addresses_of(host: str) -> list[str]:
    """Return the IPv4 addresses of a host name; none where it has none or cannot be looked up."""
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({str(address[0]) for *_, address in found})


def _free_network() -> str:
    """Return the first of `NETWORKS` that none of this machine's addresses is in."""
    try:
        own = [ipaddress.ip_address(address) for address in netlink.ipv4_addresses()]
    except OSError:
        own = []
    free = [text for text in NETWORKS if not any(address in ipaddress.ip_network(text) for address in own)]
    return (free or NETWORKS)[0]


def _confine_root(settings: WorkerSettings, slots: int, directory: Path, name_server: str) -> Confinement:
    ids = _claim(settings, MACHINE_REGISTRY, own_ids(), account_ids(), slots)
    return Confinement(binds=cover_etc(directory, ids.ids, ids.first, name_server))


def _confine_user(settings: WorkerSettings, slots: int, directory: Path, name_server: str) -> Confinement:
    uid, gid = os.geteuid(), os.getegid()
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        raise NoBuildUsersError(f"builds run as the worker's own user, {uid}, which is no account") from None
    user, pool = account.pw_name, sub_ids(account.pw_name, uid)
    if not (pool and shutil.which("newuidmap") and shutil.which("newgidmap")):
        message = (
            f"builds run as the user {user} itself: install `uidmap`, and give the user sub-uids with "
            f"`usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}` (or another free range)"
        )
        raise NoBuildUsersError(message)
    registry = Path(account.pw_dir, ".local/state/drover/build-users")
    ids = _claim(settings, registry, pool, [], slots)
    inner = range(FIRST_INNER_ID, FIRST_INNER_ID + ids.count)
    return Confinement(
        binds=cover_etc(directory, inner, inner.start, name_server),
        uid_map=(0, uid, 1, inner.start, ids.first, ids.count),
        gid_map=(0, gid, 1, inner.start, ids.first, ids.count),
    )


def _claim(settings: WorkerSettings, registry: Path, pool: list[range], taken: list[range], slots: int) -> IdRange:
    store = settings.physical_store
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoBuildUsersError(f"the store {store} cannot be made: {error.strerror}") from error
    return claim(registry, pool, taken, store, slots + SPARE_IDS)


def _tried(plain: Confinement, network: Network) -> Confinement:
    """Return the namespaces with the network, its relay confined as far as the machine lets it be, or without one.

    Raises `NoBuildUsersError` where the machine refuses the namespaces.
    """
    for relay in (network.relay, network.relay[:1]) if network.relay else ():
        with suppress(NoBuildUsersError):
            return _try(plain._replace(network=network._replace(relay=relay)))
    return _try(plain._replace(network=network._replace(relay=())))


def _try(confinement: Confinement) -> Confinement:
    """Run something that ends at once in the namespaces. Raises `NoBuildUsersError` where the machine refuses them."""
    command = [sys.executable, "-I", "-S", owner.__file__, *confinement.words(), "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRIAL_WITHIN_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoBuildUsersError(f"the namespaces of a build cannot be tried: {error}") from error
    if done.returncode:
        refusal = "; ".join(done.stderr.strip().splitlines()) or f"exit status {done.returncode}"
        raise NoBuildUsersError(f"this machine refuses the namespaces that keep builds apart: {refusal}")
    return confinement
