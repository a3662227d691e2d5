"""The mutable records of the state: a step, a queue of ready steps, a builder. Read by all, written by `evolve` alone.

Slots, shared empty values and no back-references that are not needed: a farm knows hundreds of thousands of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.model import (
    NO_INSTANT,
    UNKNOWN_WORK_MS,
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    ImpossibleError,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepState,
    SubmissionId,
)

NO_BUILDER = BuilderId("")
#: Dependents of a step that are kept as a tuple; more are kept as a dict, which costs four times as much and loses one
#: in no time.
FEW_DEPENDENTS = 8
#: Suspicions that are kept of one builder: a few convict it, and a hostile farm's worth must not fill the memory.
SUSPICIONS = 64
#: Speeds of a builder of which nothing was measured.
NO_SPEEDS: Mapping[str, float] = {}
#: The tries of every step that has none.
NO_TRIES: frozenset[int] = frozenset()


class StoreLife:
    """One life of a builder's store: what is there now is there until the life ends. Known by its identity."""

    __slots__ = ("is_known",)

    def __init__(self) -> None:
        #: False once nothing is known of the store any more: its builder is gone, or has deleted something.
        self.is_known = True


class Step:
    """One step. Read by everyone, written by `evolve` alone."""

    __slots__ = (
        "accounts",
        "active",
        "asked_at",
        "attempt",
        "avoid",
        "below",
        "builder",
        "cause",
        "dependents",
        "depth",
        "done_at",
        "engaged",
        "evidence",
        "failed_at",
        "failure",
        "faults",
        "follows",
        "generation_ended",
        "generation_started",
        "held",
        "home",
        "key",
        "memory_bytes",
        "moves",
        "needs",
        "not_before",
        "output_bytes",
        "owners",
        "places",
        "queue",
        "rank",
        "recipes",
        "refcount",
        "resends",
        "returns",
        "roots",
        "sequence",
        "state",
        "strikes",
        "tail_ms",
        "tried",
        "unmet",
        "work_ms",
    )

    def __init__(self, key: StepKey, recipes: tuple[Recipe, ...], sequence: int, state: StepState) -> None:
        self.key = key
        #: Grows only; empty only for a step that entered as held.
        self.recipes = recipes
        #: Order of becoming known: the last tie-break, the same after replay.
        self.sequence = sequence
        self.state = state
        #: Index of the recipe in use.
        self.active = 0
        #: Recipes proven failing in this life, never in use again before the next.
        self.tried = NO_TRIES
        #: Leases ever granted; the attempt of the open lease where there is one. Never falls.
        self.attempt = 0
        #: Infrastructure failures of the recipe in use, and returned and moved leases, of this life.
        self.faults = self.returns = self.moves = 0
        #: The kinds of those of `faults` that have a budget of their own.
        self.strikes: tuple[FailureKind, ...] = ()
        #: Failures of the recipe in use that have a signature, in this life: builder and signature of each.
        self.accounts: tuple[tuple[BuilderId, str], ...] = ()
        #: Values of the state's `generation` counter when this life began and when it lapsed.
        self.generation_started = self.generation_ended = 0
        #: When the result was last seen to be there.
        self.done_at = NO_INSTANT
        #: Live submissions that have this step as a root; empty once the step is finished.
        self.roots: tuple[SubmissionId, ...] = ()
        #: Stakes (see `shares`) of the submissions that want this step, the oldest first, and of some that did.
        self.owners: tuple[int, ...] = ()
        #: How many recipes of known steps name this one as a need, and submissions that are not forgotten as a root.
        self.refcount = 0
        #: The steps that engage this one, in the order in which they began to. Changed by `gain` and `lose`.
        self.dependents: tuple[Step, ...] | dict[Step, None] = ()
        #: True exactly while wanted and unfinished, orphans of a running `handle` aside.
        self.engaged = False
        #: The needs of the recipe in use, without repeats, while engaged; else they are `below` once looked up.
        self.needs: tuple[Step, ...] = ()
        self.below: tuple[Step, ...] | None = None
        #: How many of `needs` are not done.
        self.unmet = 0
        #: Length of the longest path up to a root, over all engagements ever; so it may overstate, never understate.
        self.depth = 0
        #: Milliseconds on a builder of speed 1, of itself and of the longest path from its start up to a root's end.
        self.work_ms = self.tail_ms = UNKNOWN_WORK_MS
        #: Memory that it asks for, and bytes of its outputs; 0: not known.
        self.memory_bytes = self.output_bytes = 0
        #: Builders' stores that have them (`locality`); what builders have is not durable.
        self.places: tuple[StoreLife, ...] = ()
        #: The policy's rank when the step was last put in a queue.
        self.rank = 0
        #: The queue of its requirements where no builder is avoided, once known.
        self.home: Queue | None = None
        #: The queue in which it stands: set exactly while ready and not backing off.
        self.queue: Queue | None = None
        #: The builder that last gave this step back or lost it; others come first.
        self.avoid = NO_BUILDER
        #: Set while it stands in a queue and waits for a builder although another one has room.
        self.held: Hold | None = None
        #: When not 0, the step may not be leased before; cleared by `BackOffEnded`.
        self.not_before = NO_INSTANT
        #: The builder of the open lease (leased or publishing), else `NO_BUILDER`.
        self.builder = NO_BUILDER
        #: Needs that have not been done since the open lease was granted, all open at the same builder (`early`).
        self.follows: tuple[Step, ...] = ()
        #: When the order to start last went to the builder, and how often it was repeated.
        self.asked_at, self.resends = NO_INSTANT, 0
        #: What the builder reported of its outputs, while publishing.
        self.evidence = b""
        #: Why and when it last failed (state failed), or which step's failure doomed it (state doomed).
        self.failure: Failure | None = None
        self.failed_at = NO_INSTANT
        self.cause: StepKey | None = None

    def expect(self, work_ms: int) -> None:
        """Take in what it should take, before anything stands on it; 0: nothing is known."""
        if work_ms:
            self.work_ms = self.tail_ms = work_ms

    def gain(self, dependent: Step) -> None:
        """Take in one that engages this step from now on; a repeat changes nothing."""
        known = self.dependents
        if isinstance(known, dict):
            known[dependent] = None
        elif dependent not in known:
            many = (*known, dependent)
            self.dependents = many if len(many) <= FEW_DEPENDENTS else dict.fromkeys(many)

    def lose(self, dependent: Step) -> None:
        """Let go of one that no longer engages this step."""
        known = self.dependents
        if len(known) == 1:
            self.dependents = ()
        elif isinstance(known, dict):
            del known[dependent]
        else:
            at = known.index(dependent)
            self.dependents = known[:at] + known[at + 1 :]

    def __repr__(self) -> str:
        return f"<Step {self.key} {self.state.value} attempt {self.attempt}>"

    @property
    def lease(self) -> LeaseId:
        """The last lease granted."""
        return LeaseId(self.key, self.attempt)

    @property
    def wanted(self) -> bool:
        """True if a live submission stands on this step."""
        return bool(self.roots or self.dependents)

    @property
    def recipe(self) -> Recipe:
        """The recipe in use. Raises `ImpossibleError` for a step that only ever was held."""
        if not self.recipes:
            raise ImpossibleError(f"{self.key} has no recipe")
        return self.recipes[self.active]


@dataclass(frozen=True, slots=True)
class Hold:
    """A step stays in its queue because a busy builder is expected to end it earlier than any that has room.

    Or because none with room has the memory that it asks for, where `memory_bytes` is not 0: then the builder takes
    nothing else that asks for memory.
    """

    builder: BuilderId
    #: When the wait began, and when the builder should have room.
    since: Instant
    until: Instant
    #: Speed of the fastest builder that had room and was not taken.
    over: float
    memory_bytes: int = 0


class OwnerLanes:
    """The lanes of one owner in one queue, and its place among the owners that wait there (see `ready`)."""

    __slots__ = ("lanes", "owner", "stride", "tag", "turn")

    def __init__(self, owner: str, stride: int, tag: int, turn: int) -> None:
        self.owner = owner
        #: What each grant adds to the tag; the lowest tag goes first.
        self.stride = stride
        self.tag = tag
        #: When it was last served by a builder of the queue, or began to wait: the lowest goes first of equal tags.
        self.turn = turn
        #: By stake; never empty.
        self.lanes: dict[int, Lane] = {}


class Lane:
    """The steps of one queue that one stake wants."""

    __slots__ = ("ahead", "due", "group", "heap", "stale")

    def __init__(self, group: OwnerLanes, due: int, ahead: int) -> None:
        self.group = group
        #: When it was last served by a builder of the queue, or began, less `ahead`: the lowest goes first.
        self.due = due
        #: Turns that its priority is worth.
        self.ahead = ahead
        #: (-rank, sequence, step), the first always live; stale ones below are dropped when they come up, or are many.
        self.heap: list[tuple[int, int, Step]] = []
        #: How many steps have left it from below the first since what such leave was last dropped.
        self.stale = 0


#: What orders the heads of queues: tag and turn of the owner, when the lane is due, and its first step.
QueueHead = tuple[int, int, int, tuple[int, int, Step]]


class Queue:
    """Ready steps that the same builders can take: one class of requirements, one avoided builder or none."""

    __slots__ = (
        "avoid",
        "builders",
        "by_speed",
        "groups",
        "lanes",
        "most_memory_bytes",
        "power",
        "ready_ms",
        "requirements",
        "speeds",
        "standing",
        "virtual",
    )

    def __init__(self, requirements: Requirements, avoid: BuilderId) -> None:
        self.requirements = requirements
        self.avoid = avoid
        #: How many steps stand in it.
        self.standing = 0
        #: Their works together.
        self.ready_ms = 0
        #: By stake; none is empty. A step stands in the lane of each of its owners.
        self.lanes: dict[int, Lane] = {}
        #: The same lanes by owner.
        self.groups: dict[str, OwnerLanes] = {}
        #: The tag of the last step that a builder of the queue took.
        self.virtual = 0
        #: Builders that may take these steps; the avoided one only where there is no other.
        self.builders: dict[BuilderId, Builder] = {}
        #: Speed of each of these, and the willing ones with the fastest first; both empty where all are equally fast.
        self.speeds: dict[BuilderId, float] = {}
        self.by_speed: tuple[Builder, ...] = ()
        #: Milliseconds of work that these do in one, all their slots together.
        self.power = 0.0
        #: Most memory of a willing one; 0 where that of one is not known, or there is none.
        self.most_memory_bytes = 0

    def measure_power(self) -> None:
        """Sum up anew what the builders do: one of them has other slots, or there are others."""
        self.power = sum([self.speeds[builder.id] * builder.capacity for builder in self.by_speed])

    @property
    def first(self) -> Step:
        """The step that goes first; the queue must not be empty."""
        if len(self.lanes) == 1:
            for lane in self.lanes.values():
                return lane.heap[0][2]
        return self.head[3][2]

    @property
    def head(self) -> QueueHead:
        """The place and the entry of what goes first; the queue must not be empty."""
        lanes = self.lanes
        if len(lanes) == 1:
            (lane,) = lanes.values()
            group = lane.group
            return group.tag, group.turn, lane.due, lane.heap[0]
        if len(self.groups) == 1:
            (group,) = self.groups.values()
        else:
            # Owners seldom tie, so that only one is looked into.
            first = min([(group.tag, group.turn) for group in self.groups.values()])
            return min([_place_of(group) for group in self.groups.values() if (group.tag, group.turn) == first])
        return _place_of(group)

    def lanes_in_turn(self) -> list[Lane]:
        """Return the lanes in the order in which they would be served now. Costs their number."""
        return sorted(
            self.lanes.values(), key=lambda lane: (lane.group.tag, lane.group.turn, lane.due, lane.heap[0][:2])
        )

    def close(self, stake: int) -> None:
        """Drop a lane."""
        group = self.lanes.pop(stake).group
        del group.lanes[stake]
        if not group.lanes:
            del self.groups[group.owner]

    def advance(self, virtual: int) -> None:
        """Move all tags on, so that the queue stands at `virtual`."""
        further = virtual - self.virtual
        if further:
            self.virtual = virtual
            for group in self.groups.values():
                group.tag += further


def _place_of(group: OwnerLanes) -> QueueHead:
    due, entry = min([(lane.due, lane.heap[0]) for lane in group.lanes.values()])
    return group.tag, group.turn, due, entry


class Builder:
    """One builder, or only the name of one that a replayed lease mentions (`spec` is None until it joins)."""

    __slots__ = (
        "capacity",
        "collections",
        "draining",
        "fetch_rate",
        "followers",
        "for_unfitness",
        "free",
        "heard",
        "id",
        "leases",
        "level",
        "memory_bytes",
        "moves",
        "offered",
        "place",
        "probation",
        "queues",
        "reason",
        "since",
        "spec",
        "speeds",
        "strikes",
        "suspicions",
        "trouble",
        "unfit",
        "until",
    )

    def __init__(self, id_: BuilderId, heard: Instant) -> None:
        self.id = id_
        self.spec: BuilderSpec | None = None
        #: Leases it is willing to hold in all, by its own word and by ours; may fall below what it holds.
        self.offered = 0
        self.capacity = 0
        #: Leases it would still take: `capacity` without `leases`, `followers` aside. May be negative.
        self.free = 0
        #: Steps leased to it, not those publishing.
        self.leases: dict[StepKey, Step] = {}
        #: Those of them that follow one which is not built yet: each will take its place, and has none of its own.
        self.followers: dict[StepKey, Step] = {}
        #: Memory that the leases ask for together, without the followers.
        self.memory_bytes = 0
        #: Counts the leases that began and ended here.
        self.moves = 0
        #: When this incarnation joined, and its last sign of life.
        self.since = NO_INSTANT
        self.heard = heard
        #: The queues in whose `builders` it stands.
        self.queues: list[Queue] = []
        #: By system: how fast it builds, where 1 is usual and 2 takes half the time. A system that is not here has 1.
        self.speeds: Mapping[str, float] = NO_SPEEDS
        #: Bytes of inputs that it fetches in a second; 0: not measured.
        self.fetch_rate = 0
        #: What its store has, by the steps that remember it; how often the store had deleted something by its word.
        self.place = StoreLife()
        self.collections = 0
        #: By its own word: it wants nothing new; why it is not fit to build.
        self.draining = False
        self.unfit = ""
        #: Steps whose leases ended here by a fault that it is to blame for, since it last built something; and the
        #: message of the last one.
        self.strikes: dict[StepKey, None] = {}
        self.trouble = ""
        #: Steps that failed here by a fault which may be their own, with its message: strikes once another builder has
        #: built them. At most `SUSPICIONS`, the latest.
        self.suspicions: dict[StepKey, str] = {}
        #: Quarantines since it last built something; when this one ends (0: there is none), and why it began.
        self.level = 0
        self.until = NO_INSTANT
        self.reason = ""
        self.for_unfitness = False
        #: It was in quarantine and has built nothing since: it is trusted with one lease.
        self.probation = False

    def forget_store(self) -> None:
        """Take nothing for there that was."""
        self.place.is_known = False
        self.place = StoreLife()

    @property
    def willing(self) -> bool:
        """True if it may get leases at all."""
        return self.spec is not None and not (self.until or self.draining or self.unfit)

    def speed(self, system: str) -> float:
        """Speed for a system; 1 is usual, and stands where nothing was measured."""
        return self.speeds.get(system, 1.0)
