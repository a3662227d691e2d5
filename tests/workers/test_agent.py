"""One agent, real builds: what comes out of a lease."""

from __future__ import annotations

from workers.protocol import Succeeded

from .conftest import Bench, drv, nar_of, order


async def test_a_build_is_told_with_its_log_and_its_uploaded_output(bench: Bench) -> None:
    told = await bench.agent()
    hello = order(drv("hello", "echo building; echo hello > $out"))
    [report] = await told.build(hello)
    assert isinstance(report.result, Succeeded), report.result
    [output] = report.result.outputs
    assert b"hello\n" in nar_of(bench, output)
    assert output.references == ()
    assert told.logs[hello.step] == b"building\n"
    assert 0 < report.started_at <= report.building_at <= report.built_at <= report.ended_at
