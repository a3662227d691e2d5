"""Workers that isolate builds weakly get work only where the operator allows them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.cli import serve
from coordinator.cli.commands import cli
from coordinator.config import Settings, load_settings
from coordinator.security.isolation import WeakIsolation
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_engine import ONE, ScriptedWorker, output_path, report, started
from workers.wire.grades import IsolationGrade
from workers.wire.messages import Succeeded

FULL = IsolationGrade(level="A")
MAC = IsolationGrade(level="B", reasons=("the macOS sandbox shares network with the machine",))
WEAK = IsolationGrade(
    level="C",
    reasons=("builders run as the host's root", "builds can write /bin/sh"),
    remedy="give it build users",
)


@pytest.mark.parametrize(
    ("grade", "allowed", "works"),
    [
        (FULL, (), True),
        (MAC, (), True),
        (WEAK, (), False),
        (WEAK, ("other",), False),
        (WEAK, ("w",), True),
        (None, (), False),
        (None, ("w",), True),
    ],
)
def test_workers_of_class_c_or_of_no_reported_class_need_a_permission_by_name(
    grade: IsolationGrade | None, allowed: tuple[str, ...], works: bool
) -> None:
    assert (WeakIsolation(allowed).refusal("w", grade) == "") is works


async def test_a_weak_worker_gets_no_work_and_a_sentence_with_the_weakness_and_its_remedy(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello(isolation=WEAK)
        await worker.speak()
        assert not worker.orders
        [seen] = await farm.client.workers()
        assert (seen.state, seen.isolation, seen.isolation_reasons) == ("quarantined", "C", WEAK.reasons)
        assert seen.reason == (
            "its isolation is weak, class C: builders run as the host's root (and 1 more in `drover workers`); "
            "give it build users, or allow it by name: `drover up --allow-weak-isolation w`"
        )
        assert farm.coordinator.views.workforce.answering() == ("w",), "a stop gives its builds time too"
        assert "its isolation is weak" in (await farm.client.step(submitted.roots[0].step)).waiting_for
        # What it measures anew counts at once, and what it built then says of which class it was.
        await worker.speak(isolation=FULL)
        order = await started(farm, worker)
        assert (await farm.client.step(order.step)).isolation == "A"
        await worker.speak(report(order, Succeeded(outputs=(await worker.upload(output_path(farm, order)),))))
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
        await worker.speak(isolation=WEAK)
        assert (await farm.client.step(order.step)).isolation == "A"
        await farm.submit(ONE, "two")
        await worker.speak()
        assert len(worker.orders) == 1, "a worker that became weak gets nothing more"
    async with open_farm(fleet=ScriptedWorker().start) as farm:
        again = await farm.client.step(order.step)
        assert (again.state, again.isolation) == (StepStatus.DONE, "A"), "the journal remembers"


async def test_an_older_worker_that_does_not_measure_counts_as_weak(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        await farm.submit(ONE, "one")
        await worker.hello(isolation=None)
        await worker.speak()
        assert not worker.orders
        [seen] = await farm.client.workers()
        assert "was not measured" in seen.reason


def test_names_come_from_the_file_and_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "farm.toml"
    file.write_text('weak_isolation = ["laptop"]\n')
    assert load_settings(file).weak_isolation == ("laptop",)
    assert Settings().weak_isolation == ()
    told = []

    def up(**given: Any) -> int:
        told.append(given["weak"])
        return 0

    monkeypatch.setattr(serve, "up", up)
    words = ["up", "--allow-weak-isolation", "one", "--allow-weak-isolation", "two"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert told == [("one", "two")]
