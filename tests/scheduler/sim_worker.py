"""A worker of the simulation: the real `WorkerMachine` and the real tables of failures, with scripted builds around it.

It does what `workers.agent.agent` does, without daemon, disk or event loop: it keeps reports until they are
acknowledged, takes a repeated start for nothing, and tells its machine what has happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from scheduler import events as e
from scheduler.model import BuilderSpec, Failure, FailureKind, LeaseId, StepKey
from workers.agent.lease_actions import Build, Fetch, HandBack, LeaseKey
from workers.agent.lease_machine import (
    Ending,
    LeaseState,
    Trouble,
    WorkerMachine,
    judge_refusal,
    judge_status,
    judge_trouble,
)

#: What a build can come to: the daemon's status and words, or trouble beside them.
OUTCOMES: dict[str, tuple[int, str] | Trouble] = {
    "exit": (3, "builder failed with exit code 1"),
    "killed": (3, "builder failed due to signal 9 (Killed)"),
    "rejected": (5, "failed to produce output"),
    "hash": (5, "hash mismatch in fixed-output derivation"),
    "transient": (6, ""),
    "disk": (6, "lack of free disk space"),
    "time": (8, "timed out after 9 seconds"),
    "silence": (8, "timed out after 9 seconds of silence"),
    "misc": (9, "cannot set up the sandbox"),
    "log": (11, ""),
    "random bits": (12, ""),
    "refused": Trouble.DAEMON_REFUSED,
    "daemon": Trouble.DAEMON_LOST,
    "connection": Trouble.CONNECTION_LOST,
    "upload": Trouble.UPLOAD_FAILED,
    "output": Trouble.OUTPUT_TOO_LARGE,
    "unexpected": Trouble.UNEXPECTED,
}


def ending(outcome: str) -> Ending | None:
    """Return what the worker's tables make of an outcome; None is success."""
    what = OUTCOMES.get(outcome)
    if what is None:
        return None
    if what is Trouble.DAEMON_REFUSED:
        return judge_refusal("getting status of /x: permission denied")
    return judge_trouble(what) if isinstance(what, Trouble) else judge_status(*what)


@dataclass
class Answer:
    """One answer of a worker: reports with the number of the last, then the heartbeat."""

    last: int
    reports: list[e.Event]
    heartbeat: e.BuilderReported


@dataclass
class SimWorker:
    """One worker. `later` runs something after some seconds unless the worker has died by then."""

    spec: BuilderSpec
    slots: int
    now: Callable[[], float]
    later: Callable[[SimWorker, float, Callable[[], None]], None]
    #: How a build of (step, recipe) ends now, and whether the step's inputs can be fetched, but for some built here.
    outcome: Callable[[LeaseId, int], str]
    fetchable: Callable[[LeaseId, int, set[StepKey]], bool]
    chance: random.Random
    alive: bool = True
    unfit: str = ""
    #: No message gets through before.
    cut_off_until: float = 0.0
    #: Whoever waits for the next report.
    waiting: Callable[[], None] | None = None
    recipes: dict[LeaseKey, int] = field(default_factory=dict)
    outbox: list[tuple[int, LeaseKey, e.Event]] = field(default_factory=list)
    sequence: int = 0
    finished: set[LeaseKey] = field(default_factory=set)
    #: What this incarnation has built, the leases that follow others, and those of them that have fetched all else.
    built: set[LeaseKey] = field(default_factory=set)
    after: dict[LeaseKey, tuple[LeaseKey, ...]] = field(default_factory=dict)
    prepared: set[LeaseKey] = field(default_factory=set)
    #: Every build that this incarnation began.
    began: list[LeaseKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = WorkerMachine(self.slots)

    # The calls of the protocol.

    def hello(self) -> e.BuilderJoined:
        held = tuple(LeaseId(StepKey(key[0]), key[1]) for key, _ in self.machine.held())
        return e.BuilderJoined(self.spec, self.machine.capacity(), held, self.machine.draining, self.unfit)

    def start(self, lease: LeaseId, recipe: int, after: tuple[LeaseId, ...] = ()) -> None:
        key = (lease.step, lease.attempt)
        ahead = tuple((each.step, each.attempt) for each in after)
        if key not in self.finished and self.machine.accept(key, self.now(), after=ahead):
            self.recipes[key], self.after[key] = recipe, ahead
            if not all(each in self.built or self.machine.may_be_followed(each) for each in ahead):
                self._report(key, judge_trouble(Trouble.NOT_BUILT_HERE))
            self.advance()

    def cancel(self, lease: LeaseId) -> None:
        self._report((lease.step, lease.attempt), judge_trouble(Trouble.CANCELLED))

    def drain(self, *, on: bool) -> None:
        self.machine.draining = on
        self.advance()

    def events(self, ack: int) -> Answer:
        for number, key, _ in tuple(self.outbox):
            if number <= ack:
                self.machine.acknowledged(key)
                self.finished.add(key)
        self.outbox = [entry for entry in self.outbox if entry[0] > ack]
        told = {key for _, key, _ in self.outbox}
        held = tuple(LeaseId(StepKey(key[0]), key[1]) for key, _ in self.machine.held() if key not in told)
        heartbeat = e.BuilderReported(
            self.spec.id,
            self.spec.incarnation,
            self.machine.capacity(told),
            held,
            self.machine.draining,
            self.unfit,
        )
        return Answer(self.sequence, [event for _, _, event in self.outbox], heartbeat)

    # What happens in it.

    def advance(self) -> None:
        now = self.now()
        for action in self.machine.next_actions(now):
            key = action.key
            match action:
                case Fetch():
                    self.later(self, self.chance.uniform(0.1, 2.0), partial(self._fetched, key))
                case Build():
                    self.began.append(key)
                    self.later(self, self.chance.uniform(0.1, 30.0), partial(self._built, key))
                case HandBack():
                    self._report(key, judge_trouble(Trouble.NOT_STARTED))
        deadline = self.machine.deadline(now)
        if deadline is not None:
            self.later(self, deadline - now + 0.001, self.advance)

    def _is(self, key: LeaseKey, state: LeaseState) -> bool:
        return key in self.machine and self.machine.state(key) is state

    def _fetched(self, key: LeaseKey) -> None:
        if not self._is(key, LeaseState.FETCHING):
            return
        if self.machine.following.waits(key):
            self.prepared.add(key)
            return
        here = {StepKey(step) for step, _ in self.after[key]}
        if self.fetchable(LeaseId(StepKey(key[0]), key[1]), self.recipes[key], here):
            self.machine.fetched(key)
            self.advance()
        else:
            self._report(key, judge_trouble(Trouble.INPUT_MISSING))

    def _built(self, key: LeaseKey) -> None:
        if not self._is(key, LeaseState.BUILDING):
            return
        outcome = self.outcome(LeaseId(StepKey(key[0]), key[1]), self.recipes[key])
        end = ending(outcome)
        if end is not None and outcome not in ("upload", "output"):
            self._report(key, end)
            return
        self.built.add(key)
        for released in self.machine.built(key, self.now()):
            if released in self.prepared:
                self._fetched(released)
        self.later(self, self.chance.uniform(0.1, 3.0), lambda: self._report(key, end))
        self.advance()

    def _report(self, key: LeaseKey, end: Ending | None) -> None:
        if not self.machine.report(key, self.now(), None if end is None else end.reason):
            return
        lease = LeaseId(StepKey(key[0]), key[1])
        event: e.Event
        if end is None:
            event = e.BuildSucceeded(lease, self.spec.id, b"outputs")
        else:
            event = e.BuildFailed(lease, self.spec.id, Failure(FailureKind(end.reason), end.message, end.signature))
        self.sequence += 1
        self.outbox.append((self.sequence, key, event))
        if key not in self.built:
            for behind in self.machine.following.waiting_for(key):
                self._report(behind, judge_trouble(Trouble.NOT_BUILT_HERE))
        if self.waiting is not None:
            self.waiting()
        self.advance()
