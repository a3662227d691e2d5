"""Facts: the closed set of decisions of the core, in the past tense. The journal holds exactly the durable ones.

Policy may change between releases, a fact may not: `evolve` gives the same state for the same facts for ever. Facts
about builders are not durable: after a restart builders join anew and name the leases that they still hold.
`StepReady`, `StepWaiting` and `MembersJoined` decide nothing: they report to readers what `evolve` derived from the
fact before them, so that no reader needs a second copy of the graph. A replay derives them again (`Farm.replaying`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scheduler.model import (
    NO_INSTANT,
    BuilderId,
    BuilderSpec,
    Failure,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from scheduler.pauses import Pause
from scheduler.resource_limits import ResourceLimits
from scheduler.snapshot_facts import BuilderRestored as BuilderRestored
from scheduler.snapshot_facts import FarmRestored as FarmRestored
from scheduler.snapshot_facts import StepPast as StepPast
from scheduler.snapshot_facts import StepRestored as StepRestored
from scheduler.snapshot_facts import SubmissionRestored as SubmissionRestored
from scheduler.terms import NO_TERMS, Terms, Withdrawal
from scheduler.values import quick


@dataclass(frozen=True, slots=True)
class SubmissionAccepted:
    """`members` is every step the submission stands on, each before its needs; nothing below a done step is in it.

    `held` are the members that are already done, `joined` those that others had already brought, unfinished. Members
    that are known to fail are among them; nothing below these is. Members can grow later: where one falls back, the
    needs of its next recipe join (`MembersJoined`). `wait_s` is how long its steps wait for a builder that could take
    them: 0 is for ever, None is as long as the farm's limit says. `limits` are what builds of some roots may use; they
    are absent in journals of before 2026-11-29, whose notes have them. One that is `open` may grow (`SubmissionGrew`),
    may have no root yet and does not end before it is sealed.
    """

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    roots: tuple[StepKey, ...]
    members: tuple[StepKey, ...]
    held: tuple[StepKey, ...]
    joined: tuple[StepKey, ...]
    wait_s: int | None = None
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()
    open: bool = False
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class SubmissionGrew:
    """An open submission stands on further roots.

    `members` is every step below them that the submission did not stand on, each before its needs. Among them are those
    that it stood on `before` and that are to be made again: no submission wanted one any more, or the cache has lost
    it. `held`, `joined` and `limits` are of the new ones, as in `SubmissionAccepted`.
    """

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    roots: tuple[StepKey, ...]
    members: tuple[StepKey, ...]
    held: tuple[StepKey, ...]
    joined: tuple[StepKey, ...]
    before: tuple[StepKey, ...] = ()
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()


@dataclass(frozen=True, slots=True)
class SubmissionSealed:
    """No more roots come: the submission ends with its last step. `incomplete` is as in `SealAsked`."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    incomplete: str = ""


@dataclass(frozen=True, slots=True)
class SubmissionRetried:
    """A submission that had ended without success runs again, or one that runs was planned anew after a loss.

    Fields are as in `SubmissionAccepted`.
    """

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    roots: tuple[StepKey, ...]
    members: tuple[StepKey, ...]
    held: tuple[StepKey, ...]
    joined: tuple[StepKey, ...]
    wait_s: int | None = None
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class SubmissionWithdrawn:
    """The submission wants nothing more; steps that no other wants are abandoned by facts of their own.

    `by` is the one that superseded it. Both are absent in journals of before 2026-11-30: clients withdrew.
    """

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    why: Withdrawal = Withdrawal.CANCELLED
    by: SubmissionId | None = None


@dataclass(frozen=True, slots=True)
class SubmissionBumped:
    """The submission has another priority."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    priority: int
    at: Instant


@dataclass(frozen=True, slots=True)
class SubmissionForgotten:
    """The history of a submission that had ended or was withdrawn is over; its identifier is free."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant


@dataclass(frozen=True, slots=True)
class StepsForgotten:
    """Steps without a reference are not known any more.

    One that becomes known again begins anew, but for its attempts: these go on above all that were forgotten.
    """

    durable: ClassVar[bool] = True
    steps: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class StepAdded:
    """A step became known."""

    durable: ClassVar[bool] = True
    spec: StepSpec


@dataclass(frozen=True, slots=True)
class WorksRevised:
    """Unfinished steps are expected to take as long as this from now on."""

    durable: ClassVar[bool] = True
    works: tuple[tuple[StepKey, int], ...]


@dataclass(frozen=True, slots=True)
class RecipeAdded:
    """Another way to make a known step became known; it is tried after the ones before."""

    durable: ClassVar[bool] = True
    step: StepKey
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class StepCached:
    """The cache already holds the result: done without a build. An unknown step enters so, without recipes.

    `at` is when intake looked into the cache.
    """

    durable: ClassVar[bool] = True
    step: StepKey
    at: Instant = NO_INSTANT
    #: Of the results, as far as that is known. Absent in journals of before 2026-11-30.
    output_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StepRevived:
    """A failed, doomed or abandoned step is wanted again and starts a new life, with no recipe proven failing.

    `recipe` is the first one unless that would make the graph cyclic (another step may have fallen back meanwhile).
    """

    durable: ClassVar[bool] = True
    step: StepKey
    recipe: int = 0


@dataclass(frozen=True, slots=True)
class StepLost:
    """The cache no longer holds a result that was done: it is to be made again once it is wanted."""

    durable: ClassVar[bool] = True
    step: StepKey


@quick
@dataclass(frozen=True, slots=True)
class StepLeased:
    """A builder got the right to build. The lease expires unless the builder's heartbeats renew it."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    recipe: int
    at: Instant


@dataclass(frozen=True, slots=True)
class LeaseRevoked:
    """The lease is over without a verdict on the step, which may be leased again from `not_before` on.

    The rest follows from the failure's kind: infrastructure costs one attempt of the budget, returned does not,
    cancelled means that the farm wants this build no more: it is abandoned, known, or `moved` to a faster builder.
    """

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    failure: Failure
    not_before: Instant
    #: The submission that pays for another attempt, and the end of what it has paid for by now (`state.paid_until`).
    payer: SubmissionId | None = None
    paid_until: Instant = NO_INSTANT
    at: Instant = NO_INSTANT  # absent in journals of before 2026-11-30
    memory_bytes: int = 0  # that the step asks for from now on, having died of too little; 0: as before
    moved: bool = False


@quick
@dataclass(frozen=True, slots=True)
class StepBuilt:
    """Outputs are uploaded; publishing has begun. The builder's slot is free."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    evidence: bytes
    at: Instant
    #: Of the outputs, unpacked; 0: not known. Absent in journals of before 2026-11-30.
    output_bytes: int = 0


@quick
@dataclass(frozen=True, slots=True)
class StepDone:
    """The result is published: done means that it can be fetched."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    at: Instant


@dataclass(frozen=True, slots=True)
class StepFellBack:
    """One recipe failed for good and the next takes over."""

    durable: ClassVar[bool] = True
    step: StepKey
    recipe: int
    failure: Failure
    at: Instant = NO_INSTANT  # absent in journals of before 2026-11-30


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The last recipe failed for good, or the attempts are spent."""

    durable: ClassVar[bool] = True
    step: StepKey
    attempt: int
    builder: BuilderId
    failure: Failure
    at: Instant


@dataclass(frozen=True, slots=True)
class StepDoomed:
    """The step can never run: `cause` is the root failure, not merely the next step down."""

    durable: ClassVar[bool] = True
    step: StepKey
    cause: StepKey


@dataclass(frozen=True, slots=True)
class StepAbandoned:
    """No submission wants the step any more."""

    durable: ClassVar[bool] = True
    step: StepKey


@dataclass(frozen=True, slots=True)
class BackOffEnded:
    """The wait of a revoked step is over. Not durable: the clock ends it again after a restart."""

    durable: ClassVar[bool] = False
    step: StepKey


@quick
@dataclass(frozen=True, slots=True)
class StepReady:
    """A wanted step has no open need any more: it may be leased, after its back-off where it has one.

    `at` is the `now` of the call. In a replay it is the newest time of the facts before, since the journal holds no
    other. `requirements` are those of the recipe in use.
    """

    durable: ClassVar[bool] = False
    step: StepKey
    at: Instant
    requirements: Requirements


@dataclass(frozen=True, slots=True)
class StepWaiting:
    """A ready step waits again, because the cache has lost a need of it."""

    durable: ClassVar[bool] = False
    step: StepKey


@dataclass(frozen=True, slots=True)
class MembersJoined:
    """The submissions that want a step which fell back stand on these steps too, each before its needs.

    `members` begins with the step itself. It holds also what these submissions stood on before, and done steps.
    """

    durable: ClassVar[bool] = False
    step: StepKey
    members: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class BuilderAdmitted:
    """A builder may get leases. `missing` and `unknown` as in `BuilderRefreshed`."""

    durable: ClassVar[bool] = False
    builder: BuilderSpec
    capacity: int
    at: Instant
    missing: tuple[LeaseId, ...] = ()
    unknown: tuple[LeaseId, ...] = ()
    draining: bool = False
    unfit: str = ""


@dataclass(frozen=True, slots=True)
class BuilderRefreshed:
    """A heartbeat renewed the builder's leases and reported its capacity.

    `missing` are leases that the builder should hold and does not name, to be handed over again; `unknown` are leases
    it names and has no right to, to be cancelled.
    """

    durable: ClassVar[bool] = False
    builder: BuilderId
    capacity: int
    at: Instant
    missing: tuple[LeaseId, ...] = ()
    unknown: tuple[LeaseId, ...] = ()
    draining: bool = False
    unfit: str = ""
    collections: int = 0


@dataclass(frozen=True, slots=True)
class BuilderRemoved:
    """The builder is gone; its leases were revoked by facts before this one.

    A `silent` one was not confirmed dead: its next heartbeat admits it again.
    """

    durable: ClassVar[bool] = False
    builder: BuilderId
    reason: str
    at: Instant
    silent: bool = False


@dataclass(frozen=True, slots=True)
class BuilderQuarantined:
    """A builder gets no new leases until then; what it runs goes on. `level` counts quarantines without a success."""

    durable: ClassVar[bool] = False
    builder: BuilderId
    reason: str
    until: Instant
    level: int
    #: It called itself unfit, and is free again as soon as it no longer does.
    for_unfitness: bool


@dataclass(frozen=True, slots=True)
class QuarantineEnded:
    """A builder may get leases again, one at a time until it has built one."""

    durable: ClassVar[bool] = False
    builder: BuilderId


@dataclass(frozen=True, slots=True)
class BuildersRated:
    """Builders are known to be so fast, as in `SpeedsMeasured`. Not durable: they are measured anew."""

    durable: ClassVar[bool] = False
    speeds: tuple[tuple[BuilderId, str, float], ...]
    fetch_rates: tuple[tuple[BuilderId, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StepHeld:
    """A ready step waits for a builder without room, which is expected to end it earlier than those that have some.

    Said when the wait begins, and again where it goes on beyond `until`, or for another builder. `over` is the speed of
    the fastest builder with room. Where `memory_bytes` is not 0, that is what it waits for, and no builder has so much
    that nothing else has asked for.
    """

    durable: ClassVar[bool] = False
    step: StepKey
    builder: BuilderId
    at: Instant
    until: Instant
    over: float
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FarmResumed:
    """The state was replayed from the journal; open leases are handed out again and their builders awaited."""

    durable: ClassVar[bool] = False
    at: Instant


Fact = (
    SubmissionAccepted
    | SubmissionGrew
    | SubmissionSealed
    | SubmissionRetried
    | SubmissionWithdrawn
    | SubmissionBumped
    | SubmissionForgotten
    | StepsForgotten
    | StepAdded
    | WorksRevised
    | RecipeAdded
    | StepCached
    | StepRevived
    | StepLost
    | StepLeased
    | LeaseRevoked
    | StepBuilt
    | StepDone
    | StepFellBack
    | StepFailed
    | StepDoomed
    | StepAbandoned
    | BackOffEnded
    | StepReady
    | StepWaiting
    | MembersJoined
    | BuilderAdmitted
    | BuilderRefreshed
    | BuilderRemoved
    | BuilderQuarantined
    | QuarantineEnded
    | BuildersRated
    | StepHeld
    | FarmResumed
    | StepRestored
    | SubmissionRestored
    | BuilderRestored
    | FarmRestored
)

#: What a decision yields: facts, and pauses between them.
FactOrPause = Fact | Pause
