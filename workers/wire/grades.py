"""Classes of isolation: the report of a canary build, and the class that follows from it.

| class | means |
| --- | --- |
| A | a Linux sandbox whose builders have user ids of their own, and which shows nothing that could be changed |
| B | the macOS sandbox, which has one network and one file system with the machine but keeps builds from its files |
| C | anything weaker, and whatever was not measured |

Rules: 1. The class follows from the report alone, by the table `_RULES`; each finding has its own sentence. 2. What a
report leaves out is no finding, except for the user that builders run as: a worker that cannot show it is class C.
3. Nothing here is secret, and all of it is bounded, because it travels with every greeting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

#: All classes, best first.
LEVELS: Final = ("A", "B", "C")
#: Device nodes that Nix puts into a sandbox.
NIX_DEVICES: Final = frozenset(
    {"console", "fd", "full", "kvm", "null", "ptmx", "pts", "random", "shm"}
    | {"stderr", "stdin", "stdout", "tty", "urandom", "zero"}
)
#: Processes that a sandbox with a process table of its own shows to the canary, at most.
OWN_PROCESSES: Final = 8
#: Seconds by which the clock of a build may differ from the worker's.
CLOCK_DIFFERS_S: Final = 120.0
#: The remedy where none is better.
_SANDBOX: Final = "set `sandbox = true` in the nix.conf of the worker's Nix"
_USERS: Final = "give its Nix build users of its own (`build-users-group`)"
_NETWORK: Final = "start the worker as root, so that builds get a network of their own"

_Word = Annotated[str, Field(max_length=300)]
_Words = Annotated[tuple[_Word, ...], Field(max_length=64)]


class CanaryReport(BaseModel):
    """Findings of one canary build, and the agent's from outside. None: it could not be found out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: Literal["linux", "darwin"] = "linux"
    #: Ids inside the sandbox, and its map of users as /proc has it.
    uid: int | None = None
    gid: int | None = None
    uid_map: _Words = ()
    #: The user that the builder is for the machine, seen by the agent; the agent's own; whether others run as it too.
    host_uid: int | None = None
    agent_uid: int = 0
    host_uid_shared: bool = False
    #: Network interfaces of a build, and of a fixed-output one.
    interfaces: _Words = ()
    fixed_interfaces: _Words = ()
    #: Whether the agent's socket on the loopback stands in the build's list of sockets, or was reached.
    sees_host_sockets: bool = False
    fixed_sees_host_sockets: bool = False
    fixed_reaches_loopback: bool = False
    #: First names in the root directory.
    root: _Words = ()
    #: Files of the agent's: one that everybody may read in the machine's /tmp, one that only the agent may read.
    sees_host_files: bool = False
    reads_secrets: bool = False
    #: Whether the environment of the agent's process was read.
    reads_agent: bool = False
    #: Probed paths that can be written, of `workers.agent.canary.PROBES`.
    writable: _Words = ()
    #: Whether the canary's input could be made writable, whether a file that it made lies in the real store.
    changes_inputs: bool = False
    reaches_store: bool = False
    host_name: _Word = ""
    #: Whether that is the machine's.
    shows_host_name: bool = False
    #: Processes that /proc shows.
    processes: int | None = None
    devices: _Words = ()
    makes_setuid: bool | None = None
    clock_differs: bool = False
    #: Whether a variable of the agent's own environment was there.
    shows_environment: bool = False

    @property
    def outside_sandbox(self) -> bool:
        """True if there is no sandbox at all."""
        if self.kernel == "darwin":
            return self.sees_host_files
        return self.sees_host_files and (self.processes or 0) > OWN_PROCESSES


class IsolationGrade(BaseModel):
    """The class of a worker, why it is no better, and what it follows from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    level: Literal["A", "B", "C"] = "C"
    #: A clause each, weightiest first; empty for class A.
    reasons: _Words = ()
    #: What to do about the first reason.
    remedy: _Word = ""
    report: CanaryReport | None = None

    @property
    def summary(self) -> str:
        """The reasons in one clause."""
        return "; ".join(self.reasons)


#: Of a worker that reports nothing of its isolation, or could not measure it.
UNMEASURED: Final = IsolationGrade(
    reasons=("how it isolates builds was not measured",), remedy="start a worker of the coordinator's version"
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A finding, its sentence and its remedy."""

    found: Callable[[CanaryReport], bool]
    reason: Callable[[CanaryReport], str]
    remedy: str = _SANDBOX
    #: Whether a build outside a sandbox always has it, so that it need not be listed beside that.
    implied: bool = False


def _says(text: str) -> Callable[[CanaryReport], str]:
    return lambda _: text


def _outer_root(report: CanaryReport) -> bool:
    """Return whether by the map of users the builder is the host's root, where no view from outside is there."""
    uid = report.uid
    for line in report.uid_map:
        words = line.split()
        if len(words) == 3 and all(word.isdecimal() for word in words) and uid is not None:
            inner, outer, count = map(int, words)
            if inner <= uid < inner + count:
                return outer + uid - inner == 0
    return False


_RULES: Final = (
    _Rule(
        lambda r: r.outside_sandbox,
        _says("builds run outside Nix's sandbox (`sandbox = false`, as Debian's nix.conf has it)"),
    ),
    _Rule(
        lambda r: r.host_uid == 0 or (r.host_uid is None and _outer_root(r)),
        _says("builders run as the host's root"),
        _USERS,
    ),
    _Rule(
        lambda r: r.host_uid is not None and r.host_uid == r.agent_uid != 0,
        lambda r: f"builders run as the worker's own user ({r.agent_uid})",
        _USERS,
    ),
    _Rule(
        lambda r: r.kernel == "linux" and r.host_uid is None and not _outer_root(r),
        _says("the user that builders run as cannot be seen"),
        "run the worker on the machine that its Nix daemon builds on",
    ),
    _Rule(
        lambda r: r.host_uid_shared and r.host_uid not in (0, r.agent_uid),
        lambda r: f"other processes run as the builders' user ({r.host_uid})",
        _USERS,
    ),
    _Rule(
        lambda r: r.changes_inputs,
        _says("builds can change their inputs in the worker's store"),
        _USERS,
    ),
    _Rule(
        lambda r: r.reaches_store,
        _says("builds can put files into the worker's store"),
        implied=True,
    ),
    _Rule(
        lambda r: bool(r.writable),
        lambda r: f"builds can write {', '.join(r.writable)}",
        _USERS,
    ),
    _Rule(
        lambda r: r.reads_secrets or r.reads_agent,
        _says("builds can read the worker's own secrets"),
        "let the worker run as a user that builders are not",
    ),
    _Rule(
        lambda r: r.sees_host_files,
        _says("builds see the machine's files"),
        implied=True,
    ),
    _Rule(
        lambda r: r.kernel == "linux" and (r.sees_host_sockets or not set(r.interfaces) <= {"lo"}),
        _says("builds have the machine's network"),
        _NETWORK,
        implied=True,
    ),
    _Rule(
        lambda r: r.kernel == "linux" and (r.fixed_reaches_loopback or r.fixed_sees_host_sockets),
        _says("fixed-output builds reach what listens on the worker's loopback"),
        _NETWORK,
    ),
    _Rule(
        lambda r: (r.processes or 0) > OWN_PROCESSES,
        _says("builds see the machine's processes"),
        implied=True,
    ),
    _Rule(
        lambda r: r.kernel == "linux" and r.shows_host_name,
        _says("builds see the machine's name"),
        implied=True,
    ),
    _Rule(
        lambda r: r.kernel == "linux" and not set(r.devices) <= NIX_DEVICES,
        lambda r: f"builds see the devices {', '.join(sorted(set(r.devices) - NIX_DEVICES)[:4])}",
        implied=True,
    ),
    _Rule(
        lambda r: r.makes_setuid is True,
        _says("builds can make setuid programs"),
        "set `filter-syscalls = true` in the nix.conf of the worker's Nix",
    ),
    _Rule(
        lambda r: r.shows_environment,
        _says("builds see the worker's environment"),
        "start the Nix daemon without the worker's environment",
    ),
    _Rule(
        lambda r: r.clock_differs,
        _says("builds have another clock than the worker"),
        "set the clock of the machine that builds",
    ),
)


def grade(report: CanaryReport, shortfall: str = "") -> IsolationGrade:
    """Return the class that follows from a report, with all reasons why it is no better.

    `shortfall` says what the machine lacks, in one sentence; it is a better remedy than those that the table has.
    """
    found = [rule for rule in _RULES if rule.found(report) and not (rule.implied and report.outside_sandbox)]
    reasons = tuple([rule.reason(report)[:300] for rule in found])
    if reasons:
        return IsolationGrade(level="C", reasons=reasons, remedy=(shortfall or found[0].remedy)[:300], report=report)
    if report.kernel == "darwin":
        reason = "the macOS sandbox shares network, processes and host name with the machine"
        return IsolationGrade(level="B", reasons=(reason,), report=report)
    return IsolationGrade(level="A", report=report)
