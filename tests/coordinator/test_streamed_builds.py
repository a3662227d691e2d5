"""`drover build` while it evaluates, against a coordinator in this process: what is built meanwhile, what is said."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.models import StepStatus
from coordinator.cli import exit_status
from coordinator.cli.build import BuildRequest, build
from coordinator.cli.evaluation import EvaluationRequest
from coordinator.client.api_client import ApiClient
from tests.coordinator.conftest import PRELUDE, OpenedFarm, OpenFarm

NO_SUBSTITUTERS = ("--option", "substituters", "")


def streamed(farm: OpenedFarm, text: str, *attrs: str, **more: Any) -> asyncio.Task[int]:
    """Start `drover build` of an attribute set in a thread."""
    file = farm.root / "streamed.nix"
    file.write_text(PRELUDE + text)
    token = farm.coordinator.ready.token_file.read_text().strip()
    evaluation = EvaluationRequest((str(file),), attrs, evaluators=2, eval_cache=False)
    request = BuildRequest(evaluation, settings=NO_SUBSTITUTERS, store=str(farm.root / "client"), as_json=True, **more)
    return asyncio.create_task(asyncio.to_thread(build, lambda: ApiClient(farm.coordinator.ready.url, token), request))


async def test_what_is_found_first_is_built_while_the_rest_is_evaluated(
    open_farm: OpenFarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"""
    rec {{
      early = run "early" "echo > $out";
      bad = throw "there is no such thing";
      late = builtins.seq (builtins.readFile "{gate}") (run "late" "echo ${{early}} > $out");
    }}
    """
    async with open_farm("w1") as farm:
        views = farm.coordinator.views
        running = streamed(farm, text, "early", "bad", "late")
        await farm.until(lambda: any(row.counts[StepStatus.DONE] for row in views.submission_rows()))
        [row] = views.submission_rows()
        assert (row.is_open, row.ended, len(row.members)) == (True, False, 1)
        await asyncio.to_thread(lambda: gate.open("w").close())
        assert await running == exit_status.EVALUATION_FAILED
        view = await farm.client.submission(row.id)
        assert (view.counts.total, view.counts.done, view.open, view.incomplete) == (2, 2, False, "")
        assert [(each.attr, each.message) for each in view.not_evaluated] == [("bad", "there is no such thing")]
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [(root["attr"], root["state"]) for root in document["roots"]] == [("early", "done"), ("late", "done")]
    assert document["moments"]["first_step"] < document["moments"]["evaluated"]
    assert "bad cannot be evaluated: there is no such thing" in err


async def test_a_file_without_anything_to_build_opens_no_submission(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        with pytest.raises(Exception, match="there is no such thing"):
            await streamed(farm, '{ bad = throw "there is no such thing"; }', "bad")
        assert farm.coordinator.views.submission_rows() == []


async def test_one_that_is_cancelled_while_it_is_evaluated_ends_its_client(open_farm: OpenFarm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"""
    rec {{
      early = run "early" "echo > $out";
      late = builtins.seq (builtins.readFile "{gate}") early;
    }}
    """
    async with open_farm() as farm:
        views = farm.coordinator.views
        running = streamed(farm, text, "early", "late")
        await farm.until(lambda: any(row.members for row in views.submission_rows()))
        await farm.client.cancel(views.submission_rows()[0].id)
        assert await running == exit_status.CANCELLED
