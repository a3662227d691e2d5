"""Runs of `drover populate` against a coordinator that forgets, lacks something or cannot answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click import ClickException

from coordinator.api.mirroring import (
    KnownDerivationsView,
    KnownDerivationView,
    MirroredOutcome,
    MirroredPathView,
    MirrorState,
    MirrorView,
)
from coordinator.api.models import FarmView, SubmissionView, WorkerState, WorkerView
from coordinator.api.rebuild_models import RebuildCausesView
from coordinator.api.requests import KnownDerivationsQuery, MirrorRequest, PairsQuery, SubmitRequest
from coordinator.cli import populate
from coordinator.cli.evaluation import EvaluationRequest
from coordinator.cli.populate import PopulateRequest, PopulateRun
from coordinator.cli.populate_text import PopulateReport
from coordinator.cli.proof import ProofMeans
from coordinator.cli.screen import Screen
from coordinator.cli.wish_reading import WishRequest
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import SubmitBody
from coordinator.client.closure import ClosureError, LocalStore
from coordinator.client.errors import RefusedError
from coordinator.errors import MissingMemberError, NotFoundError
from tests.support.cache import store_path
from tests.support.wishes import catalog_entry, flox_lock

LINUX = "x86_64-linux"
OUT, OTHER, DRV, OTHER_DRV = (store_path(name) for name in ("a", "elsewhere", "a.drv", "elsewhere.drv"))


class FarmStub(ApiClient):
    """A coordinator that knows two derivations, has no path, and forgets its first run of mirroring."""

    def __init__(self, made: str = OUT, outcome: MirroredOutcome = MirroredOutcome.MIRRORED) -> None:
        super().__init__("http://farm.invalid", "")
        self.made, self.outcome = made, outcome
        self.begun: list[MirrorRequest] = []

    async def farm(self) -> FarmView:
        return FarmView(version="0", cache_url="", public_keys=(), store_dir="/nix/store")

    async def known_derivations(self, query: KnownDerivationsQuery) -> KnownDerivationsView:
        known = (
            KnownDerivationView(path=DRV, system=LINUX, outputs={"out": self.made}),
            KnownDerivationView(path=OTHER_DRV, system=LINUX, outputs={"out": OUT}),
        )
        return KnownDerivationsView(derivations=known, makers=dict.fromkeys(query.outputs, OTHER_DRV))

    async def mirror(self, request: MirrorRequest) -> MirrorView:
        self.begun.append(request)
        return MirrorView(id=f"mirror-{len(self.begun)}", state=MirrorState.QUEUED)

    async def mirroring(self, name: str, seen: str = "") -> MirrorView:
        if (name, seen) == ("mirror-1", MirrorState.QUEUED):
            raise RefusedError(404, NotFoundError.code, f"there is no run of mirroring {name}")
        paths = tuple(MirroredPathView(path=path, outcome=self.outcome) for path in self.begun[-1].paths)
        return MirrorView(id=name, state=MirrorState.DONE, paths=paths)

    async def rebuild_causes(self, query: PairsQuery) -> RebuildCausesView:
        raise RefusedError(422, "intake", f"the farm does not have {query.before[0]}")

    async def workers(self, states: Sequence[WorkerState] = (), system: str = "") -> list[WorkerView]:
        assert (tuple(states), system) == ((), "")
        return [
            WorkerView(
                name="w",
                state="online",
                systems=(LINUX,),
                emulated=(),
                features=(),
                slots=1,
                leases=(),
                nix_version="2",
            )
        ]

    async def submit(self, request: SubmitRequest | SubmitBody) -> SubmissionView:
        raise RefusedError(422, MissingMemberError.code, f"a source of {request.roots[0].drv} was collected")


def wanted(tmp_path: Path, *, build: bool = False, markdown: Path | None = None) -> PopulateRequest:
    lock = tmp_path / "manifest.lock"
    entry = {**catalog_entry("a", LINUX), "derivation": DRV, "outputs": {"out": OUT}}
    lock.write_bytes(flox_lock([entry], systems=(LINUX,)))
    wishes = WishRequest((str(lock),), EvaluationRequest(evaluators=1, eval_cache=False))
    return PopulateRequest(wishes, build=build, proof=ProofMeans.NONE, markdown=markdown)


async def populated(farm: ApiClient, tmp_path: Path, *, build: bool = False) -> PopulateReport:
    request = wanted(tmp_path, build=build)
    return await PopulateRun(farm, request, Screen.choose(as_json=True), "", LocalStore(root=str(tmp_path))).run()


async def test_a_run_of_mirroring_that_the_coordinator_has_forgotten_is_begun_anew(tmp_path: Path) -> None:
    farm = FarmStub()
    report = await populated(farm, tmp_path)
    assert [each.outcome for each in report.wishes] == ["mirrored"]
    first, again = farm.begun
    assert first == again


async def test_a_drift_is_reported_also_where_its_derivations_cannot_be_compared(tmp_path: Path) -> None:
    (wish,) = (await populated(FarmStub(made=OTHER), tmp_path)).wishes
    assert wish.drift is not None
    assert (wish.outcome, wish.drift.made) == ("drift", OTHER)
    assert wish.drift.difference == f"they could not be compared: the farm does not have {OTHER_DRV}"


async def test_what_the_farm_has_lost_is_sent_once_more_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    async def send(*_arguments: object, whole: bool = False) -> tuple[str, ...]:
        sent.append(whole)
        if whole:
            raise ClosureError("this machine does not have it either")
        return ()

    monkeypatch.setattr(populate, "send_closure", send)
    drv = tmp_path / DRV[1:]
    drv.parent.mkdir(parents=True)
    drv.touch()
    with pytest.raises(ClosureError, match="does not have it either"):
        await populated(FarmStub(outcome=MirroredOutcome.NOWHERE), tmp_path, build=True)
    assert sent == [False, True]


def test_a_report_is_shown_also_where_its_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = wanted(tmp_path, markdown=tmp_path / "absent" / "report")
    with pytest.raises(ClickException, match=r"cannot write .*/absent/report: No such file or directory"):
        populate.populate(FarmStub, "", request)
    assert f"{LINUX}: 1 mirrored" in capsys.readouterr().out
