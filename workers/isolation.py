"""What stands between a worker's builds and its machine, chosen once at the worker's start.

| worker | builders are | by |
| --- | --- | --- |
| root, store of its own | users of a range that is this store's alone | `build_users`, in a mount namespace |
| root, the machine's store | the machine's build users (`nixbld`), else as above | the locks of that store |
| an ordinary user with sub-uids, store of its own | sub-uids of a part that is this store's alone | a user namespace |
| an ordinary user otherwise | the user itself, in Nix's sandbox | nothing: `shortfall` says what to install |
| macOS | the build users of the installed Nix | the installed Nix |

An operator's `build-users-group` is taken as it is. What is promised here is measured by a canary, not believed.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.daemon import UNCONFINED, Confinement, owner
from workers.build_users import (
    MACHINE_REGISTRY,
    SPARE_IDS,
    IdRange,
    NoBuildUsersError,
    account_ids,
    claim,
    own_ids,
    sub_ids,
)
from workers.sandbox_files import GROUP, copy_shell, cover_etc
from workers.settings import Machine, WorkerSettings, offer

log = logging.getLogger(__name__)

#: Inner id of the first build user in a user namespace, as Nix's own set-up counts them.
FIRST_INNER_ID = 30_001
#: Seconds that a trial of the namespaces may take.
TRIAL_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a worker's daemons are started with.

    Attributes:
        machine: The machine, with the shell and the build users of the worker's own.
        confinement: Namespaces of every daemon.
        environment: Variables of every daemon.
        shortfall: What is weaker than it could be and what to do about it, one sentence; empty where nothing is.
    """

    machine: Machine
    confinement: Confinement = UNCONFINED
    environment: Mapping[str, str] = field(default_factory=dict)
    shortfall: str = ""


def isolate(settings: WorkerSettings, machine: Machine) -> Isolation:
    """Prepare a worker's isolation; blocks, and only for the holder of the worker's lock. Logs what falls short."""
    if sys.platform != "linux":
        return Isolation(machine)
    directory = settings.state_dir / "sandbox"
    if machine.busybox:
        machine = replace(machine, busybox=copy_shell(machine.busybox, directory))
    found = _with_build_users(settings, machine, directory)
    if found.shortfall:
        log.warning("worker %s isolates its builds less than it could: %s", settings.name, found.shortfall)
    return found


def _with_build_users(settings: WorkerSettings, machine: Machine, directory: Path) -> Isolation:
    root = os.geteuid() == 0
    theirs = "build-users-group" in settings.nix_options
    if theirs or (not settings.store and (not root or machine.has_build_users)):
        return Isolation(machine)
    slots = offer(settings, machine).slots
    try:
        confinement = _confine_root(settings, slots, directory) if root else _confine_user(settings, slots, directory)
        _try(confinement)
    except NoBuildUsersError as error:
        return Isolation(machine, shortfall=str(error))
    # Where Nix locks the users in use: beside the paths, so that the lock is the store's own.
    state = {"NIX_STATE_DIR": f"{settings.store}/nix/var/nix"} if settings.store else {}
    # A user namespace does not have the group of /dev/kvm.
    kvm = machine.has_kvm and (root or bool(Path("/dev/kvm").stat().st_mode & 0o006))
    return Isolation(replace(machine, build_users_group=GROUP, has_kvm=kvm), confinement, state)


def _confine_root(settings: WorkerSettings, slots: int, directory: Path) -> Confinement:
    ids = _claim(settings, MACHINE_REGISTRY, own_ids(), account_ids(), slots)
    return Confinement(binds=cover_etc(directory, ids.ids, ids.first, ""))


def _confine_user(settings: WorkerSettings, slots: int, directory: Path) -> Confinement:
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
        binds=cover_etc(directory, inner, inner.start, ""),
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


def _try(confinement: Confinement) -> None:
    """Run something that ends at once in the namespaces. Raises `NoBuildUsersError` where the machine refuses them."""
    command = [sys.executable, "-I", "-S", owner.__file__, *confinement.words(), "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRIAL_WITHIN_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoBuildUsersError(f"the namespaces of a build cannot be tried: {error}") from error
    if done.returncode:
        what = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise NoBuildUsersError(f"this machine refuses the namespaces that keep builds apart: {what[0]}")
