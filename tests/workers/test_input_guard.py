"""An input that changed in a worker's store spoils what was built from it, and is fetched anew."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.nix.hashing import sha256_text
from tests.support.farm import nix_store
from workers.agent import health, input_guard
from workers.agent.daemon_pool import DaemonOpener, DaemonSession, SessionPool
from workers.agent.input_guard import Alteration, InputChangedError, InputGuard, identify
from workers.wire.messages import Failed, LeaseOrder, Output, Report, Succeeded

from .conftest import AgentHarness, ReportReader, drv, nar_of, order

#: As a farm must not be: builders own the store. Class C; these agents have no coordinator that would refuse them.
WEAK = {"build-users-group": ""}
FILE = "echo true > $out"
#: Nix 2.8 answers this with an error instead of a result, and hangs up.
ENDS_WITHOUT_A_RESULT = """echo TAMPERED > $it; echo '@nix {"action":"setPhase","phase":7}' >&2; sleep 1"""
TREE = "mkdir -p $out/deep; echo true > $out/deep/file"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(health, "TRIAL_AGAIN_S", 0.3)
    monkeypatch.setattr(input_guard, "MEND_AGAIN_S", 0.2)


async def _published(bench: AgentHarness, reader: ReportReader, script: str) -> Output:
    """Build an input and publish it."""
    [made] = await reader.build(order(drv("input", script)))
    [output] = bench.publish(made)
    return output


def _spoilt(report: Report, output: Output) -> str:
    assert isinstance(report.result, Failed), report.result
    assert report.result.reason == "infrastructure"
    assert output.path in report.result.message
    return report.result.message


async def _until_mended(reader: ReportReader) -> None:
    async def unfit(said: bool) -> None:
        await reader.until(lambda: bool(reader.batches) and bool(reader.batches[-1].unfit) is said)

    await unfit(True)
    assert "was changed in the worker's store" in next(batch.unfit for batch in reader.batches if batch.unfit)
    await unfit(False)


def _in_store(bench: AgentHarness, output: Output, name: str = "one") -> Path:
    return bench.root / name / "store" / output.path.lstrip("/")


def _missing(report: Report, output: Output) -> None:
    assert isinstance(report.result, Failed), report.result
    assert report.result.reason == "input_missing"
    assert output.path in report.result.message
    assert report.result.missing == (), "the farm's cache has it"


async def _runs(reader: ReportReader, build: LeaseOrder) -> None:
    """Wait until a builder has printed a line: a step is `building` before Nix has made what the builder sees."""
    await reader.until(lambda: b"started\n" in reader.logs.get(build.step, b""))


def _collect(bench: AgentHarness, output: Output, name: str = "one") -> None:
    """Collect one path of an agent's store as if no connection kept it, and nothing that a running build writes to."""
    for roots in (bench.root / name / "store/nix/var/nix/temproots").iterdir():
        roots.unlink()
    done = nix_store(bench.root / name / "store", "--delete", output.path)
    assert done.returncode == 0, done.stderr
    assert not _in_store(bench, output).exists()


def _tamper(place: Path) -> None:
    """Change a file out of band, and put back all that can be put back."""
    before = place.stat()
    place.chmod(0o644)
    place.write_text("evil\n")
    place.chmod(before.st_mode & 0o7777)
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("attack", ["echo TAMPERED > $it", "echo TAMPERED > $it; exit 1", ENDS_WITHOUT_A_RESULT])
@pytest.mark.parametrize(("script", "below"), [(FILE, ""), (TREE, "/deep/file")])
async def test_a_build_that_rewrites_its_input_is_thrown_away_and_the_next_gets_the_true_one(
    bench: AgentHarness, script: str, below: str, attack: str
) -> None:
    reader = await bench.agent(nix_options=WEAK)
    given = await _published(bench, reader, script)
    at = f"{given.path}{below}"
    evil = order(drv("evil", f"it={at}; read x < $it; chmod u+w $it; {attack}; echo built > $out"), [given.path])
    [report] = await reader.build(evil)
    _spoilt(report, given)
    made = evil.derivation.split(b'"out","')[1].split(b'"')[0].decode()
    assert not (bench.root / "one/store" / made.lstrip("/")).exists(), "nothing of it may count as built"
    await _until_mended(reader)
    [report] = await reader.build(order(drv("honest", f"read x < {at}; echo built from $x > $out"), [given.path]))
    [output] = bench.publish(report)
    assert b"built from true\n" in nar_of(bench, output)


async def test_a_build_that_puts_back_what_it_changed_is_thrown_away_all_the_same(bench: AgentHarness) -> None:
    reader = await bench.agent(nix_options=WEAK)
    given = await _published(bench, reader, TREE)
    script = f"it={given.path}/deep/file; chmod u+w $it; echo evil > $it; echo true > $it; chmod a-w $it; echo > $out"
    [report] = await reader.build(order(drv("sly", script), [given.path]))
    assert "while the build ran" in _spoilt(report, given)
    [report] = await reader.build(order(drv("honest", f"read x < {given.path}/deep/file; echo > $out"), [given.path]))
    assert isinstance(report.result, Succeeded)


async def test_what_another_build_saw_meanwhile_is_thrown_away_too(bench: AgentHarness) -> None:
    reader = await bench.agent(nix_options=WEAK, slots=2)
    given = await _published(bench, reader, TREE)
    at = f"{given.path}/deep/file"
    evil = order(drv("evil", f"chmod u+w {at}; echo TAMPERED > {at}; echo > $out"), [given.path])
    # It reads what it was shown until that changes.
    victim = order(
        drv("victim", f"echo started; while read x < {at} && [ $x = true ]; do :; done; echo > $out"), [given.path]
    )
    await reader.agent.start_many([victim.dump()])
    await _runs(reader, victim)
    for report in (await reader.build(evil), await reader.finish(victim)):
        _spoilt(report[0], given)


@pytest.mark.parametrize(("script", "below"), [(FILE, ""), (TREE, "/deep/file")])
@pytest.mark.parametrize("options", [{}, WEAK])
async def test_what_somebody_changes_between_two_builds_is_noticed_before_it_is_used(
    bench: AgentHarness, script: str, below: str, options: dict[str, str]
) -> None:
    reader = await bench.agent(nix_options=options)
    given = await _published(bench, reader, script)
    reads = f"read x < {given.path}{below}; echo $x > $out"
    [report] = await reader.build(order(drv("first", reads), [given.path]))
    assert isinstance(report.result, Succeeded)
    _tamper(Path(f"{_in_store(bench, given)}{below}"))
    [report] = await reader.build(order(drv("second", reads), [given.path]))
    _spoilt(report, given)
    await _until_mended(reader)
    again = order(drv("third", reads), [given.path])
    [report] = await reader.build(again)
    [output] = bench.publish(report)
    assert b"true\n" in nar_of(bench, output)


async def test_a_path_of_more_entries_than_one_look_has_is_looked_at_all_the_same(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_guard, "DEEP_ENTRIES", 1)
    reader = await bench.agent()
    given = await _published(bench, reader, TREE)
    reads = f"read x < {given.path}/deep/file; echo $x > $out"
    [report] = await reader.build(order(drv("first", reads), [given.path]))
    assert isinstance(report.result, Succeeded)
    _tamper(_in_store(bench, given) / "deep/file")
    [report] = await reader.build(order(drv("second", reads), [given.path]))
    _spoilt(report, given)


async def test_an_input_of_an_input_is_looked_after_as_well_and_one_that_vanished(bench: AgentHarness) -> None:
    reader = await bench.agent()
    below = await _published(bench, reader, FILE)
    [made] = await reader.build(order(drv("middle", f"echo {below.path} > $out"), [below.path]))
    [middle] = bench.publish(made)
    _in_store(bench, below).unlink()
    reads = f"read p < {middle.path}; read x < $p; echo $x > $out"
    [report] = await reader.build(order(drv("reads", reads), [middle.path]))
    _spoilt(report, below)
    await _until_mended(reader)
    [report] = await reader.build(order(drv("again", reads), [middle.path]))
    assert isinstance(report.result, Succeeded)


async def test_a_lease_that_is_cancelled_while_its_input_is_found_changed_leaves_it_to_be_mended(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = await bench.agent(nix_options=WEAK)
    given = await _published(bench, reader, FILE)
    discard, found = input_guard.InputGuard.discard, asyncio.Event()

    async def stuck(guard: input_guard.InputGuard, *arguments: Any) -> None:
        if guard.trouble:
            found.set()
            await asyncio.Event().wait()
        await discard(guard, *arguments)

    monkeypatch.setattr(input_guard.InputGuard, "discard", stuck)
    evil = order(drv("evil", f"chmod u+w {given.path}; echo TAMPERED > {given.path}; echo > $out"), [given.path])
    await reader.agent.start_many([evil.dump()])
    await found.wait()
    await reader.agent.cancel([{"step": evil.step, "attempt": evil.attempt}])
    await _until_mended(reader)
    assert _in_store(bench, given).read_text() == "true\n"


async def test_an_input_that_was_collected_is_missing_not_changed_and_fetched_again(bench: AgentHarness) -> None:
    reader = await bench.agent()
    given = await _published(bench, reader, TREE)
    reads = f"read x < {given.path}/deep/file; echo built from $x > $out"
    [report] = await reader.build(order(drv("first", reads), [given.path]))
    assert isinstance(report.result, Succeeded)
    _collect(bench, given)
    [report] = await reader.build(order(drv("second", reads), [given.path]))
    _missing(report, given)
    [report] = await reader.build(order(drv("third", reads), [given.path]))
    [output] = bench.publish(report)
    assert b"built from true\n" in nar_of(bench, output)
    assert not any(batch.unfit for batch in reader.batches), "the worker is not to blame"


async def test_what_was_built_here_may_come_back_with_the_contents_of_another_build(bench: AgentHarness) -> None:
    reader = await bench.agent()
    again = order(drv("input", "read it < /proc/sys/kernel/random/uuid; echo $it > $out"))
    [made] = await reader.build(again)
    assert isinstance(made.result, Succeeded)
    [elsewhere] = await (await bench.agent("two")).build(again)
    [given] = bench.publish(elsewhere)
    assert made.result.outputs[0].nar_hash != given.nar_hash
    _collect(bench, given)
    [report] = await reader.build(order(drv("reader", f"read x < {given.path}; echo $x > $out"), [given.path]))
    [output] = bench.publish(report)
    assert output.nar_hash == given.nar_hash
    assert not any(batch.unfit for batch in reader.batches)


async def test_a_record_that_is_not_the_stores_own_is_put_right_by_the_first_look(bench: AgentHarness) -> None:
    given = await _published(bench, await bench.agent(), FILE)
    store = bench.root / "one/store"
    argv = ["nix-daemon", "--stdio", "--store", str(store), "--option", "substituters", ""]
    session = DaemonSession(DaemonOpener(argv, "/nix/store"))
    guard = InputGuard(store / "nix/store", SessionPool([session]), lambda: False)
    path = given.narinfo().path
    # As of a transfer whose path another one had brought meanwhile.
    guard.knows([replace(path, nar_hash=sha256_text(b"o" * 32), nar_size=path.nar_size + 8)])
    try:
        await guard.begin([path.store_path], [], session)
        assert not guard.trouble
        _tamper(_in_store(bench, given))
        with pytest.raises(InputChangedError, match=path.store_path):
            await guard.begin([path.store_path], [], session)
        assert guard.trouble
    finally:
        await session.close()


async def test_a_fetched_input_that_is_changed_before_its_first_use_is_noticed(bench: AgentHarness) -> None:
    given = await _published(bench, await bench.agent(), FILE)
    reader = await bench.agent("two", nix_options=WEAK)
    warm = order(drv("warm", "exit 1"), [given.path])
    await reader.build(warm)
    _tamper(_in_store(bench, given, "two"))
    [report] = await reader.build(order(drv("reader", f"read x < {given.path}; echo $x > $out"), [given.path]))
    _spoilt(report, given)
    await _until_mended(reader)


async def test_a_collector_that_has_not_deleted_all_of_an_input_has_changed_nothing(bench: AgentHarness) -> None:
    reader = await bench.agent()
    given = await _published(bench, reader, TREE)
    reads = f"read x < {given.path}/deep/file; echo built from $x > $out"
    [report] = await reader.build(order(drv("first", reads), [given.path]))
    assert isinstance(report.result, Succeeded)
    _collect(bench, given)
    # Nix takes a path out of its records before it deletes what lies there.
    _in_store(bench, given).mkdir()
    [report] = await reader.build(order(drv("second", reads), [given.path]))
    _missing(report, given)
    [report] = await reader.build(order(drv("third", reads), [given.path]))
    assert isinstance(report.result, Succeeded)
    assert not any(batch.unfit for batch in reader.batches)


async def test_a_build_whose_input_is_collected_while_it_runs_is_thrown_away(bench: AgentHarness) -> None:
    reader = await bench.agent()
    given = await _published(bench, reader, TREE)
    at = f"{given.path}/deep/file"
    victim = order(drv("victim", f"echo started; while [ -e {at} ]; do :; done; echo > $out"), [given.path])
    await reader.agent.start_many([victim.dump()])
    await _runs(reader, victim)
    _collect(bench, given)
    [report] = await reader.finish(victim)
    _missing(report, given)
    made = victim.derivation.split(b'"out","')[1].split(b'"')[0].decode()
    assert not (bench.root / "one/store" / made.lstrip("/")).exists(), "nothing of it may count as built"
    [report] = await reader.build(order(drv("next", f"read x < {at}; echo > $out"), [given.path]))
    assert isinstance(report.result, Succeeded)


async def test_a_change_of_before_the_agent_came_is_noticed_at_first_sight(bench: AgentHarness) -> None:
    first = await bench.agent()
    given = await _published(bench, first, FILE)
    await first.agent.close()
    _tamper(_in_store(bench, given))
    reader = await bench.agent()
    [report] = await reader.build(order(drv("reads", f"read x < {given.path}; echo > $out"), [given.path]))
    _spoilt(report, given)


def test_an_identity_shows_every_change_and_leaves_links_to_the_contents(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "in").mkdir(parents=True)
    (tree / "in/file").write_text("true")
    (tree / "link").symlink_to("in")

    def now(budget: int = 100) -> input_guard.Identity:
        return identify(str(tree), budget)[0]

    before = now()
    assert before.compared(now()) is Alteration.SAME
    assert before.compared(now(budget=1)) is Alteration.SAME, "what was not read says nothing"
    assert not now(budget=1).below
    _tamper(tree / "in/file")
    assert before.compared(now()) is Alteration.TOUCHED
    # As Nix saves space: the file has another link elsewhere.
    (tmp_path / "other").hardlink_to(tree / "in/file")
    linked = now()
    (tmp_path / "third").hardlink_to(tree / "in/file")
    assert linked.compared(now()) is None
    (tree / "in/more").touch()
    assert linked.compared(now()) is Alteration.TOUCHED
    file = identify(str(tree / "in/file"), 0)[0]
    (tmp_path / "fourth").hardlink_to(tree / "in/file")
    assert file.compared(identify(str(tree / "in/file"), 0)[0]) is None
