"""The exporter of traces never costs the farm more than counted drops, whatever its collector does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from aiohttp import web

from coordinator.observability.trace_exporter import BATCH_SPANS, MAX_WAITING, TraceExporter, otlp_wanted
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming
from infra.ended_span import EndedSpan
from infra.otlp import OtlpSender
from scheduler.events import SubmissionReceived
from scheduler.facts import SubmissionWithdrawn
from scheduler.farm import Farm
from scheduler.model import Instant, Recipe, Requirements, StepKey, StepSpec, SubmissionId
from tests.coordinator.test_views import Silent
from tests.support.patience import PATIENCE_S

SPAN = EndedSpan(1, 2, None, "x", 1.0, 2.0)
STEP = StepKey("key")


class Clock:
    at = 100.0

    def now(self) -> float:
        return self.at


def exporter(send: Callable[[Sequence[EndedSpan]], bool]) -> TraceExporter:
    return TraceExporter(send, small_farm(), Clock())


def small_farm() -> Views:
    """A farm with one submission that wants one step."""
    farm, views = Farm(), Views(Silent())
    step = StepSpec(STEP, (Recipe(Requirements("x86_64-linux")),))
    facts, _ = farm.handle(SubmissionReceived(SubmissionId("s"), (STEP,), (step,)), Instant(99.0))
    views.fold(facts)
    return views


def ended(number: int, at: float = 101.0) -> AttemptTiming:
    return AttemptTiming("key", number, leased_at=at - 1, ended_at=at, outcome="retried", wanted_by="s")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another thread's doing
            await asyncio.sleep(0.01)


async def test_ended_spans_are_sent_in_batches_and_those_that_an_earlier_process_sent_are_not() -> None:
    batches: list[int] = []

    def send(spans: Sequence[EndedSpan]) -> bool:
        batches.append(len(spans))
        return True

    tracing = exporter(send)
    tracing.attempts_ended([ended(number) for number in range(BATCH_SPANS + 10)])
    tracing.attempts_ended([ended(0, at=99.0)])
    task = asyncio.create_task(tracing.run())
    # `send` runs in a thread, so a batch is seen there before the exporter counts it.
    await until(lambda: tracing.sent + tracing.dropped == BATCH_SPANS + 10)
    task.cancel()
    assert batches == [BATCH_SPANS, 10]
    assert tracing.dropped == 0


async def test_a_collector_that_hangs_holds_nothing_up_and_bounds_what_waits() -> None:
    goes_on = threading.Event()

    def hang(_spans: Sequence[EndedSpan]) -> bool:
        return goes_on.wait(PATIENCE_S)

    tracing = exporter(hang)
    tracing.attempts_ended([ended(0)])
    task = asyncio.create_task(tracing.run())
    await asyncio.sleep(0)
    tracing.attempts_ended([ended(number) for number in range(MAX_WAITING + 100)])
    assert tracing.dropped >= 99
    goes_on.set()
    await until(lambda: tracing.sent >= MAX_WAITING)
    task.cancel()


async def test_every_attempt_has_its_step_around_it_whatever_came_after_it() -> None:
    """Attempts that were lost, the one that followed, and one that nothing followed because its submission ended."""
    sent: list[EndedSpan] = []
    views, clock = small_farm(), Clock()

    def take(spans: Sequence[EndedSpan]) -> bool:
        sent.extend(spans)
        return True

    tracing = TraceExporter(take, views, clock)
    tracing.attempts_ended([ended(1, at=101.0), ended(2, at=105.0)])
    tracing.attempts_ended([replace(ended(3, at=110.0), outcome="done")])
    tracing.attempts_ended([ended(4, at=120.0)])
    views.fold([SubmissionWithdrawn(SubmissionId("s"), Instant(130.0))])
    clock.at = 200.0
    task = asyncio.create_task(tracing.run())
    await until(lambda: any(span.name == "submission" for span in sent))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    steps = [(span.begin, span.end) for span in sent if span.name == "step key"]
    assert steps == [(100.0, 110.0), (119.0, 130.0)]
    assert [(span.begin, span.end) for span in sent if span.name == "attempt"][:2] == [(100.0, 101.0), (104.0, 105.0)]


async def test_spans_that_are_not_taken_are_counted_and_later_ones_are_sent() -> None:
    answers = [False, True]
    tracing = exporter(lambda _: answers.pop(0))
    task = asyncio.create_task(tracing.run())
    for number, dropped in ((1, 1), (2, 1)):
        tracing.attempts_ended([ended(number)])
        await until(lambda number=number: tracing.sent + tracing.dropped == number)  # type: ignore[misc]
        assert tracing.dropped == dropped
    task.cancel()


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_collector_that_refuses_is_no_error_of_the_farm(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.router.add_post("/v1/traces", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sender = OtlpSender(f"http://127.0.0.1:{runner.addresses[0][1]}", "drover", "0")
    try:
        assert await asyncio.to_thread(sender.send, [SPAN]) is False
    finally:
        sender.close()
        await runner.cleanup()


async def test_an_outage_of_the_collector_is_logged_once_however_long_it_is(caplog: pytest.LogCaptureFixture) -> None:
    answers = [400, 400, 400, 200, 400, 400]

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=answers.pop(0))

    app = web.Application()
    app.router.add_post("/v1/traces", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sender = OtlpSender(f"http://127.0.0.1:{runner.addresses[0][1]}", "drover", "0")
    try:
        for _ in range(6):
            await asyncio.to_thread(sender.send, [SPAN])
    finally:
        sender.close()
        await runner.cleanup()
    assert [record.name.partition(".")[0] for record in caplog.records if record.levelno >= 30] == ["opentelemetry"] * 2


async def test_a_collector_that_is_down_is_no_error_of_the_farm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    sender = OtlpSender("http://127.0.0.1:9", "drover", "0")
    assert await asyncio.to_thread(sender.send, [SPAN]) is False
    sender.close()


@pytest.mark.parametrize(
    ("endpoint", "environ", "wanted"),
    [
        ("", {}, False),
        ("http://collector:4318", {}, True),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ("http://collector:4318", {"OTEL_SDK_DISABLED": "true"}, False),
        ("http://collector:4318", {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_sent_where_a_setting_or_the_standard_variables_say_so(
    endpoint: str, environ: dict[str, str], wanted: bool
) -> None:
    assert otlp_wanted(endpoint, environ) is wanted
