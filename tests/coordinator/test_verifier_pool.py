"""Verification by child processes: it takes and refuses what a thread does, word for word, and lives without them."""

from __future__ import annotations

import gc
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from coordinator.errors import IntakeError
from coordinator.intake import taking, verification, verifier_jobs, verifier_pool, verifier_waves
from coordinator.intake.intake import Intake
from coordinator.intake.limits import IntakeLimits
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.intake.verifier_waves import WaveMember
from coordinator.stores.derivation_records import Known
from coordinator.stores.derivations import DerivationStore
from infra.compiled import build
from infra.compiled.finder import SWITCH
from infra.compiled.modules import NATIVE
from tests.coordinator.test_intake import STORE, IntakeHarness
from tests.support.cache import open_cache
from tests.support.graphs import Made, Maker, relocated

TOP = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "PIECE_DERIVATIONS", 40)
    monkeypatch.setattr(verification, "SIDE_BY_SIDE_FROM", 8)
    monkeypatch.setattr(verifier_waves, "JOB_FROM", 4)


@pytest.fixture(scope="module")
def native_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the native part is compiled, and from which Python installs it where it starts."""
    place = tmp_path_factory.mktemp("native")
    build.compile_modules(TOP, place, (NATIVE,))
    program = f"from infra.compiled import finder; finder.install({str(place)!r})\n"
    (place / "sitecustomize.py").write_text(program)
    return place


@pytest.fixture(params=["source", "native"])
def is_native(request: pytest.FixtureRequest, native_place: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether processes that are started verify natively."""
    is_native: bool = request.param == "native"
    monkeypatch.setenv(SWITCH, "yes" if is_native else "no")
    monkeypatch.setenv("PYTHONPATH", f"{native_place}:{TOP}")
    look = "from infra.nix.verify_quickly import load_native; print(load_native() is not None)"
    answer = subprocess.run([sys.executable, "-P", "-c", look], cwd="/", capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(is_native)]
    return is_native


@pytest.fixture
async def pool(is_native: bool) -> AsyncIterator[VerifierPool]:
    pool = VerifierPool(STORE.path, most=2)
    pool.is_native = is_native
    yield pool
    await pool.close()
    assert pool.size == 0


@pytest.fixture
def graph() -> list[Made]:
    """Layers of ten, inputs first, of both kinds."""
    make = Maker()
    everything: list[Made] = []
    below: list[Made] = []
    for level in range(12):
        fixed = make.fixed(f"file-{level}", str(level).encode(), below[:1])
        layer = [
            make.plain(f"step-{level}-{place}", below[place % 3 :: 3], outputs=("dev", "out"), text="x" * 600)
            for place in range(9)
        ]
        below = [fixed, *layer]
        everything += below
    return everything


async def opened(directory: Path, pool: VerifierPool | None, graphs: Sequence[Sequence[Made]]) -> list[object]:
    """Send graphs one after the other; return what is stored then, or refused."""
    os.mkdir(directory)  # noqa: PTH102
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{directory}/derivations.sqlite3")
    await derivations.prepare()
    said: list[object] = []
    async with open_cache(directory) as cache:
        room = IntakeHarness(cache, derivations, IntakeLimits())
        room.intake = Intake(derivations, cache, cache.objects, STORE, verifiers=pool)
        for graph in graphs:
            try:
                said.append(await room.send(graph))
            except IntakeError as error:
                said.append((error.code, str(error)))
    await derivations.close()
    with closing(sqlite3.connect(directory / "derivations.sqlite3")) as database:
        said += database.execute("SELECT * FROM derivations ORDER BY drv").fetchall()
        said += database.execute("SELECT * FROM derivation_outputs ORDER BY path").fetchall()
    return said


async def test_processes_take_and_refuse_what_a_thread_does(
    tmp_path: Path, pool: VerifierPool, graph: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[int] = []
    verify = VerifierPool.verify

    async def counted(self: VerifierPool, members: Sequence[WaveMember], known: object, stream: object) -> object:
        done = await verify(self, members, known, stream)  # type: ignore[arg-type]
        jobs.append(len(done))
        return done

    monkeypatch.setattr(VerifierPool, "verify", counted)
    # They begin anew in the midst of a stream too.
    monkeypatch.setattr(verifier_pool, "MAX_REMEMBERED", 40)
    other = Maker().plain("other")
    honest = next(made for made in graph if made.name.endswith("step-6-4.drv"))
    lie = relocated(STORE, honest, honest.data.replace(honest.outputs["out"].encode(), other.outputs["out"].encode()))
    moved = replace(honest, drv=other.drv)
    late = [*graph[20:], *graph[:20]]
    lies = [[lie if made is honest else made for made in graph], [moved if made is honest else made for made in graph]]
    # The second half is sent when the first is stored.
    graphs = [late, *lies, graph[:60], graph[60:], graph]
    pool.start()
    await pool.started()
    assert pool.size == 2
    assert await opened(tmp_path / "pool", pool, graphs) == await opened(tmp_path / "thread", None, graphs)
    assert sum(jobs) >= 2 * len(graph)
    assert 0 in jobs


async def test_a_stream_goes_on_where_the_processes_end(
    tmp_path: Path, pool: VerifierPool, graph: list[Made], caplog: pytest.LogCaptureFixture
) -> None:
    pool.start()
    await pool.started()
    for child in list(pool._children):  # noqa: SLF001 - another program ends them
        child.kill()
    assert await opened(tmp_path / "pool", pool, [graph]) == await opened(tmp_path / "thread", None, [graph])
    assert "another way is taken" in caplog.text


async def test_a_long_stream_starts_them_and_they_end_once_none_is_needed(
    tmp_path: Path, pool: VerifierPool, graph: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened(tmp_path / "short", pool, [graph[:30]])
    await pool.started()
    assert pool.size == 0
    await opened(tmp_path / "long", pool, [graph])
    await pool.started()
    assert pool.size == 2
    await pool.end_idle(after_s=verifier_pool.IDLE_S)
    assert pool.size == 2
    await pool.end_idle(after_s=0.0)
    assert pool.size == 0


async def test_a_process_is_told_once_of_each_input_in_one_stream(
    tmp_path: Path, pool: VerifierPool, graph: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[tuple[int, set[str], bool]] = []

    def noted(pipe: IO[bytes], members: list[tuple[str, bytes]], known: Mapping[str, Known], *, anew: bool) -> None:
        verifier_jobs.write_job(pipe, members, known, anew=anew)
        jobs.append((id(pipe), {*known, *dict(members)}, anew))

    monkeypatch.setattr(verifier_pool, "write_job", noted)
    pool.start()
    await pool.started()
    await opened(tmp_path / "state", pool, [graph, graph])
    processes = {process for process, _, _ in jobs}
    # Natively, one process takes each of the three pieces whole.
    assert len(processes) == (1 if pool.is_native else 2)
    assert (len(jobs) == 2 * 3) is pool.is_native
    for process in processes:
        streams: list[list[set[str]]] = []
        for _, names, anew in (job for job in jobs if job[0] == process):
            streams += [[]] if anew else []
            streams[-1].append(names)
        assert len(streams) == 2
        for stream in streams:
            assert sum(map(len, stream)) == len(set[str]().union(*stream))


async def test_the_collector_rests_while_a_piece_is_taken_and_not_while_the_next_is_waited_for(
    tmp_path: Path, graph: Sequence[Made]
) -> None:
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
    await derivations.prepare()
    at_work: list[bool] = []
    taker = taking.DerivationTaker(derivations, STORE, None, lambda _: at_work.append(gc.isenabled()))
    async with taker:
        await taker.take([(made.name, made.data) for made in graph])
        await taker.finish()
        assert gc.isenabled()
    assert at_work == [False] * 3
    await derivations.close()
