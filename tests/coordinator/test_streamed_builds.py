"""`drover build` while it evaluates, against a coordinator in this process: what is built meanwhile, what is said."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.models import StepStatus
from coordinator.cli import exit_status
from coordinator.cli.build import BuildRequest, build
from coordinator.cli.evaluation import EvaluationRequest
from coordinator.cli.submission_options import SubmissionWords
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.intake import growth
from tests.coordinator.conftest import PRELUDE, OpenedFarm, OpenFarm

NO_SUBSTITUTERS = ("--option", "substituters", "")


def streamed(farm: OpenedFarm, text: str, *attrs: str, **more: Any) -> asyncio.Task[int]:
    """Start `drover build` of an attribute set in a thread."""
    # Several side by side lie in directories of their own, as checkouts do.
    file = farm.root / more.pop("checkout", ".") / "streamed.nix"
    file.parent.mkdir(exist_ok=True)
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
      early = builtins.trace "token: hunter2" (run "early" "echo > $out");
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
        # What an evaluation prints is for the person at the terminal only.
        kept = [
            path for path in farm.settings.state_dir.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
        ]
        assert kept == []
    out, err = capsys.readouterr()
    assert "hunter2" in err
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


GATED = """
rec {
  early = run "early" "echo %s > $out";
  late = builtins.seq (builtins.readFile "%s") (run "late" "echo ${early} > $out");
}
"""


async def test_another_graph_under_the_key_of_a_build_that_still_evaluates_is_refused_at_once(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    gate, same_gate = tmp_path / "gate", tmp_path / "same-gate"
    os.mkfifo(gate)
    same_gate.write_text("")
    words = SubmissionWords(idempotency_key="run-7")
    async with open_farm("w1") as farm:
        views = farm.coordinator.views
        first = streamed(farm, GATED % ("one", gate), "early", "late", words=words)
        await farm.until(lambda: any(row.members for row in views.submission_rows()))
        [row] = views.submission_rows()
        # Beside it: another tree, other attributes, and at last the same wish, which is ahead and waits.
        with pytest.raises(RefusedError, match=f"early is another derivation in submission {row.id}") as other:
            await streamed(farm, GATED % ("two", same_gate), "early", "late", words=words, checkout="2")
        with pytest.raises(RefusedError, match=f"'run-7' is that of submission {row.id}") as fewer:
            await streamed(farm, GATED % ("one", same_gate), "early", words=words, checkout="3")
        assert {error.value.http_status for error in (other, fewer)} == {409}
        assert (row.is_open, len(views.note(row.id).roots)) == (True, 1)
        second = streamed(farm, GATED % ("one", same_gate), "early", "late", words=words, checkout="4")
        await asyncio.to_thread(lambda: gate.open("w").close())
        assert [await first, await second] == [exit_status.OK, exit_status.OK]
        assert len(views.submission_rows()) == 1
        assert (await farm.client.submission(row.id)).root_count == 2


async def test_a_client_that_was_killed_resumes_its_own_build_by_its_key(
    open_farm: OpenFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, open_gate = tmp_path / "gate", tmp_path / "open-gate"
    os.mkfifo(gate)
    open_gate.write_text("")
    monkeypatch.setattr(growth, "TURN_S", 0.5)
    async with open_farm("w1") as farm:
        views = farm.coordinator.views
        file = farm.root / "streamed.nix"
        file.write_text(PRELUDE + GATED % ("one", gate))
        url, token = farm.coordinator.ready.url, str(farm.coordinator.ready.token_file)
        command = ("build", str(file), "-A", "early", "-A", "late", "--idempotency-key", "run-8", "--eval-workers", "2")
        store = ("--no-eval-cache", "--store", str(farm.root / "client"), *NO_SUBSTITUTERS)
        env = {**os.environ, "DROVER_URL": url, "DROVER_TOKEN_FILE": token}
        killed = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("drover")), *command, *store, env=env, stdout=subprocess.DEVNULL
        )
        await farm.until(lambda: any(row.members for row in views.submission_rows()))
        killed.kill()
        await killed.wait()
        words = SubmissionWords(idempotency_key="run-8")
        assert await streamed(farm, GATED % ("one", open_gate), "early", "late", words=words) == exit_status.OK
        # An evaluator of its that reads still ends with that; one may have ended before it read.
        with suppress(OSError):
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        [row] = views.submission_rows()
        assert (row.incomplete, {root.attr for root in views.note(row.id).roots}) == ("", {"early", "late"})
