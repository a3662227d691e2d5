"""One trace a submission, over client, coordinator, Ray and workers, as a real receiver gets it."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.conftest import Expression
from tests.support.farm import Farm
from tests.support.otlp import OtlpReceiver, ReceivedSpan
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

#: What must have come before the trace is looked at.
WHOLE = {
    *("submission", "client evaluate", "client closure", "client upload", "step phased", "step broken", "attempt"),
    *("build", "pack", "upload", "verify", "publish", "phase buildPhase", "phase installPhase"),
}
RUN, RESULT = "cicd.pipeline.run.id", "cicd.pipeline.task.run.result"
#: As a CI run would give it: its trace, and the span of the job.
TRACE, JOB = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def spans(farm: Farm, receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> list[ReceivedSpan]:
    """The trace of a submission with a step that is built in phases, one that fails, and one that shares the first."""
    expression = Expression(tmp_path_factory.mktemp("traced"))
    file = expression.write(
        r"""
        phased = shell "phased" ''
          echo '@nix {"action":"setPhase","phase":"buildPhase"}' >&2; read -t 2 x < /dev/zero
          echo '@nix {"action":"setPhase","phase":"installPhase"}' >&2; echo > $out'';
        broken = shell "broken" "echo no; exit 3";
        """
    )
    build = farm.build_command(file, "-A", "phased", "-A", "broken", "--label", "traced", "--json")
    environment = {**farm.environment, "TRACEPARENT": f"00-{TRACE}-{JOB}-01"}
    first = subprocess.Popen(build, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 1, stderr
    submission = json.loads(stdout.splitlines()[-1])["id"]
    everything = receiver.wait_for(lambda got: is_whole([span for span in got if span.trace == TRACE]))
    assert submission == only([span for span in everything if span.trace == TRACE], "submission").attributes[RUN]
    return [span for span in everything if span.trace == TRACE]


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Return whether the trace is here: spans come in any order, and one after the other as they are printed."""
    count = Counter(span.name for span in spans)
    known = {span.id for span in spans}
    return (
        count.keys() >= WHOLE
        and count["attempt"] == 2
        and all(span.parent in known for span in spans if span.parent != JOB)
        and all(RESULT in span.attributes for span in spans if span.name == "attempt")
    )


def test_the_same_can_be_had_as_a_file_without_a_collector(
    farm: Farm, spans: list[ReceivedSpan], tmp_path: Path
) -> None:
    submission = only(spans, "submission").attributes["cicd.pipeline.run.id"]
    written = farm.drover("trace", submission, "-o", tmp_path / "trace.json")
    assert written.returncode == 0, written.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"phased", "broken", "build", "buildPhase"} <= {event["name"] for event in events}
    refused = farm.drover("trace", submission, "-o", tmp_path / "no" / "such" / "folder")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def only(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    [found] = [span for span in spans if span.name == name]
    return found


def below(spans: list[ReceivedSpan], parent: ReceivedSpan) -> dict[str, ReceivedSpan]:
    return {span.name: span for span in spans if span.parent == parent.id}


def test_a_submission_is_a_span_of_the_program_that_started_it(spans: list[ReceivedSpan]) -> None:
    root = only(spans, "submission")
    assert root.parent == JOB
    assert root.attributes["cicd.pipeline.name"] == "traced"
    assert root.attributes["cicd.pipeline.result"] == "failure"
    assert root.status == "STATUS_CODE_ERROR"
    assert set(below(spans, root)) == {
        "client evaluate",
        "client closure",
        "client upload",
        "step phased",
        "step broken",
    }


def test_every_span_has_its_parent_in_the_trace_and_lies_within_it(spans: list[ReceivedSpan]) -> None:
    by_id = {span.id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.begin_ns <= span.end_ns
        if span.parent != JOB:
            parent = by_id[span.parent]
            assert parent.begin_ns <= span.begin_ns <= span.end_ns <= parent.end_ns, (span.name, parent.name)


def test_a_step_has_its_attempt_and_that_what_its_worker_did(spans: list[ReceivedSpan]) -> None:
    step = only(spans, "step phased")
    assert step.attributes["cicd.pipeline.task.run.result"] == "success"
    attempt = below(spans, step)["attempt"]
    assert attempt.attributes["cicd.worker.name"] in {"one", "two", "mac"}
    assert attempt.attributes["nix.system"] == "x86_64-linux"
    parts = below(spans, attempt)
    assert set(parts) >= {"build", "pack", "upload", "verify", "publish"}
    assert list(below(spans, parts["build"])) == ["phase buildPhase", "phase installPhase"]


def test_the_worker_got_the_span_of_its_attempt_and_reports_it_back(farm: Farm, spans: list[ReceivedSpan]) -> None:
    attempt = below(spans, only(spans, "step phased"))["attempt"]
    step = str(attempt.attributes["cicd.pipeline.task.run.id"]).partition("#")[0]
    [kept] = farm.api(f"steps/{step}/timeline")
    assert kept["traceparent"] == f"00-{TRACE}-{attempt.id}-01"


def test_a_failure_says_what_it_was(spans: list[ReceivedSpan]) -> None:
    attempt = below(spans, only(spans, "step broken"))["attempt"]
    assert attempt.attributes["error.type"] == "permanent"
    assert attempt.attributes["process.exit.code"] == "3"
    assert attempt.attributes["drover.isolation"] in {"A", "B", "C"}
    assert attempt.attributes["cicd.pipeline.task.run.result"] == "failure"
    assert attempt.status == "STATUS_CODE_ERROR"
    assert "exit code 3" in attempt.message
