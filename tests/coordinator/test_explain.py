"""Every reason why a step does not run has one sentence and one wire value, in the words of people who run farms."""

from __future__ import annotations

from typing import get_args

import pytest

from coordinator.readmodel.explain import sentence_of, value_of
from scheduler import reasons as r
from scheduler.model import BuilderId, Instant, StepKey, SubmissionId

NOW = Instant(100.0)
X, Y = StepKey("x"), StepKey("y")
ONE, TWO = (BuilderId("m1"),), (BuilderId("m1"), BuilderId("m2"))

SENTENCES: list[tuple[r.Reason, str]] = [
    (r.WaitsForSteps(3, (X, Y)), "waits for the x, y and 1 more"),
    (r.FollowsSteps(ONE[0], 1, (X,), built=False), "begins on worker m1 as soon as that has built the x"),
    (r.FollowsSteps(ONE[0], 2, (X, Y), built=True), "is built, and is published after the x, y"),
    (r.NotWanted(), "no submission stands on it now"),
    (r.NoBuilderJoined(), "no worker has joined; it waits for one for ever"),
    (
        r.NoBuilderOffersSystem("riscv", Instant(0.0)),
        "no worker offers the system riscv; it waits for one for ever",
    ),
    (
        r.NoBuilderOffersFeatures("linux", ("gpu", "kvm"), Instant(86400.0)),
        "no worker of linux offers the feature gpu, kvm; it waits for one until 1970-01-02 00:00:00 UTC",
    ),
    (
        r.OnlyReservedBuilders(ONE),
        "needs a worker without mandatory features; m1 demand some; it waits for one for ever",
    ),
    (r.BuildersFull(ONE, 1, 6), "worker m1, the only one, is full; number 1 of 6 in the queue"),
    (r.BuildersFull(TWO, 0, 9000), "all 2 workers that could are full; one of 9000 in the queue"),
    (r.BuildersQuarantined(TWO, Instant(130.0), "disk full"), "worker m1, m2 gets no work for 30 s: disk full"),
    (r.BuildersDraining(ONE), "worker m1 is draining"),
    (r.LimitReached(ONE, 2, 3), "worker m1 takes one step at a time after its failures; number 2 of 3"),
    (
        r.WaitsForFaster(ONE[0], NOW, Instant(115.0)),
        "waits for worker m1, which is expected to have room in 15 s and ends it earlier than those that have some now",
    ),
    (
        r.WaitsForMemory(ONE[0], NOW, Instant(115.0), 3 * 2**30),
        "asks for 3.0 GiB of memory, which no worker with room has now; worker m1 should have it in 15 s",
    ),
    (r.BacksOff(Instant(90.0), 2), "tried again in 0 s after 2 failures"),
    (
        r.RetriesSpent(Instant(160.0), SubmissionId("s")),
        "tried again in 60 s: too many attempts of its submission failed within the hour",
    ),
    (r.KnownToFail(X, NOW, NOW), "the x is known to fail; build it again: drover retry x"),
]


@pytest.mark.parametrize(("reason", "sentence"), SENTENCES)
def test_a_reason_has_a_sentence_that_names_workers(reason: r.Reason, sentence: str) -> None:
    assert sentence_of(reason, NOW, lambda key: "the x" if key == X else "") == sentence


def test_no_reason_is_without_a_sentence_and_each_has_a_kind_of_its_own_on_the_wire() -> None:
    reasons = {type(reason): reason for reason, _ in SENTENCES}
    assert set(reasons) == set(get_args(r.Reason))
    assert len({value_of(reason).kind for reason in reasons.values()}) == len(reasons)
