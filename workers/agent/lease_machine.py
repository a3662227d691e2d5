"""The decisions of one worker, without clock or I/O: when a lease is fetched, built, handed back, and what it means.

Each accepted lease walks `queued -> fetching -> ready -> building -> uploading -> reporting` and leaves at
`acknowledged`; a lease may go to `reporting` from anywhere. The shell reports what happened (`accept`, `fetched`,
`built`, `report`, …) with the time, then carries out `next_actions`. Rules:

- Inputs of every lease in hand are fetched at once; only a build needs a slot, so a slot never waits for a download
  while another lease is ready. Slots are given in order of arrival.
- A slot is free again when its build ends; uploading goes on beside the next build, up to `MAX_UPLOADS_PER_SLOT`.
- Backlog: very short builds would leave slots idle for a round trip to the coordinator, so the worker asks for as many
  leases beyond its slots as make `BACKLOG_S` seconds of work, by a moving mean of the latest builds.
- The worker may offer fewer slots than it has (`workers.agent.admission`): what runs goes on, nothing more begins.
- Builds whose need of memory is known run side by side only as far as the machine's memory goes; one that takes
  more than all of it runs when no other of them does. It is a hint: a build without one counts for nothing.
- A lease that waited `HAND_BACK_S` behind busy slots, or for memory, is handed back: another worker may be free.
- One that follows others (`following`) fetches what else it needs and waits until these are built, without a slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from workers.agent import refusals
from workers.agent.following import Following
from workers.agent.lease_actions import Action, Build, Fetch, HandBack, LeaseKey
from workers.wire.reasons import Reason

#: Seconds of expected work kept waiting per slot.
BACKLOG_S = 0.25
#: Most leases kept waiting per slot, however short builds are.
MAX_BACKLOG_PER_SLOT = 8
#: Weight of the latest build in the moving mean of durations.
MEAN_WEIGHT = 0.2
#: Seconds after which a lease that waits behind busy slots is handed back.
HAND_BACK_S = 2.0
#: Uploads beside running builds; where there are more, slots wait.
MAX_UPLOADS_PER_SLOT = 4
#: Leases in hand, whatever the coordinator sends; more are handed back at once.
MAX_LEASES = 4096


class LeaseState(StrEnum):
    """States of a lease in the worker."""

    QUEUED = "queued"
    FETCHING = "fetching"
    READY = "ready"
    BUILDING = "building"
    UPLOADING = "uploading"
    REPORTING = "reporting"


#: The legal moves; REPORTING is reached from every state before it.
NEXT: Mapping[LeaseState, LeaseState] = MappingProxyType(
    {
        LeaseState.QUEUED: LeaseState.FETCHING,
        LeaseState.FETCHING: LeaseState.READY,
        LeaseState.READY: LeaseState.BUILDING,
        LeaseState.BUILDING: LeaseState.UPLOADING,
        LeaseState.UPLOADING: LeaseState.REPORTING,
    }
)
_WAITING = (LeaseState.QUEUED, LeaseState.FETCHING, LeaseState.READY)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Report of the end of a build; `reason` None is success."""

    reason: Reason | None
    #: Put before the daemon's text.
    text: str = ""


_INFRASTRUCTURE: Reason = "infrastructure"
#: Reasons of builds that ran to an end of their own: how long they took is evidence for the next.
_RAN: tuple[Reason, ...] = ("permanent", "output_rejected", "hash_mismatch", "not_deterministic")
#: Reasons that stand for nothing where a disk was full while the build ran.
_MAYBE_THE_DISK: tuple[Reason, ...] = ("permanent", "output_rejected", "transient", "source_gone", _INFRASTRUCTURE)
#: Reasons after which the machine itself is put to the test.
DOUBTFUL: tuple[Reason | None, ...] = (_INFRASTRUCTURE, "daemon_lost", "connection_lost", "disk_low", "input_missing")
#: The one table from the daemon's build status (infra/nix/FORMATS.md 5.1) to the verdict. The scheduler decides what
#: is built again.
STATUS_POLICY: Mapping[int, Verdict] = MappingProxyType(
    {
        0: Verdict(None),
        1: Verdict(None),
        2: Verdict(None),
        13: Verdict(None),
        3: Verdict("permanent", "the builder failed"),
        # Wrong system or features since Nix 2.30: the worker was offered what it does not have.
        4: Verdict(_INFRASTRUCTURE, "the worker's Nix does not accept this build"),
        5: Verdict("output_rejected", "an output was not accepted"),
        # A failing fixed-output builder (a server that does not answer).
        6: Verdict("transient", "the builder failed in a way that may pass"),
        7: Verdict("permanent", "the builder failed before"),
        8: Verdict("timeout", "the build was stopped at its limit of time"),
        # Nix-level errors: a sandbox that cannot be set up, a wrong system before Nix 2.30.
        9: Verdict(_INFRASTRUCTURE, "Nix could not run the build"),
        10: Verdict(_INFRASTRUCTURE, "Nix could not run the build"),
        11: Verdict("log_limit", "the build printed more than its limit"),
        12: Verdict("not_deterministic", "the build is not deterministic"),
        14: Verdict(_INFRASTRUCTURE, "Nix tried to substitute instead of building"),
        15: Verdict("hash_mismatch", "an output has another hash than it must have"),
    }
)
_DISK_LOW = Verdict("disk_low", "the worker's disk is full")
_SOURCE_GONE = Verdict("source_gone", "the address of the source says that there is nothing")
#: How the operating system and SQLite say so, in Nix's words and in Python's.
NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
_NO_SPACE = tuple((words, _DISK_LOW) for words in NO_SPACE_WORDS)
_UNKNOWN_STATUS = Verdict(_INFRASTRUCTURE, "Nix ended the build in a way that this worker does not know")
#: Where one status stands for several things, words in the daemon's text distinguish them. They are hints: a text that
#: has none of them means what the status means.
HINTS: Mapping[int, tuple[tuple[str, Verdict], ...]] = MappingProxyType(
    {
        # A builder killed from outside is reported like one that failed.
        3: (("signal 9", Verdict("killed", "the builder was killed from outside, often for lack of memory")),),
        5: (("hash mismatch", Verdict("hash_mismatch", "an output has another hash than it must have")),),
        6: (
            ("free disk space", _DISK_LOW),
            # Nix's own fetcher, and curl as most recipes call it.
            *(
                (words, _SOURCE_GONE)
                for words in ("HTTP error 404", "HTTP error 410", "returned error: 404", "returned error: 410")
            ),
        ),
        8: (("of silence", Verdict("silence", "the build was stopped at its limit of silence")),),
        9: (
            ("substitution is disabled", Verdict("input_missing", "an input is missing in the worker's store")),
            ("unsupported JSON type", Verdict("permanent", "the builder printed an @nix line that Nix cannot read")),
            *_NO_SPACE,
        ),
        10: _NO_SPACE,
    }
)


class Trouble(StrEnum):
    """Ends of a lease beside a build status."""

    DERIVATION_UNREADABLE = "the derivation cannot be read"
    INPUT_MISSING = "an input could not be fetched"
    #: Before or after the build ran; `CONNECTION_LOST` is while it ran.
    DAEMON_LOST = "the connection to the Nix daemon broke"
    CONNECTION_LOST = "the connection to the Nix daemon broke during the build"
    DAEMON_REFUSED = "the Nix daemon refused"
    UPLOAD_FAILED = "an output could not be uploaded"
    DISK_LOW = "the worker's disk is full"
    #: Limits that the worker keeps itself.
    TIMED_OUT = "the build was stopped at its limit of time"
    SILENT = "the build was stopped at its limit of silence"
    LOG_TOO_LARGE = "the build printed more than its limit"
    LOG_ENDLESS = "the builder printed a line that is too long for Nix"
    LOG_UNREADABLE = "the builder printed an @nix line that Nix cannot read"
    OUTPUT_TOO_LARGE = "an output is larger than its limit"
    KILLED = "the builder was killed from outside"
    UNEXPECTED = "the worker failed"
    NOT_GREETED = "the worker has not been told about its farm yet"
    CANCELLED = "stopped on request"
    NOT_STARTED = "handed back without having been started"
    NOT_BUILT_HERE = "handed back because what it was to follow was not built here"
    STOPPING = "handed back because the worker is stopping"
    #: Stopped because the worker stops: another one begins anew.
    DRAINED = "handed back because the worker stops"
    #: `workers.agent.input_guard`: what was built is thrown away; what would be built now has to wait.
    INPUT_CHANGED = "an input is not what it was"
    MENDING = "handed back until what changed in the worker's store is mended"


#: The other half of the table: from trouble to the reason on the wire.
TROUBLE_POLICY: Mapping[Trouble, Reason] = MappingProxyType(
    {
        # The same bytes are as unreadable on every worker.
        Trouble.DERIVATION_UNREADABLE: "permanent",
        Trouble.INPUT_MISSING: "input_missing",
        Trouble.DAEMON_LOST: "daemon_lost",
        Trouble.CONNECTION_LOST: "connection_lost",
        Trouble.DAEMON_REFUSED: "daemon_lost",
        Trouble.UPLOAD_FAILED: "upload_failed",
        Trouble.DISK_LOW: "disk_low",
        Trouble.TIMED_OUT: "timeout",
        Trouble.SILENT: "silence",
        Trouble.LOG_TOO_LARGE: "log_limit",
        Trouble.LOG_ENDLESS: "log_limit",
        # The same line ends the build on every worker that has this Nix.
        Trouble.LOG_UNREADABLE: "permanent",
        Trouble.OUTPUT_TOO_LARGE: "output_size",
        Trouble.KILLED: "killed",
        Trouble.UNEXPECTED: "infrastructure",
        Trouble.NOT_GREETED: "returned",
        Trouble.CANCELLED: "cancelled",
        Trouble.NOT_STARTED: "returned",
        Trouble.NOT_BUILT_HERE: "returned",
        Trouble.STOPPING: "returned",
        Trouble.DRAINED: "returned",
        Trouble.INPUT_CHANGED: "infrastructure",
        Trouble.MENDING: "returned",
    }
)
#: Troubles that a full disk of this machine can cause. (What an upload meets is the disk of the cache.)
_OF_THE_MACHINE = frozenset(
    {
        Trouble.INPUT_MISSING,
        Trouble.DAEMON_LOST,
        Trouble.CONNECTION_LOST,
        Trouble.DAEMON_REFUSED,
        Trouble.UNEXPECTED,
    }
)


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a lease without a result."""

    reason: Reason
    message: str
    #: Inputs that the farm's cache does not have.
    missing: tuple[str, ...] = ()
    #: As in `scheduler.model.Failure`: what Nix said of this build, and of no machine for certain.
    signature: str = ""


def judge_status(status: int, message: str, *, disk_was_full: bool = False) -> Ending | None:
    """Turn the daemon's verdict on a build into an ending; None where the outputs are valid.

    `disk_was_full`: at some time during the build; a builder that failed then shows nothing about the build.
    """
    verdict = STATUS_POLICY.get(status, _UNKNOWN_STATUS)
    if verdict.reason is None:
        return None
    for words, hinted in HINTS.get(status, ()):
        if words in message:
            verdict = hinted
            break
    if disk_was_full and verdict.reason in _MAYBE_THE_DISK:
        verdict = _DISK_LOW
    # A hint has a reason; success has none.
    reason = verdict.reason or _INFRASTRUCTURE
    if reason == _INFRASTRUCTURE:
        return judge_refusal(message, verdict.text)
    return Ending(reason, f"{verdict.text}: {message}" if message else verdict.text)


def judge_refusal(message: str, says: str = Trouble.DAEMON_REFUSED) -> Ending:
    """Turn what Nix says instead of building into an ending: the recipe's fault where its words leave no doubt."""
    full = f"{says}: {message}" if message else says
    if any(words in message for words in NO_SPACE_WORDS):
        return Ending("disk_low", full)
    known = refusals.recognise(message)
    if known is not None:
        return Ending(known, f"Nix refuses the build: {message}")
    reason = TROUBLE_POLICY[Trouble.DAEMON_REFUSED] if says == Trouble.DAEMON_REFUSED else _INFRASTRUCTURE
    return Ending(reason, full, signature=refusals.signature(message))


def judge_trouble(trouble: Trouble, detail: str = "") -> Ending:
    """Turn trouble beside the build into an ending; a full disk looks like many other things at first."""
    if trouble in _OF_THE_MACHINE and any(words in detail for words in NO_SPACE_WORDS):
        trouble = Trouble.DISK_LOW
    return Ending(TROUBLE_POLICY[trouble], f"{trouble}: {detail}" if detail else str(trouble))


@dataclass(slots=True)
class _Held:
    state: LeaseState
    arrived_at: float
    #: Memory that the build should take by its submission; 0: not known.
    memory_bytes: int = 0
    #: Its build uses the network.
    fetches: bool = False
    #: Set while BUILDING only.
    slot: int = -1
    building_at: float = 0.0
    #: A hand-back was requested; it is requested once.
    handed_back: bool = False
    #: Its outputs are valid in the store, whatever comes after.
    built: bool = False


class WorkerMachine:
    """All leases in the worker's hands. Methods raise `ValueError` where the shell breaks the order of the states."""

    def __init__(self, slots: int, memory_bytes: int = 0, most_fetches: int = MAX_LEASES) -> None:
        """`memory_bytes` of the machine are there for builds; 0 is unknown, and then hints mean nothing.

        `most_fetches`: builds that use the network at one time. More wait here: elsewhere they would wait as well.
        """
        if slots < 1:
            raise ValueError("a worker has at least one slot")
        self._slots = slots
        #: Slots that are offered now, at most all.
        self.offered = slots
        self._memory_bytes = memory_bytes
        self._most_fetches = most_fetches
        #: Insertion order is order of arrival.
        self._held: dict[LeaseKey, _Held] = {}
        #: For reading only.
        self.following = Following()
        #: Free slots, lowest taken first; together with the slots of BUILDING leases each number exactly once.
        self._free = list(range(slots))
        #: Moving mean of build durations in seconds; None before the first build.
        self._mean_s: float | None = None
        self.draining = False

    def __contains__(self, key: LeaseKey) -> bool:
        return key in self._held

    def state(self, key: LeaseKey) -> LeaseState:
        """Raises `KeyError` for a lease that is not in hand."""
        return self._held[key].state

    def held(self) -> Iterator[tuple[LeaseKey, LeaseState]]:
        """All leases in hand, in order of arrival."""
        return ((key, held.state) for key, held in self._held.items())

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots in which nothing is built, the next to be taken first."""
        return tuple(self._free)

    @property
    def has_idle_slot(self) -> bool:
        """True if a slot would start a lease that came now."""
        waiting = sum(held.state in _WAITING and not self.following.waits(key) for key, held in self._held.items())
        return min(len(self._free), self.offered - self.running) > waiting

    @property
    def running(self) -> int:
        """Number of builds that run."""
        return self._slots - len(self._free)

    def accept(self, key: LeaseKey, now: float, memory_bytes: int = 0, after: Sequence[LeaseKey] = ()) -> bool:
        """Take a lease into hand; False where it is there already. `memory_bytes`: its build's need, or 0.

        It follows those of `after` that are in hand.
        """
        if key in self._held:
            return False
        self._held[key] = _Held(LeaseState.QUEUED, now, memory_bytes)
        if after:
            ahead = [each for each in after if each in self._held]
            self.following.begin(key, ahead, [each for each in ahead if not self._held[each].built])
        return True

    def may_be_followed(self, key: LeaseKey) -> bool:
        """Return whether a lease is in hand and built, or may yet be."""
        held = self._held.get(key)
        return held is not None and (held.built or held.state is not LeaseState.REPORTING)

    def fetched(self, key: LeaseKey, *, fetches: bool = False) -> None:
        """All inputs are valid; `fetches`: the build uses the network."""
        self._move(key, LeaseState.READY)
        self._held[key].fetches = fetches

    def built(self, key: LeaseKey, now: float) -> list[LeaseKey]:
        """The build ended well, its slot is free; return the leases that waited for it and may go on."""
        held = self._held[key]
        self._move(key, LeaseState.UPLOADING)
        held.built = True
        self._leave_slot(held)
        self._count_build(now - held.building_at)
        released = self.following.built(key)
        for each in released:
            self._held[each].arrived_at = now
        return released

    def report(self, key: LeaseKey, now: float, reason: Reason | None = None) -> bool:
        """The lease ended, by `reason` or (None) with its outputs; False where that is known already."""
        held = self._held.get(key)
        if held is None or held.state is LeaseState.REPORTING:
            return False
        if held.state is LeaseState.BUILDING:
            self._leave_slot(held)
            if reason in _RAN:
                # How soon a build was stopped, or broke with its daemon, is no evidence for the next.
                self._count_build(now - held.building_at)
        held.state = LeaseState.REPORTING
        self.following.stop_waiting(key)
        return True

    def acknowledged(self, key: LeaseKey) -> None:
        """The report is safe with the coordinator; the lease leaves the worker's hands."""
        if self._held[key].state is not LeaseState.REPORTING:
            raise ValueError(f"lease {key} was acknowledged before its report")
        del self._held[key]
        self.following.end(key)

    def next_actions(self, now: float) -> list[Action]:
        """Return the actions that are due now, each once."""
        actions: list[Action] = []
        uploads = building = waiting = memory_bytes = fetching = 0
        short_of_memory = False
        for held in self._held.values():
            uploads += held.state is LeaseState.UPLOADING
            if held.state is LeaseState.BUILDING:
                building += 1
                memory_bytes += held.memory_bytes
                fetching += held.fetches
        surplus = len(self._held) > MAX_LEASES
        for key, held in self._held.items():
            if held.state not in _WAITING or held.handed_back:
                continue
            if self.following.waits(key):
                actions += _next(key, held, returns=self.draining or surplus)
                continue
            # Nothing with a hint passes one that waits for memory, or that would wait for ever.
            fits = not held.memory_bytes or (not short_of_memory and self._has_memory(memory_bytes, held.memory_bytes))
            may_begin = self._free and building < self.offered and uploads < self.max_uploads and fits
            passed = held.fetches and fetching >= self._most_fetches
            if held.state is LeaseState.READY and may_begin and not passed:
                held.state, held.slot, held.building_at = LeaseState.BUILDING, self._free.pop(0), now
                building += 1
                memory_bytes += held.memory_bytes
                fetching += held.fetches
                actions.append(Build(key, held.slot))
                continue
            if passed and not self.draining:
                # Others pass it; it is not handed back, because elsewhere it would use the same network as often.
                continue
            short_of_memory = short_of_memory or not fits
            waiting += 1
            behind = building + waiting > self.offered or not fits
            late = now - held.arrived_at >= HAND_BACK_S
            returns = self.draining or (behind and (late or surplus))
            waiting -= returns
            actions += _next(key, held, returns=returns)
        return actions

    def deadline(self, now: float) -> float | None:
        """Return the time after `now` at which `next_actions` is due again although nothing happened."""
        waiting = [held for key, held in self._held.items() if held.state in _WAITING and not self.following.waits(key)]
        times = [held.arrived_at + HAND_BACK_S for held in waiting]
        return min((time for time in times if time > now), default=None)

    @property
    def max_uploads(self) -> int:
        """Uploads that may run beside builds."""
        return self._slots * MAX_UPLOADS_PER_SLOT

    @property
    def backlog(self) -> int:
        """Leases worth having beyond the slots."""
        if self._mean_s is None:
            return 0
        per_slot = MAX_BACKLOG_PER_SLOT if self._mean_s <= 0 else int(BACKLOG_S / self._mean_s)
        return self.offered * min(per_slot, MAX_BACKLOG_PER_SLOT)

    def capacity(self, reported: frozenset[LeaseKey] | set[LeaseKey] = frozenset()) -> int:
        """Return how many leases the worker is willing to hold in all, but for the `reported` ones."""
        if self.draining:
            return 0
        finishing = 0
        for key, held in self._held.items():
            if held.state is LeaseState.UPLOADING or (held.state is LeaseState.REPORTING and key not in reported):
                finishing += 1
        # Where the coordinator takes a lease for one that waits for another's slot, it is not told of that one's end.
        begun = self.following.begun(lambda key: key not in self._held or key in reported)
        return self.offered + self.backlog + finishing - begun + self._passed_fetches()

    def _passed_fetches(self) -> int:
        """Return the number of leases that wait for others which use the network: others come in their place."""
        fetches = [held.state for held in self._held.values() if held.fetches]
        room = max(0, self._most_fetches - fetches.count(LeaseState.BUILDING))
        return min(max(0, fetches.count(LeaseState.READY) - room), self._most_fetches)

    def _has_memory(self, taken_bytes: int, wanted_bytes: int) -> bool:
        """Return whether one more build fits beside those that take so much; the first one always does."""
        return not (self._memory_bytes and taken_bytes) or taken_bytes + wanted_bytes <= self._memory_bytes

    def _move(self, key: LeaseKey, to: LeaseState) -> None:
        held = self._held[key]
        if NEXT.get(held.state) is not to:
            raise ValueError(f"lease {key} cannot go from {held.state} to {to}")
        held.state = to

    def _leave_slot(self, held: _Held) -> None:
        self._free.append(held.slot)
        self._free.sort()
        held.slot = -1

    def _count_build(self, took_s: float) -> None:
        mean_s = took_s if self._mean_s is None else self._mean_s + MEAN_WEIGHT * (took_s - self._mean_s)
        self._mean_s = max(0.0, mean_s)


def _next(key: LeaseKey, held: _Held, *, returns: bool) -> list[Action]:
    """Return what is to be done about a lease that cannot begin yet."""
    if returns:
        held.handed_back = True
        return [HandBack(key)]
    if held.state is not LeaseState.QUEUED:
        return []
    held.state = LeaseState.FETCHING
    return [Fetch(key)]
