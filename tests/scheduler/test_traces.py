"""Golden traces: stories a person can read, compared line by line with tests/traces/NAME.txt.

`> ` is an event, an indented line a fact, `! ` an effect, `# ` the narrator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.events import TimePassed
from scheduler.farm import Farm
from scheduler.forsaken import describe_unserved
from scheduler.model import FailureKind
from scheduler.policy import Limits
from tests.scheduler.kit import (
    LINUX,
    Scene,
    broke,
    builder,
    built,
    cancel,
    either,
    expire,
    grow,
    join,
    lease,
    lost,
    published,
    recipe,
    report,
    seal,
    submit,
    unpublished,
)
from tests.scheduler.kit import step as a_step

TRACES = Path(__file__).resolve().parent.parent / "traces"
PERMANENT, INFRASTRUCTURE = FailureKind.PERMANENT, FailureKind.INFRASTRUCTURE
DIAMOND = (a_step("app", "left", "right"), a_step("left", "base"), a_step("right", "base"), a_step("base"))


def diamond(scene: Scene) -> None:
    scene.note("A diamond is built in topological order; two builders share the middle.")
    scene.play(join("b1"), join("b2"))
    scene.play(submit("s1", ["app"], *DIAMOND))
    scene.at(1).play(built("base", "b1"))
    scene.note("Nothing starts before the result can be fetched.")
    scene.at(2).play(published("base"))
    scene.at(3).play(built("left", "b1"), built("right", "b2"))
    scene.at(4).play(published("left"))
    scene.at(5).play(published("right"))
    scene.at(6).play(built("app", "b1"))
    scene.at(7).play(published("app"))


def failure_dooms(scene: Scene) -> None:
    scene.note("A failure dooms what stands on it, naming the root cause; independent work goes on.")
    scene.play(join("b1", 2))
    chain = (a_step("top", "middle", "spare"), a_step("middle", "bottom"), a_step("bottom"), a_step("spare"))
    scene.play(submit("s1", ["top", "other"], *chain, a_step("other", "wide"), a_step("wide")))
    scene.note("`spare` served only the doomed `top`, so nobody wants it any more; `wide` goes on.")
    scene.at(1).play(broke("bottom", "b1", PERMANENT))
    scene.note("A new submission that asks for it tries again.")
    scene.at(2).play(submit("s2", ["top"], *chain, retry=True))


def fall_back(scene: Scene) -> None:
    scene.note("A fixed output has two recipes. The second is tried when the first fails, with needs of its own.")
    source = either("source", recipe("curl"), recipe("mirror-list"))
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app", "source"), source, a_step("curl"), a_step("mirror-list")))
    scene.at(1).play(built("curl", "b1"))
    scene.at(2).play(published("curl"))
    scene.at(3).play(broke("source", "b1", PERMANENT))
    scene.at(4).play(built("mirror-list", "b1"))
    scene.at(5).play(published("mirror-list"))
    scene.note("Both recipes have failed: the step has failed.")
    scene.at(6).play(broke("source", "b1", PERMANENT, 2))


def fall_back_from_below(scene: Scene) -> None:
    scene.note("A recipe whose need has failed has failed too: the other one is tried, not doomed.")
    source = either("source", recipe("curl"), recipe("git"), recipe("curl", "git"))
    scene.play(join("b1"))
    scene.play(submit("s1", ["source"], source, a_step("curl"), a_step("git")))
    scene.at(1).play(broke("curl", "b1", PERMANENT))
    scene.note("The third recipe stands on the same failure and is not tried.")
    scene.at(2).play(broke("git", "b1", PERMANENT))


def infrastructure(scene: Scene) -> None:
    scene.note("The farm's faults are retried: back-off, another builder first, five attempts in all.")
    scene.play(join("b1"))
    scene.play(join("b2"))
    scene.play(submit("s1", ["app"], a_step("app")))
    for attempt in range(1, 6):
        holder = scene.farm.state.steps[lease("app").step].builder
        scene.at(scene.now + 1).play(broke("app", holder, INFRASTRUCTURE, attempt, "disk full"))
        if attempt < 5:
            scene.wake()


def builder_lost(scene: Scene) -> None:
    scene.note("A builder dies in the middle of a build; its late word changes nothing.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app")))
    scene.at(1).play(join("b2"))
    scene.at(2).play(lost("b1"))
    scene.wake()
    scene.play(built("app", "b1"))
    scene.at(9).play(built("app", "b2", 2))
    scene.at(10).play(published("app", 2))


def shared_work(scene: Scene) -> None:
    scene.note("Two submissions share `base`. Cancelling one leaves the shared step alone, cancelling both stops it.")
    scene.play(join("b1", 2))
    scene.play(submit("s1", ["mine"], a_step("mine", "base"), a_step("base")))
    scene.at(1).play(submit("s2", ["yours", "extra"], a_step("yours", "base"), a_step("base"), a_step("extra")))
    scene.at(2).play(cancel("s1"))
    scene.at(3).play(cancel("s2"))
    scene.note("The builder confirms; nobody waits for it. A repeat is nothing.")
    scene.at(4).play(broke("base", "b1", FailureKind.CANCELLED), cancel("s2"))
    scene.at(5).play(submit("s3", ["mine"], a_step("mine", "base"), a_step("base")))


def held_and_lost(scene: Scene) -> None:
    scene.note("What the cache holds is not built, whether its recipe is given or not.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app", "lib", "tool"), a_step("lib"), held=["lib", "tool"]))
    scene.at(1).play(built("app", "b1"))
    scene.at(2).play(published("app"))
    scene.note("The same graph again builds nothing.")
    scene.at(3).play(submit("s2", ["app"], a_step("app", "lib", "tool"), held=["app", "lib", "tool"]))
    scene.note("The cache has lost `app` and `lib`; the next submission makes them again.")
    scene.at(4).play(submit("s3", ["app"], a_step("app", "lib", "tool"), a_step("lib"), held=["tool"]))
    scene.note("An answer of the cache from before the result was published loses nothing.")
    scene.at(5).play(built("lib", "b1"))
    scene.at(6).play(published("lib", 1))
    scene.at(7).play(submit("s4", ["lib"], a_step("lib"), asked_at=5.5))


def returned(scene: Scene) -> None:
    scene.note("A builder hands leases back: at once to another, with back-off where the ball only goes to and fro.")
    scene.play(join("b1"), join("b2"))
    scene.play(submit("s1", ["app"], a_step("app")))
    for attempt in range(1, 6):
        holder = scene.farm.state.steps[lease("app").step].builder
        scene.at(scene.now + 1).play(broke("app", holder, FailureKind.RETURNED, attempt, "draining"))
        if not scene.farm.state.steps[lease("app").step].builder:
            scene.wake()


def healing(scene: Scene) -> None:
    scene.note("The order to start was lost: after a grace the heartbeat shows it, and it is said again, thrice.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app")))
    scene.at(10).play(report("b1"))
    scene.at(16).play(report("b1"))
    scene.at(20).play(report("b1"))
    scene.at(32).play(report("b1"))
    scene.at(48).play(report("b1"))
    scene.at(64).play(report("b1"))
    scene.note("A lease without a right is cancelled.")
    scene.at(80).play(report("b1", 1, lease("app"), lease("ghost")))


def restart(scene: Scene) -> None:
    scene.note("The coordinator dies with one build running, one publishing, one that its builder never heard of.")
    scene.play(join("b1", 2))
    scene.play(submit("s1", ["x", "y", "z"], a_step("x"), a_step("y"), a_step("z")))
    scene.at(1).play(built("x", "b1"))
    scene.at(2)
    scene.restart()
    scene.note("The builder comes back and holds `y` alone: `z` is handed over again at once.")
    scene.at(3).play(join("b1", 2, [lease("y")]))
    scene.at(4).play(published("x"), built("y", "b1"))
    scene.at(5).play(published("y"))
    scene.note("The builder's process starts anew with nothing: what it held is revoked.")
    scene.at(6).play(join(builder("b1", incarnation="2"), 2))


def silence(scene: Scene) -> None:
    scene.note("A builder falls silent. Its lease runs out; its next heartbeat brings it back without a greeting.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app")))
    scene.at(60).play(report("b1", 1, lease("app")))
    scene.wake()
    scene.at(200).play(report("b1", 1, lease("app")))
    scene.at(320).play(TimePassed())
    scene.note("Only the confirmed death of this incarnation makes it forgotten.")
    scene.at(330).play(lost("b1", "0"), lost("b1"))
    scene.at(340).play(report("b1"))


def placement(scene: Scene) -> None:
    scene.note("Systems, features, mandatory features; the longest path first, the emptiest builder first.")
    scene.play(join(builder("big", LINUX, features=["big", "kvm"], mandatory=["big"]), 2))
    scene.play(join(builder("mac", "darwin"), 1), join(builder("pc", LINUX, features=["kvm"]), 1))
    steps = (
        a_step("long", "part"),
        a_step("part"),
        a_step("short"),
        a_step("huge", features=["big"]),
        a_step("on-mac", system="darwin"),
        a_step("fetch", system="builtin"),
        a_step("alien", system="riscv"),
    )
    scene.play(submit("s1", ["long", "short", "huge", "on-mac", "fetch", "alien"], *steps))
    for wanted, reason in scene.farm.unserved().items():
        scene.note(f"stuck: {wanted.system}: {describe_unserved(reason)}")


def known_failure(scene: Scene) -> None:
    scene.note("A known failure is not built again: the next submission ends at once, naming the root cause.")
    chain = (a_step("app", "lib", "tool"), a_step("lib"), a_step("tool"))
    scene.play(join("b1"))
    scene.play(submit("s1", ["lib"], a_step("lib")))
    scene.at(1).play(broke("lib", "b1", PERMANENT))
    scene.at(2).play(submit("s2", ["app", "tool"], *chain))
    scene.note(
        "What does not stand on it goes on. The failing step is retried alone: `s2` runs again, `s1` is not asked."
    )
    scene.at(3).play(submit("s2", ["app", "tool"], *chain, retry=["lib"], again=True))
    scene.note("A repeat is nothing.")
    scene.at(4).play(submit("s2", ["app", "tool"], *chain, retry=["lib"], again=True))
    scene.at(5).play(built("tool", "b1"))
    scene.at(6).play(published("tool"))
    scene.at(7).play(broke("lib", "b1", PERMANENT, 2))
    scene.note("A day later nothing is known any more.")
    scene.at(7 + 24 * 3600).play(join("b2"), submit("s3", ["app"], *chain, held=["tool"]))


def quarantine(scene: Scene) -> None:
    scene.note("A builder fails three leases in a row by faults of its own. The third puts it in quarantine.")
    scene.play(join("bad", 2))
    scene.play(submit("s1", ["u", "v", "w"], a_step("u"), a_step("v"), a_step("w")))
    scene.at(1).play(broke("u", "bad", FailureKind.UPLOAD_FAILED), broke("v", "bad", FailureKind.DAEMON_LOST))
    scene.at(2).play(broke("w", "bad", FailureKind.UPLOAD_FAILED))
    scene.note("It comes back by itself and is trusted with one lease; another fault sends it back for longer.")
    while scene.farm.state.builders[builder("bad").id].until:
        scene.wake()
        scene.play(report("bad", 2))
    again = next(step for step in scene.farm.state.steps.values() if step.builder)
    scene.at(scene.now + 1).play(broke(again.key, "bad", FailureKind.DISK_LOW, again.attempt))
    scene.note("A builder that calls itself unfit gets nothing, and its own word frees it.")
    scene.at(scene.now + 1).play(join("full", 2, unfit="the disk has 1 % of free space"))
    scene.at(scene.now + 1).play(report("full", 2))
    scene.note("One success, and it is trusted as before.")
    steady = next(step for step in scene.farm.state.steps.values() if step.builder == "full")
    scene.at(scene.now + 1).play(built(steady.key, "full", steady.attempt))


def forgotten(scene: Scene) -> None:
    scene.note("A submission that still waits is not forgotten, one that has ended is, with all that only it named.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["app"], a_step("app", "lib"), a_step("lib")))
    scene.play(submit("s2", ["lib"], a_step("lib")))
    scene.at(1).play(expire("s1"))
    scene.at(2).play(built("lib", "b1"))
    scene.at(3).play(published("lib"))
    scene.at(4).play(cancel("s1"))
    scene.at(5).play(expire("s1"))
    scene.note("A repeat is nothing. `lib` goes with the last that names it.")
    scene.at(6).play(expire("s1"), expire("s2"))
    scene.note("It becomes known again, and its attempts go on: what the old lease still says is stale.")
    scene.at(7).play(submit("s3", ["lib"], a_step("lib")))
    scene.at(8).play(built("lib", "b1", 1))
    scene.at(9).play(built("lib", "b1", 2))
    scene.at(10).play(published("lib", 2))


def lost_while_wanted(scene: Scene) -> None:
    scene.note("The cache holds `lib`, at which the plan ends. It loses it, and its `src`, before `app` can begin.")
    scene.play(join("b1", 2), join("b2", 2))
    scene.play(submit("s1", ["app"], a_step("app", "lib", "tool"), a_step("tool"), held=["lib"], asked_at=0))
    scene.play(submit("s2", ["other"], a_step("other", "lib", "tool"), held=["lib"], asked_at=0))
    scene.at(1).play(built("tool", "b1"))
    scene.at(2).play(published("tool"))
    scene.note("The shell has seen the loss itself: no builder is blamed, no attempt is used up, and the step waits.")
    holder = scene.farm.state.steps[lease("app").step].builder
    scene.at(3).play(broke("app", holder, FailureKind.INPUT_LOST, message="lib is gone from the cache"))
    scene.note("Nothing could be mended, so the submission is planned anew. What another one wants waits, too.")
    chain = (a_step("app", "lib", "tool"), a_step("lib", "src"), a_step("src"))
    scene.at(4).play(submit("s1", ["app"], *chain, held=["tool"], asked_at=4, replanned=True))
    scene.at(5).play(built("src", scene.farm.state.steps[lease("src").step].builder))
    scene.at(6).play(published("src"))
    scene.at(7).play(built("lib", scene.farm.state.steps[lease("lib").step].builder))
    scene.at(8).play(published("lib"))
    scene.note("What has ended is not planned anew: this is nothing.")
    scene.at(9).play(built("app", scene.farm.state.steps[lease("app").step].builder, 2))
    scene.at(10).play(published("app", 2))
    scene.at(11).play(submit("s1", ["app"], *chain, held=["tool"], replanned=True))


def given_up(scene: Scene) -> None:
    scene.note("Nobody offers `mac`: a step waits its time and fails; one with another recipe takes that.")
    scene.farm = Farm(Limits(give_up_s=60.0))
    scene.play(join("b1"))
    fetched = either("fetched", recipe(system="mac"), recipe())
    scene.play(submit("s1", ["app"], a_step("app", "tool"), a_step("tool", system="mac"), fetched))
    scene.at(20).play(submit("s2", ["fetched"], fetched), report("b1"))
    scene.at(60).play(TimePassed())
    scene.at(80).play(report("b1"))
    scene.note("Asked for again, it waits anew; the worker that has come meanwhile takes it.")
    scene.at(90).play(submit("s3", ["app"], a_step("app", "tool"), a_step("tool", system="mac")))
    scene.at(100).play(join(builder("m1", "mac")))


def fair_share(scene: Scene) -> None:
    scene.note("A mass rebuild stands in front. Somebody else's one step waits for its turn, not for the end of it.")
    mass = [a_step(f"mass-{i}", f"base-{i}") for i in range(4)]
    bases = [a_step(f"base-{i}") for i in range(4)]
    scene.play(submit("mass", [item.key for item in mass], *mass, *bases))
    scene.play(join("b1"))
    scene.play(submit("small", ["one"], a_step("one")))
    scene.note("The rank of its steps gives the mass nothing: it has just been served.")
    scene.at(1).play(built("base-0", "b1"))
    scene.note("A step that both want counts for both.")
    scene.play(submit("other", ["base-3", "two"], a_step("base-3"), a_step("two")))
    holder = next(step for step in scene.farm.state.steps.values() if step.state == "leased")
    scene.at(3).play(built(holder.key, "b1"))
    holder = next(step for step in scene.farm.state.steps.values() if step.state == "leased")
    scene.at(4).play(built(holder.key, "b1"))


def opened(scene: Scene) -> None:
    scene.note("An evaluation streams: the first root is built while the others are still looked for.")
    scene.play(join("b1"))
    scene.play(submit("s1", ["a"], a_step("a", "base"), a_step("base"), opens=True))
    scene.at(1).play(built("base", "b1"))
    scene.at(2).play(published("base"))
    scene.note("`b` needs what is done and something new. A batch that comes twice changes nothing.")
    scene.at(3).play(grow("s1", ["b"], a_step("b", "base", "tool"), a_step("tool")))
    scene.at(4).play(grow("s1", ["b"], a_step("b", "base", "tool"), a_step("tool")))
    scene.at(5).play(built("a", "b1"))
    scene.at(6).play(published("a"))
    scene.note("A failure does not end it while it is open, and is not tried again for a later root.")
    scene.at(7).play(broke("tool", "b1", FailureKind.TIMEOUT))
    scene.at(8).play(grow("s1", ["c", "d"], a_step("c", "tool"), a_step("tool"), a_step("d")))
    scene.at(9).play(built("d", "b1"))
    scene.at(10).play(published("d"))
    scene.note("Nothing is left: it ends as soon as no more can come.")
    scene.at(11).play(seal("s1"))


CHAIN = (a_step("c", "b"), a_step("b", "a"), a_step("a"))


def succession(scene: Scene) -> None:
    scene.note("One builder makes a chain. It gets each lease while it makes what the step needs.")
    scene.play(join(builder("b1", successors=True)))
    scene.play(submit("s1", ["c"], *CHAIN))
    scene.note("`b` has begun in the place of `a`, of which nothing is published yet; `c` is next.")
    scene.at(1).play(built("a", "b1"))
    scene.note("What is built is published after what it refers to.")
    scene.at(2).play(built("b", "b1"))
    scene.at(3).play(published("a"))
    scene.at(4).play(built("c", "b1"), published("b"))
    scene.at(5).play(published("c"))


def succession_broken(scene: Scene) -> None:
    scene.note("What follows a lease ends before it, costs no attempt and is nobody's fault.")
    scene.play(join(builder("b1", successors=True)))
    scene.play(submit("s1", ["c"], *CHAIN))
    scene.at(1).play(built("a", "b1"))
    scene.at(2).play(built("b", "b1"))
    scene.note("`a` cannot be published: `b` is built and `c` runs, and neither counts.")
    scene.at(3).play(unpublished("a", INFRASTRUCTURE))
    scene.at(63).play(TimePassed())
    scene.note("It fails for good: so it says itself, once, and the others are doomed by it.")
    scene.at(64).play(broke("a", "b1", PERMANENT, 2))


STORIES: tuple[Callable[[Scene], None], ...] = (
    diamond,
    failure_dooms,
    fall_back,
    fall_back_from_below,
    infrastructure,
    builder_lost,
    shared_work,
    held_and_lost,
    lost_while_wanted,
    returned,
    healing,
    restart,
    silence,
    placement,
    known_failure,
    quarantine,
    forgotten,
    given_up,
    fair_share,
    opened,
    succession,
    succession_broken,
)


@pytest.mark.parametrize("tale", STORIES, ids=lambda tale: str(tale.__name__))
def test_the_core_yields_what_the_trace_records(tale: Callable[[Scene], None], rewrite_traces: bool) -> None:
    scene = Scene()
    tale(scene)
    told = "\n".join(scene.lines) + "\n"
    golden = TRACES / f"{tale.__name__}.txt"
    if rewrite_traces:
        golden.write_text(told)
    assert told == golden.read_text()
    # Whatever happened, the journal alone gives the same durable state.
    scene.restart()
