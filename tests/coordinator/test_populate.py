"""Rules of populating: what is new, what drifted, what is built, what a report says, and what counts as a proof."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.mirroring import MirroredOutcome, MirroredPathView
from coordinator.api.models import FarmView
from coordinator.cli import exit_status
from coordinator.cli.populate_text import PopulateReport, populate_lines, populate_markdown
from coordinator.cli.proof import ProofMeans, prove
from coordinator.config import CacheSettings, Settings
from coordinator.main import open_coordinator
from coordinator.populate.model import (
    DerivationFacts,
    Drift,
    PopulatedWish,
    PopulateOutcome,
    PopulateTarget,
    Proof,
    ProofState,
)
from coordinator.populate.steps import changed, drift_of, judged, refusal_to_build, targets_of, to_pull
from coordinator.wishes.model import (
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishMark,
    WishSource,
)
from tests.support.cache import STORE_DIR, publish, store_path
from tests.support.local_fleet import no_workers
from tests.support.upstreams import UPSTREAM_KEY, Lie, lying_upstream

LINUX, MAC = "x86_64-linux", "aarch64-darwin"
#: The NAR of a file with a text.
A_NAR = b"".join(
    len(word).to_bytes(8, "little") + word + b"\0" * (-len(word) % 8)
    for word in (b"nix-archive-1", b"(", b"type", b"regular", b"contents", b"text", b")")
)
DRV, OTHER_DRV = store_path("a.drv"), store_path("other.drv")
OUT, DEV, ELSEWHERE = store_path("a"), store_path("a-dev"), store_path("elsewhere")


def wish(name: str = "a", system: str = LINUX, **outputs: str) -> Wish:
    paths = tuple(WishedOutput(each, path) for each, path in (outputs or {"out": OUT}).items())
    return Wish(name, system, WishedPaths(paths, DRV))


def a_list(*wishes: Wish) -> WishList:
    return WishList("a list", WishSource.FLOX, wishes, (LINUX, MAC))


def facts(path: str = DRV, **outputs: str) -> DerivationFacts:
    return DerivationFacts(path, outputs or {"out": OUT, "dev": DEV}, LINUX, at_farm=True)


def target(its: Wish, derivation: DerivationFacts | None = None) -> PopulateTarget:
    known = {} if derivation is None else {derivation.path: derivation}
    (found,) = targets_of([its], known, {}, {}, {})
    return found


def seen(path: str, outcome: MirroredOutcome, reason: str = "") -> MirroredPathView:
    return MirroredPathView(path=path, outcome=outcome, reason=reason)


def test_new_in_a_list_is_what_the_old_one_names_no_path_of() -> None:
    renamed = replace(wish(), name="another name")
    attribute = Wish("b", LINUX, WishedAttribute(".", "b"))
    drv = Wish("c", LINUX, WishedDerivation(DRV))
    old = a_list(wish(), attribute, drv)
    fresh = wish("d", LINUX, out=ELSEWHERE)
    on_another = wish("a", MAC)
    grown = wish("a", LINUX, out=OUT, dev=DEV)
    new = a_list(renamed, attribute, drv, fresh, on_another, grown)
    assert changed(old, new) == (attribute, fresh, on_another, grown)


def test_a_derivation_that_makes_another_path_than_the_list_names_is_drift() -> None:
    assert drift_of(target(wish(), facts()), {}) is None
    assert drift_of(target(wish(dev=DEV, out=OUT), facts()), {}) is None
    # A bare path has no output's name of its own.
    assert drift_of(target(wish(out=DEV), facts()), {}) is None
    found = drift_of(target(wish(dev=DEV, out=ELSEWHERE), facts()), {ELSEWHERE: OTHER_DRV})
    assert found == Drift("out", ELSEWHERE, OUT, DRV, OTHER_DRV)
    # Nothing is known, or only a build says what it makes.
    assert drift_of(target(wish(out=ELSEWHERE)), {}) is None
    assert drift_of(target(wish(out=ELSEWHERE), facts(DRV, out="")), {}) is None


def test_what_an_evaluation_gave_counts_before_the_list_s_derivation_and_that_before_a_maker() -> None:
    known = {each: facts(each) for each in (DRV, OTHER_DRV)}
    (found,) = targets_of([wish()], known, {}, {wish().key: OTHER_DRV}, {})
    assert found.derivation == known[OTHER_DRV]
    (found,) = targets_of([wish()], known, {OUT: OTHER_DRV}, {}, {})
    assert found.derivation == known[DRV]
    (found,) = targets_of([wish()], {OTHER_DRV: known[OTHER_DRV]}, {OUT: OTHER_DRV}, {}, {})
    assert found.derivation == known[OTHER_DRV]
    (found,) = targets_of([Wish("c", LINUX, WishedDerivation(DRV, ("dev",)))], known, {}, {}, {})
    assert found.paths == (DEV,)


def test_of_several_outputs_the_one_that_is_worst_off_counts_and_drift_is_not_pulled() -> None:
    both = target(wish(out=OUT, dev=DEV), facts())
    pulled = {OUT: seen(OUT, MirroredOutcome.MIRRORED), DEV: seen(DEV, MirroredOutcome.REFUSED, "it lies")}
    found = judged(both, pulled, {})
    assert (found.outcome, found.reason) == (PopulateOutcome.REFUSED, "it lies")
    assert judged(both, pulled | {DEV: seen(DEV, MirroredOutcome.HERE)}, {}).outcome is PopulateOutcome.MIRRORED
    drift = Drift("out", OUT, ELSEWHERE, DRV)
    assert to_pull([both], {}) == (OUT, DEV)
    assert to_pull([both], {both.wish.key: drift}) == ()
    assert judged(both, {}, {both.wish.key: drift}).drift == drift
    attribute = Wish("b", LINUX, WishedAttribute(".", "b"))
    assert judged(target(attribute), {}, {}).outcome is PopulateOutcome.UNEVALUATED
    unfree = target(replace(attribute, marks=frozenset({WishMark.UNFREE})))
    assert judged(unfree, {}, {}).outcome is PopulateOutcome.EXCLUDED
    unknown = judged(target(Wish("c", LINUX, WishedDerivation(DRV))), {}, {})
    assert (unknown.outcome, DRV in unknown.reason) == (PopulateOutcome.NOWHERE, True)
    broken = PopulateTarget(wish(), (), None, "it cannot be evaluated: no")
    assert judged(broken, {}, {}).outcome is PopulateOutcome.UNEVALUATED


def test_nothing_is_built_that_nix_refuses_or_that_no_worker_builds() -> None:
    assert refusal_to_build(target(wish(), facts()), {LINUX}) is None
    assert refusal_to_build(target(wish(), facts()), {MAC}) == (
        PopulateOutcome.NO_WORKER,
        f"no worker builds for {LINUX}",
    )
    unfree = replace(wish(), marks=frozenset({WishMark.UNFREE}))
    assert refusal_to_build(target(unfree, facts()), {LINUX}) == (
        PopulateOutcome.EXCLUDED,
        "it is unfree, so it is not built",
    )


def populated(outcome: PopulateOutcome, state: ProofState = ProofState.PROVEN, reason: str = "") -> PopulatedWish:
    drift = Drift("out", OUT, ELSEWHERE, DRV, "", "why") if outcome is PopulateOutcome.DRIFT else None
    return PopulatedWish("a", LINUX, outcome, (OUT,), reason=reason, drift=drift, proof=Proof(state, "bad signature"))


def test_the_status_is_that_of_the_worst_and_the_report_has_every_reason() -> None:
    def status(*wishes: PopulatedWish) -> int:
        return PopulateReport("a list", (LINUX,), wishes).status

    here, drifted = populated(PopulateOutcome.HERE), populated(PopulateOutcome.DRIFT)
    assert status(here) == exit_status.OK
    assert status(here, populated(PopulateOutcome.UNEVALUATED)) == exit_status.EVALUATION_FAILED
    assert status(populated(PopulateOutcome.BUILT, ProofState.FAILED)) == exit_status.NOT_WHOLE
    assert status(populated(PopulateOutcome.NO_WORKER), populated(PopulateOutcome.UNEVALUATED)) == exit_status.NOT_WHOLE
    assert status(drifted, populated(PopulateOutcome.NOWHERE)) == exit_status.DRIFTED
    assert status(drifted, populated(PopulateOutcome.FAILED)) == exit_status.BUILD_FAILED
    hostile = populated(PopulateOutcome.REFUSED, reason="\x1b[2J@everyone <img src=x> | pipe")
    unproven = populated(PopulateOutcome.MIRRORED, ProofState.FAILED)
    report = PopulateReport("a list", (LINUX,), (here, drifted, hostile, unproven), proof=ProofMeans.OWN)
    lines = "\n".join(populate_lines(report))
    assert "x86_64-linux: 1 here, 1 mirrored, 1 drift, 1 refused" in lines
    assert f"listed {OUT}\n      made   {ELSEWHERE}\n      why" in lines
    assert "not proven: bad signature" in lines
    assert "without Nix" in lines
    page = populate_markdown(report)
    assert "<img" not in page
    assert "@everyone" not in page
    assert page.count("\n| <code>a</code> |") == 3


@pytest.mark.parametrize("means", [ProofMeans.OWN, ProofMeans.NIX])
async def test_a_proof_fails_for_what_cannot_be_fetched_whole_and_for_nothing_else(
    means: ProofMeans, tmp_path: Path
) -> None:
    async with lying_upstream(tmp_path / "cache") as served:
        paths = [store_path(name) for name in ("good", "stands-on-bad", "bad", "foreign", "absent")]
        good, above, bad, foreign, absent = paths
        nar = A_NAR
        for path in (good, bad, foreign):
            await publish(served.cache, path, nar if path == good else nar.replace(b"text", path[-4:].encode()))
        await publish(served.cache, above, nar.replace(b"text", b"over"), references=[bad])
        served.lie(bad, Lie.WRONG_NAR)
        served.lie(foreign, Lie.WRONG_KEY)
        farm = FarmView(
            version="0", cache_url=served.url, public_keys=(str(UPSTREAM_KEY.public),), store_dir=STORE_DIR.path
        )
        (tmp_path / "within").mkdir()
        report = await prove(farm, "", paths, means, tmp_path / "within")
    assert report.failed.keys() == {above, bad, foreign, absent}
    assert all(report.failed.values())


@pytest.mark.parametrize("means", [ProofMeans.OWN, ProofMeans.NIX])
async def test_a_cache_that_is_not_public_is_proven_with_the_token(
    means: ProofMeans, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READER", "r" * 32)
    private = settings.model_copy(update={"cache": CacheSettings(readers=("env:READER",))})
    async with open_coordinator(private, no_workers) as farm:
        path = store_path("good")
        await publish(farm.cache, path, A_NAR)
        view = FarmView(
            version="0",
            cache_url=farm.ready.cache_url,
            public_keys=farm.ready.public_keys,
            store_dir=STORE_DIR.path,
        )
        found = []
        for token in ("r" * 32, ""):
            within = tmp_path / (token or "nobody")
            await asyncio.to_thread(within.mkdir)
            found.append((await prove(view, token, [path], means, within)).failed.keys())
    assert found == [set(), {path}]
