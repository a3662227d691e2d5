"""Measures of each attempt reach its report, bounded, and are None where the machine does not take them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.daemon import ControlGroups
from infra.daemon.usage import Account, used_between
from infra.nar_files import dump
from tests.support.patience import PATIENCE_S
from workers.agent import build, outbox, output_reader
from workers.agent.attempt_record import AttemptRecord, Fetched, FetchLog
from workers.agent.farm_sources import FarmSources
from workers.agent.outbox import Outbox
from workers.wire.measures import MAX_FETCHES, MAX_PHASES, Measures, Span
from workers.wire.messages import Batch, Failed, Report, Succeeded, Transfer

from .conftest import AgentHarness, drv, nar_of, order

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPIN = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"


def phase(name: str) -> str:
    return f"""echo '@nix {{"action":"setPhase","phase":"{name}"}}' >&2"""


def measured(report: Report) -> Measures:
    assert report.measures is not None
    return report.measures


async def test_a_report_has_inputs_phases_packing_upload_and_what_the_build_used(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "LOOK_EVERY_S", 0.01)
    caplog.set_level("INFO", "workers.agent.lease_runner")
    one, two = await bench.agent("one"), await bench.agent("two")
    [made] = await one.build(order(drv("input", "echo input > $out")))
    [output] = bench.publish(made)
    prepare = f"echo before; {phase('unpackPhase')}; echo inside; cat {output.path} > $out"
    script = f"{prepare}; {phase('buildPhase')}; {SPIN}"
    ordered = order(drv("phased", script), [output.path]).model_copy(update={"traceparent": TRACEPARENT})
    [report] = await two.build(ordered)

    assert isinstance(report.result, Succeeded), report.result
    measures = measured(report)
    assert measures.traceparent == TRACEPARENT
    assert caplog.messages[-1] == f"lease {ordered.step} attempt 1 ended: succeeded (trace {TRACEPARENT})"
    assert [span.name for span in measures.spans] == ["inputs", "build", "pack", "upload"]
    assert all(_end(before) <= after.at + 1e-5 for before, after in pairwise(measures.spans))
    assert report.started_at <= measures.spans[0].at
    assert _end(measures.spans[-1]) <= report.ended_at + 1e-5
    [inputs, built, _, _] = measures.spans

    [fetch] = measures.fetches
    assert (fetch.path, fetch.source, fetch.nar_bytes) == (output.path, "objects", output.nar_size)
    assert inputs.at <= fetch.at
    assert fetch.at + fetch.took_s <= _end(inputs) + 1e-5

    assert [(one.name, one.line) for one in measures.phases] == [("unpackPhase", 2), ("buildPhase", 3)]
    unpack, compile_ = measures.phases
    assert built.at <= unpack.at
    assert unpack.at + unpack.took_s == pytest.approx(compile_.at, abs=1e-4)
    assert compile_.at + compile_.took_s <= _end(built) + 1e-4

    assert measures.cpu_s is not None
    assert measures.cpu_s > 0
    assert measures.peak_memory_bytes is not None
    assert 0 < measures.peak_memory_bytes < 64 * 1024 * 1024
    assert measures.read_bytes is not None


def held_up(name: str, monkeypatch: pytest.MonkeyPatch, on: type, after: int) -> asyncio.Event:
    """Have a method that yields the pieces of a NAR wait, after so many bytes, until the event is set."""
    whole, let_go = getattr(on, name), asyncio.Event()

    async def pieces(*arguments: object) -> AsyncGenerator[bytes, None]:
        given = 0
        async with aclosing(whole(*arguments)) as chunks:
            async for chunk in chunks:
                for start in range(0, len(chunk), 65536):
                    yield chunk[start : start + 65536]
                    given += 65536
                    if given >= after:
                        await let_go.wait()

    monkeypatch.setattr(on, name, pieces)
    return let_go


def reading_held_up(monkeypatch: pytest.MonkeyPatch, after: int) -> threading.Event:
    """Have the files of an output be read, after so many bytes, once the event is set."""
    let_go = threading.Event()

    def pieces(at: Path, *, case_hack: bool) -> Iterator[bytes]:
        given = 0
        for chunk in dump(at, case_hack=case_hack):
            for start in range(0, len(chunk), 65536):
                yield chunk[start : start + 65536]
                given += 65536
                if given >= after:
                    let_go.wait(PATIENCE_S)

    monkeypatch.setattr(output_reader, "dump", pieces)
    monkeypatch.setattr(output_reader, "COUNTED_BYTES", 65536)
    return let_go


async def test_while_bytes_move_the_answers_to_polls_say_how_many(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TRANSFERS_EVERY_S", 0.05)
    one, two = await bench.agent("one"), await bench.agent("two")
    large = drv("large", "i=0; while [ $i -lt 4000 ]; do echo 0123456789abcdef$i-$i-$i-$i; i=$((i+1)); done > $out")
    [made] = await one.build(order(large))
    [output] = bench.publish(made)
    coming = held_up("nar", monkeypatch, FarmSources, 65536)
    going = reading_held_up(monkeypatch, 65536)
    copies = order(drv("copies", f"cat {output.path} > $out; echo >> $out"), [output.path])

    def transfers() -> list[Transfer]:
        return [transfer for batch in two.batches[-1:] for transfer in batch.transfers]

    await two.agent.start_many([copies.dump()])
    await two.until(transfers)
    [fetch] = transfers()
    assert (fetch.step, fetch.direction, fetch.path, fetch.source) == (copies.step, "fetch", output.path, "objects")
    assert 0 < fetch.done_bytes < output.nar_size
    assert fetch.size_bytes == output.nar_size
    coming.set()
    await two.until(lambda: any(transfer.direction == "upload" for transfer in transfers()))
    [upload] = transfers()
    assert 0 < upload.done_bytes < (upload.size_bytes or 0)
    going.set()
    [report] = await two.finish(copies)
    assert isinstance(report.result, Succeeded)
    assert (upload.path, upload.size_bytes) == (report.result.outputs[0].path, report.result.outputs[0].nar_size)
    assert transfers() == [], "what has arrived is not on its way"


async def test_bytes_that_move_all_the_time_cause_an_answer_only_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TRANSFERS_EVERY_S", 0.2)
    loop = asyncio.get_running_loop()
    waiting, began = Outbox(tmp_path / "outbox"), loop.time()
    answers = 0
    while answers < 3:
        waiting.moved()
        answered = asyncio.create_task(waiting.wait(10.0))
        while not answered.done():
            waiting.moved()
            await asyncio.sleep(0)
        waiting.take(1 << 20)
        answers += 1
    assert loop.time() - began >= 3 * 0.2
    await waiting.close()


async def test_what_a_build_leaves_running_is_counted_too_and_no_control_group_is_left(bench: AgentHarness) -> None:
    """Nix kills what a build leaves behind and waits for none of it, so /proc's accounts lack it."""
    state = bench.root / "one" / "state"
    groups = ControlGroups.found(str(state))
    if groups is not None:
        # As a worker that was killed leaves one.
        left = groups.make()
        assert left is not None
        assert len(groups.groups()) == 1
    one = await bench.agent("one")
    # Each of the two spins as long as the one that is alone, whichever gets the processor.
    burn = f"( {SPIN}; echo > burnt; while :; do :; done ) & {SPIN}; while [ ! -e burnt ]; do :; done"
    hidden = "if [ -e /sys/fs/cgroup ]; then echo seen; else echo hidden; fi > $out"
    [report] = await one.build(order(drv("leaves", f"{burn}; {hidden}")))
    assert isinstance(report.result, Succeeded), report.result
    assert b"hidden" in nar_of(bench, report.result.outputs[0]), "a build can neither see nor write its group"
    cpu_s = measured(report).cpu_s
    assert cpu_s is not None
    [span] = [span for span in measured(report).spans if span.name == "build"]
    # Two processes burn all the time; one of them is never waited for.
    assert cpu_s <= 2.5 * span.took_s + 0.1
    if groups is not None:
        alone = drv("alone", f"{SPIN}; echo > $out")
        [other] = await one.build(order(alone))
        assert cpu_s > 1.5 * (measured(other).cpu_s or 0.0)
        held = [(group / "cgroup.procs").stat() for group in groups.groups()]
        assert held, "a daemon has one"
        assert {(each.st_uid, each.st_mode & 0o022) for each in held} == {(0, 0)}
        await one.agent.close()
        assert groups.groups() == []


async def test_an_attempt_that_fails_or_is_stopped_is_measured_until_then(bench: AgentHarness) -> None:
    told = await bench.agent()
    failing = order(drv("failing", f"{phase('checkPhase')}; exit 1"))
    forever = order(drv("forever", f"{phase('buildPhase')}; echo started; while :; do sleep 1; done"))
    [failed] = await told.build(failing)
    assert isinstance(failed.result, Failed)
    assert [span.name for span in measured(failed).spans] == ["build"]
    assert [one.name for one in measured(failed).phases] == ["checkPhase"]

    await told.agent.start_many([forever.dump()])
    await told.until(lambda: forever.step in told.logs)
    await told.agent.cancel([{"step": forever.step, "attempt": 1}])
    [stopped] = await told.finish(forever)
    assert [one.name for one in measured(stopped).phases] == ["buildPhase"]
    # Its daemon was killed with it, and with the daemon its account.
    assert measured(stopped).cpu_s is None


async def test_each_poll_has_the_agents_time_of_its_arrival_and_of_its_answer(bench: AgentHarness) -> None:
    told = await bench.agent()
    first, second = await told.hear(0.05), await told.hear(0.0)
    times = [first.received_at, first.answered_at, second.received_at, second.answered_at]
    assert None not in times
    assert times == sorted(time for time in times if time is not None)


def test_a_report_of_an_older_agent_is_read_as_not_measured() -> None:
    report = {
        "kind": "report",
        "step": "s",
        "attempt": 1,
        "started_at": 1.0,
        "building_at": 2.0,
        "built_at": 3.0,
        "ended_at": 4.0,
        "result": {"kind": "failed", "reason": "permanent", "message": ""},
    }
    batch = Batch.model_validate(
        {"incarnation": "i", "last": 1, "events": [report], "capacity": 1, "leases": []},
    )
    [event] = batch.events
    assert isinstance(event, Report)
    assert event.measures is None
    assert batch.received_at is None


@settings(max_examples=30, deadline=None)
@given(
    logs=st.lists(st.lists(st.integers(0, 10**12), max_size=3 * MAX_FETCHES), max_size=3),
    phases=st.integers(0, 3 * MAX_PHASES),
)
def test_fetches_and_phases_are_bounded_and_no_byte_and_no_second_is_lost(logs: list[list[int]], phases: int) -> None:
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 1.0
        return now

    record = AttemptRecord(tick)
    for number, sizes in enumerate(logs):
        log = FetchLog()
        for place, size in enumerate(sizes):
            log.add(Fetched(size, f"/nix/store/{number}-{place}", "cache", 0.0, 1.0))
        record.fetched(log, shared=False)
    with record.span("build"):
        for place in range(phases):
            record.phase(f"phase{place}")
    # Valid: what the wire would refuse raises here.
    measures = Measures.model_validate(record.measures().model_dump())

    every = sorted((size for sizes in logs for size in sizes), reverse=True)
    assert [fetch.nar_bytes for fetch in measures.fetches] == every[:MAX_FETCHES]
    assert measures.more_fetches == len(every[MAX_FETCHES:])
    assert measures.more_fetches_bytes == sum(every[MAX_FETCHES:])
    assert len(measures.phases) + measures.more_phases == phases
    # The clock ticks twice a phase: at its beginning and at its end.
    assert sum(one.took_s for one in measures.phases) + measures.more_phases_s == phases


def test_without_an_account_or_without_a_child_nothing_is_said_to_be_used() -> None:
    before = Account(1.0, 100, 10, None)
    assert used_between(None, before) is None
    assert used_between(before, before) is None
    used = used_between(before, Account(1.5, 200, 30, 5))
    assert used is not None
    assert (used.cpu_s, used.read_bytes, used.written_bytes) == (0.5, 20, None)


def _end(span: Span) -> float:
    return span.at + span.took_s


def test_a_phase_behind_the_limit_of_a_log_has_no_line() -> None:
    """Which lines of the end are kept is known at the end alone."""
    gate = build.LogGate(40, lambda _: None)
    lines = []
    for text in (b"first", b"second", b"x" * 50, b"last"):
        lines.append(gate.next_line)
        gate.lines(text + b"\n", 1)
    assert [*lines, gate.next_line] == [1, 2, 3, 0, 0]


@given(
    st.integers(0, 60), st.lists(st.lists(st.binary(max_size=12).filter(lambda text: b"\n" not in text), min_size=1))
)
def test_lines_that_come_together_pass_as_they_would_one_by_one(limit: int, pieces: list[list[bytes]]) -> None:
    apart, together = bytearray(), bytearray()
    one, other = build.LogGate(limit, apart.extend), build.LogGate(limit, together.extend)
    for lines in pieces:
        for line in lines:
            one.lines(line + b"\n", 1)
        other.lines(b"".join(line + b"\n" for line in lines), len(lines))
        assert one.next_line == other.next_line
    one.finish()
    other.finish()
    assert apart == together
