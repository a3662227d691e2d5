"""Invariants between two calls of `handle`, recomputed from first principles; and the durable part of a state.

For tests and simulations: one check costs the size of the state. The indexes are compared with what they index, never
with each other. What no state can show (a lease granted twice) is for oracles over the journal.
"""

from __future__ import annotations

from collections import Counter

from scheduler.model import ImpossibleError, StepKey, StepState, SubmissionId
from scheduler.ready import AGE_TURNS
from scheduler.records import Queue, Step
from scheduler.state import FarmState
from scheduler.transitions import LAPSED, UNFINISHED

_OPEN = (StepState.LEASED, StepState.PUBLISHING)


class InvariantBrokenError(ImpossibleError):
    """The state contradicts itself."""


def check(state: FarmState) -> None:
    """Raise `InvariantBrokenError` naming the first invariant that does not hold."""
    _require(not state.orphans, f"orphans are left: {list(state.orphans)}")
    for step in state.steps.values():
        _check_life(state, step)
        _check_needs(state, step)
        _check_index(state, step)
    failed = {step.key for step in state.steps.values() if step.state is StepState.FAILED}
    _require(set(state.failed) == failed, "the index of failed steps is wrong")
    _check_names(state)
    unknown = state.paid_until.keys() - state.submissions.keys() - state.withdrawn.keys()
    _require(not unknown, f"{unknown} are forgotten and still pay")
    unknown = state.wait_limits.keys() - state.submissions.keys() - state.withdrawn.keys()
    _require(not unknown, f"{unknown} are forgotten and still wait")
    unknown = state.limits.keys() - state.submissions.keys() - state.withdrawn.keys()
    _require(not unknown, f"{unknown} are forgotten and still limit builds")
    for submission, opened in state.open.items():
        roots = {root.key for root in state.submissions[submission]}
        _require(opened.roots == roots, f"{submission} is open and counts other roots than it has")
        _require(roots <= opened.members <= state.steps.keys(), f"{submission} is open and stands on what is not known")
    _check_terms(state)
    _check_builders(state)
    _check_early(state)
    # No circle, not even through what is done: it may be lost.
    state.descend(state.steps.values(), below_done=True)


def durable(state: FarmState) -> tuple[dict[StepKey, tuple[object, ...]], dict[SubmissionId, tuple[object, ...]]]:
    """Return all that durable facts determine, as plain values that can be compared.

    Not in it: what builders reported, back-offs that ended, and ranks in queues.
    """
    steps: dict[StepKey, tuple[object, ...]] = {
        step.key: (
            step.state.value,
            step.recipes,
            step.active,
            sorted(step.tried),
            step.sequence,
            step.attempt,
            step.faults,
            step.returns,
            step.strikes,
            step.accounts,
            step.generation_started,
            step.generation_ended,
            step.done_at,
            step.failed_at,
            step.roots,
            step.engaged,
            step.unmet,
            step.depth,
            step.work_ms,
            step.tail_ms,
            step.memory_bytes,
            step.output_bytes,
            step.moves,
            tuple(need.key for need in step.needs),
            tuple(dependent.key for dependent in step.dependents),
            tuple(need.key for need in step.follows),
            step.builder,
            step.avoid,
            step.evidence,
            step.failure,
            step.cause,
        )
        for step in state.steps.values()
    }
    opened: dict[SubmissionId, tuple[object, ...]] = {
        name: (sorted(each.roots), sorted(each.members)) for name, each in state.open.items()
    }
    return steps, opened


def _check_terms(state: FarmState) -> None:
    known = state.submissions.keys() | state.withdrawn.keys()
    _require(state.shares.terms.keys() <= known, "terms are left of what is forgotten")
    _require(not state.failing, f"{list(state.failing)} have failed fast and go on")
    _require(state.failed_fast <= state.withdrawn.keys(), "what failed fast is not withdrawn")
    for name, terms in state.shares.terms.items():
        waits = name in state.submissions and not state.has_ended(name)
        at = state.deadlines.at(name)
        _require(at == (terms.deadline if waits else 0.0), f"{name} has the deadline {at}")
        listed = name in state.lineages.get((terms.owner, terms.lineage), {})
        _require(listed == (bool(terms.lineage) and name in state.submissions), f"{name} is missing in its lineage")


def _require(holds: bool, broken: str) -> None:
    if not holds:
        raise InvariantBrokenError(broken)


def _check_life(state: FarmState, step: Step) -> None:
    unfinished = step.state in UNFINISHED
    open_ = step.state in (StepState.LEASED, StepState.PUBLISHING)
    _require(
        step.engaged == (unfinished and step.wanted), f"{step} engages its needs and is not wanted, or the reverse"
    )
    _require(unfinished or not step.roots, f"{step} is finished and still a root")
    _require(unfinished or step.state is StepState.DONE or not step.dependents, f"{step} has lapsed, dependents wait")
    _require(step.state not in UNFINISHED - {StepState.WAITING} or step.wanted, f"{step} runs for nobody")
    _require(open_ == bool(step.builder), f"{step} has a builder and no lease, or the reverse")
    _require(step.state is not StepState.FAILED or step.failure is not None, f"{step} gives no failure")
    _require(step.state is not StepState.DOOMED or step.cause is not None, f"{step} gives no cause")
    _require(step.active not in step.tried or step.state in LAPSED, f"{step} uses a recipe proven failing")
    for submission in step.roots:
        _require(step in state.submissions[submission], f"{step} is no root of {submission}")


def _check_names(state: FarmState) -> None:
    """Nothing is forgotten that something names, and the counts that say so are right."""
    counts = Counter(need for step in state.steps.values() for recipe in step.recipes for need in recipe.needs)
    counts.update(root.key for roots in (*state.submissions.values(), *state.withdrawn.values()) for root in roots)
    _require(counts.keys() <= state.steps.keys(), f"{counts.keys() - state.steps.keys()} are referred to and not known")
    for step in state.steps.values():
        _require(step.refcount == counts[step.key], f"{step} has refcount {step.refcount}, not {counts[step.key]}")
    unreferenced = {step.key for step in state.steps.values() if not step.refcount}
    _require(set(state.references.unreferenced) == unreferenced, "the index of unreferenced steps is wrong")


def _check_needs(state: FarmState, step: Step) -> None:
    if not step.engaged:
        _require(not step.needs, f"{step} holds needs and does not engage them")
        if step.below is not None:
            below = tuple(state.steps[key] for key in dict.fromkeys(step.recipe.needs))
            _require(step.below == below, f"{step} remembers other needs than its recipe has")
        return
    _require(step.below is None, f"{step} engages its needs and remembers them besides")
    unmet = 0
    for need in step.needs:
        unmet += need.state is not StepState.DONE
        _require(step in need.dependents, f"{need} does not know that {step} needs it")
        _require(need.depth > step.depth, f"{need} ranks below {step}")
        _require(need.tail_ms >= step.tail_ms + need.work_ms, f"{need} has a shorter way to a root than {step}")
    _require(step.unmet == unmet, f"{step} counts {step.unmet} unmet needs, has {unmet}")
    _require(step.state is not StepState.WAITING or unmet > 0, f"{step} waits for nothing")
    _require(step.state is not StepState.READY or unmet == 0, f"{step} is ready before its needs")


def _check_index(state: FarmState, step: Step) -> None:
    for dependent in step.dependents:
        _require(step in dependent.needs, f"{step} lists {dependent}, which does not need it")
    ready = step.state is StepState.READY
    delayed = ready and bool(step.not_before)
    _require((step.queue is not None) == (ready and not delayed), f"{step} stands in a queue wrongly, or in none")
    if delayed:
        entry = (step.not_before, step.sequence, step)
        _require(entry in state.ready.delayed, f"{step} backs off and nobody waits for it")
    if step.queue is not None:
        standing = (-step.rank, step.sequence, step)
        wishers = state.shares.live(step.owners)
        _require(bool(wishers), f"{step} stands in a queue for nobody")
        for stake in wishers:
            lane = step.queue.lanes.get(stake)
            _require(lane is not None and standing in lane.heap, f"{step} is not in the lane of {stake}")
        _require(step.queue.requirements == step.recipe.requirements, f"{step} is in a queue of others")
    _require(step.held is None or step.queue is not None, f"{step} is held and stands in no queue")
    if step.state is StepState.LEASED:
        _require(state.builders[step.builder].leases.get(step.key) is step, f"{step.builder} does not hold {step}")


def _check_builders(state: FarmState) -> None:
    heard = [builder.heard for builder in state.builders.values()]
    _require(heard == sorted(heard), "builders are not in order of their last word")
    for builder in state.builders.values():
        for step in builder.leases.values():
            held = step.state is StepState.LEASED and step.builder == builder.id
            _require(held, f"{builder.id} holds {step}, which is not its lease")
        free = builder.capacity - len(builder.leases) + len(builder.followers)
        _require(builder.free == free, f"{builder.id} counts {builder.free} free places and has {free}")
        free = builder.willing and builder.free > 0
        _require((builder.id in state.free) == free, f"{builder.id} is listed as free wrongly")
        held_back = state.quarantined.get(builder.id) is builder
        _require(held_back == bool(builder.until), f"{builder.id} is listed as quarantined wrongly")
        _require(not builder.probation or builder.capacity <= 1, f"{builder.id} is trusted with too much")
    _check_queues(state)
    for builder in state.builders.values():
        for queue in builder.queues:
            _require(queue.builders.get(builder.id) is builder, f"{builder.id} lists a queue it is not in")
    if state.ready.delayed:
        until, _, step = state.ready.delayed[0]
        _require(step.state is StepState.READY and step.not_before == until, "the heap of back-offs has a stale head")
    for id_ in state.quarantined:
        _require(id_ in state.builders, f"{id_} is in quarantine and not here")
    for id_ in state.silent:
        _require(id_ not in state.builders, f"{id_} is both silent and here")


def _check_early(state: FarmState) -> None:
    """Early leases stand on open ones of their own builder, and have a place when they begin."""
    behind: dict[Step, list[Step]] = {}
    for step in state.steps.values():
        for need in step.follows:
            behind.setdefault(need, []).append(step)
            _require(step.state in _OPEN and need in step.needs, f"{step} follows {need} and has no lease, or no need")
            here = need.state in _OPEN and need.builder == step.builder
            _require(here, f"{step} follows {need}, which {step.builder} neither builds nor publishes")
    _require(
        state.early.successors
        == {need: tuple(sorted(steps, key=lambda each: each.sequence)) for need, steps in behind.items()},
        "the index of what follows others is wrong",
    )
    counts = Counter(step.builder for step in state.steps.values() if step.follows)
    _require(state.early.counts == counts, "what follows others is counted wrongly")
    for builder in state.builders.values():
        followers = {
            key: step
            for key, step in builder.leases.items()
            if any(need.state is StepState.LEASED for need in step.follows)
        }
        _require(builder.followers == followers, f"{builder.id} lists other followers than it has")
        memory_bytes = sum([step.memory_bytes for key, step in builder.leases.items() if key not in followers])
        _require(builder.memory_bytes == memory_bytes, f"{builder.id} counts {builder.memory_bytes} bytes of memory")
        places: set[StepKey] = set()
        for step in followers.values():
            taken = {need.key for need in step.follows if need.state is StepState.LEASED}
            _require(places.isdisjoint(taken | followers.keys()), f"{step} follows what another one follows")
            _require(followers.keys().isdisjoint(taken), f"{step} follows what does not run yet")
            places |= taken


def _check_queues(state: FarmState) -> None:
    standing = Counter(step.queue for step in state.steps.values() if step.queue is not None)
    works: Counter[Queue] = Counter()
    for step in state.steps.values():
        if step.queue is not None:
            works[step.queue] += step.work_ms
    for (requirements, avoid), queue in state.ready.queues.items():
        _require(queue.ready_ms == works[queue], f"the queue for {requirements} counts {queue.ready_ms} ms of work")
        _require(queue.standing == standing[queue], f"the queue for {requirements} counts {queue.standing} steps")
        able = [b for b in state.builders.values() if b.spec is not None and b.spec.offers(requirements)]
        elsewhere = any(b.willing for b in able if b.id != avoid)
        expected = {b.id for b in able if b.id != avoid or not elsewhere}
        _require(set(queue.builders) == expected, f"the queue for {requirements} lists the wrong builders")
        speeds = {id_: builder.speed(requirements.system) for id_, builder in queue.builders.items()}
        uneven = len(set(speeds.values())) > 1
        _require(queue.speeds == (speeds if uneven else {}), f"the queue for {requirements} knows other speeds")
        power = sum([queue.speeds[b.id] * b.capacity for b in queue.by_speed])
        _require(queue.power == power, f"the queue for {requirements} takes its builders for able to do other work")
        _require(state.shares.live(queue.lanes) == tuple(sorted(queue.lanes)), "a lane is left of what has ended")
        grouped = {stake: lane for group in queue.groups.values() for stake, lane in group.lanes.items()}
        _require(grouped == queue.lanes, f"the queue for {requirements} has other lanes by owner than by stake")
        _require(all(group.lanes for group in queue.groups.values()), f"the queue for {requirements} has an idle owner")
        for stake, lane in queue.lanes.items():
            _require(lane.group.owner == state.shares.owner_of(stake), f"{stake} waits for another owner")
            _require(lane.ahead == AGE_TURNS * state.shares.priority_of(stake), f"{stake} has another priority")
            _require(bool(lane.heap), f"the queue for {requirements} has an empty lane")
            rank, _, step = lane.heap[0]
            _require(step.queue is queue and step.rank == -rank, f"the queue for {requirements} has a stale head")
