"""One agent, real builds: what comes out of a lease."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from infra.daemon import open_stdio
from infra.nix.store_path import StorePath
from infra.process_tree import live_processes
from tests.support.patience import PATIENCE_S
from tests.support.processes import SURVIVOR, above, daemons_below, processes_with
from workers.agent import daemon_pool, lease_runner, outbox
from workers.agent.agent import Agent, AgentError
from workers.agent.settings import WorkerSettings
from workers.agent.stopping import stop_agents
from workers.wire.messages import Failed, Report, Stage, Succeeded

from .conftest import STORE, STORE_DIR, AgentHarness, BuilderGate, ReportReader, drv, hash_part, nar_of, order

#: A builder that runs until it is stopped.
FOREVER = "echo started; while :; do sleep 1; done"
MUTE = "while :; do sleep 1; done"


def failure(report: Report) -> Failed:
    assert isinstance(report.result, Failed), report.result
    return report.result


def success(report: Report) -> Succeeded:
    assert isinstance(report.result, Succeeded), report.result
    return report.result


def descendants() -> list[int]:
    """Processes that this one has started, directly."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


async def test_a_build_is_reported_with_its_log_and_its_uploaded_output(bench: AgentHarness) -> None:
    reader = await bench.agent()
    hello = order(drv("hello", "echo building; echo hello > $out"))
    [report] = await reader.build(hello)
    [output] = success(report).outputs
    assert b"hello\n" in nar_of(bench, output)
    assert output.references == ()
    assert reader.logs[hello.step] == b"building\n"
    assert 0 < report.started_at <= report.building_at <= report.built_at <= report.ended_at


async def test_building_what_is_valid_already_reports_the_same_outputs(bench: AgentHarness) -> None:
    reader = await bench.agent()
    made = drv("again", "echo again > $out")
    [first] = await reader.build(order(made))
    again = ReportReader(reader.agent, ack=reader.ack)
    [second] = await again.build(order(made, attempt=2))
    assert success(first).outputs == success(second).outputs


async def test_several_outputs_are_reported_with_the_references_that_nix_found(bench: AgentHarness) -> None:
    reader = await bench.agent()
    script = "echo $dev $out > $out; echo dev > $dev; mkdir -p $doc; echo $dev > $doc/page"
    [report] = await reader.build(order(drv("multi", script, outputs=("out", "dev", "doc"))))
    outputs = {output.name: output for output in success(report).outputs}
    base = {name: output.path.rpartition("/")[2] for name, output in outputs.items()}
    assert outputs["out"].references == tuple(sorted((base["dev"], base["out"])))
    assert outputs["doc"].references == (base["dev"],)
    assert outputs["dev"].references == ()


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("empty-file", ": > $out"),
        ("empty-directory", "mkdir $out"),
        ("a+b.c?d=e", "mkdir $out; echo x > $out/'q+w.e?r=t'; echo y > \"$out/a b\""),
        ("five-thousand", "mkdir $out; i=0; while [ $i -lt 5000 ]; do echo $i > $out/$i; i=$((i+1)); done"),
        ("links", "mkdir $out; ln -s nowhere $out/l; echo '#!' > $out/x; chmod +x $out/x"),
    ],
)
async def test_outputs_of_any_shape_are_uploaded(bench: AgentHarness, name: str, script: str) -> None:
    reader = await bench.agent()
    [report] = await reader.build(order(drv(name, script)))
    [output] = success(report).outputs
    nar = nar_of(bench, output)
    assert output.nar_hash == _nix_hash(nar)
    other = await bench.agent("two")
    bench.publish(report)
    [reuse] = await other.build(order(drv("use", f"ls -a {output.path} > $out"), [output.path]))
    success(reuse)


def _nix_hash(nar: bytes) -> str:
    from infra.nix.hashing import sha256_text  # noqa: PLC0415 - one use

    return sha256_text(sha256(nar).digest())


async def test_a_failing_builder_fails_for_good_with_the_end_of_its_log(bench: AgentHarness) -> None:
    reader = await bench.agent()
    broken = order(drv("broken", "echo before; echo wrong >&2; exit 3"))
    failed = failure((await reader.build(broken))[0])
    assert failed.reason == "permanent"
    assert "exit code 3" in failed.message
    assert "\x1b" not in failed.message
    assert reader.logs[broken.step] == b"before\nwrong\n"


async def test_a_build_that_makes_no_output_fails_for_good(bench: AgentHarness) -> None:
    reader = await bench.agent()
    failed = failure((await reader.build(order(drv("nothing", "true"))))[0])
    assert failed.reason == "output_rejected"


async def test_a_fixed_output_is_built_and_a_wrong_one_refused(bench: AgentHarness) -> None:
    reader = await bench.agent()
    digest = sha256(b"fixed\n").hexdigest()
    path = STORE_DIR.make_fixed_output_path("fixed", "", "sha256", digest)
    right = drv("fixed", "echo fixed > $out", fixed=(path, "sha256", digest))
    wrong = drv("fixed", "echo wrong > $out", fixed=(path, "sha256", digest))
    failed = failure((await reader.build(order(wrong)))[0])
    assert failed.reason == "hash_mismatch"
    assert "hash mismatch" in failed.message
    [output] = success((await reader.build(order(right)))[0]).outputs
    assert output.ca == f"fixed:{_nix_hash(b'fixed' + bytes([10]))}"


async def test_the_log_is_passed_on_byte_for_byte(bench: AgentHarness) -> None:
    reader = await bench.agent()
    noisy = order(drv("noisy", r"printf '\377\376\001\n\033[1mbold\n'; printf 'no newline'; : > $out"))
    success((await reader.build(noisy))[0])
    assert reader.logs[noisy.step] == b"\xff\xfe\x01\n\x1b[1mbold\nno newline\n"


async def test_of_a_log_beyond_its_limit_head_and_tail_are_kept_and_the_build_goes_on(bench: AgentHarness) -> None:
    reader = await bench.agent()
    script = "i=1000; while [ $i -lt 2000 ]; do echo line$i; i=$((i+1)); done; : > $out"
    chatty = order(drv("chatty", script), max_log_bytes=144)
    success((await reader.build(chatty))[0])
    head, _, rest = reader.logs[chatty.step].partition(b"drover: ")
    note, _, tail = rest.partition(b"\n")
    assert head == b"".join(b"line%d\n" % n for n in range(1000, 1012))
    assert note == b"the log is longer than 144 bytes; 8856 bytes are left out here"
    assert tail == b"".join(b"line%d\n" % n for n in range(1996, 2000))


async def test_a_line_longer_than_the_limit_is_left_out_and_said_so(bench: AgentHarness) -> None:
    reader = await bench.agent()
    wide = order(drv("wide", "echo first; printf '%0200d\\n' 7; echo last; : > $out"), max_log_bytes=100)
    success((await reader.build(wide))[0])
    note = b"drover: the log is longer than 100 bytes; 201 bytes are left out here\n"
    assert reader.logs[wide.step] == b"first\n" + note + b"last\n"


async def test_fifty_megabytes_of_log_pass_through_in_flat_memory(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long a log is kept for a coordinator that takes over is another test's (`test_outbox`).
    monkeypatch.setattr(outbox, "KEEP_S", 0.0)
    reader = await bench.agent()
    line = "x" * 1023
    script = f"i=0; while [ $i -lt 50000 ]; do echo {line}; i=$((i+1)); done; : > $out"
    loud = order(drv("loud", script))
    await reader.agent.start_many([loud.dump()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = ack = 0
    done = False
    while not done:
        # The listener is slower than the builder, so the outbox has to hold the log on disk.
        await asyncio.sleep(0.1)
        batch = await reader.agent.events(ack, 1 << 20, 5.0)
        ack = batch["last"]
        for event in batch["events"]:
            if event["kind"] == "log":
                assert event["offset"] == size
                size += len(event["data"])
            done = done or event["kind"] == "report"
    assert size == 50_000 * 1024
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 32 * 1024
    assert not list((bench.root / "one" / "state" / "spool").glob("*.log")) or ack
    await reader.agent.events(ack, 1, 0.0)
    assert not list((bench.root / "one" / "state" / "spool").glob("*.log"))


async def test_phases_are_reported_while_a_build_runs(bench: AgentHarness) -> None:
    reader = await bench.agent()
    phase = """echo '@nix {"action":"setPhase","phase":"checkPhase"}' >&2"""
    phased = order(drv("phased", f"{phase}; {FOREVER}"))
    await reader.agent.start_many([phased.dump()])
    await reader.until(lambda: any(change.phase == "checkPhase" for change in reader.stages))
    assert reader.stages[-1].stage is Stage.BUILDING


async def test_a_build_is_stopped_at_its_limit_of_time(bench: AgentHarness) -> None:
    reader = await bench.agent()
    failed = failure((await reader.build(order(drv("slow", FOREVER), timeout_s=1)))[0])
    assert failed.reason == "timeout"
    assert "timed out" in failed.message
    assert failed.limit == 1


async def test_a_build_that_prints_nothing_is_stopped_at_its_limit_of_silence(bench: AgentHarness) -> None:
    reader = await bench.agent()
    failed = failure((await reader.build(order(drv("mute", FOREVER), timeout_s=60, silence_s=1)))[0])
    assert (failed.reason, failed.limit) == ("silence", 1)


async def test_outputs_beyond_their_limit_of_size_are_not_uploaded(bench: AgentHarness) -> None:
    reader = await bench.agent()
    large = order(drv("large", "printf '%09000d' 1 > $out"), max_output_bytes=8000)
    failed = failure((await reader.build(large))[0])
    assert (failed.reason, failed.limit) == ("output_size", 8000)
    assert "at most 8000" in failed.message
    success((await reader.build(order(drv("fits", "printf '%07000d' 1 > $out"), max_output_bytes=8000)))[0])


async def test_an_agent_that_is_asked_to_stop_finishes_what_runs_and_hands_back_what_does_not_end(
    bench: AgentHarness, gate: BuilderGate
) -> None:
    reader = await bench.agent(slots=2, nix_options=gate.options)
    running, endless = order(drv("running", f"echo started; {gate.WAITS}; : > $out")), order(drv("endless", FOREVER))
    await reader.agent.start_many([running.dump(), endless.dump()])
    await reader.until(lambda: {running.step, endless.step} <= reader.logs.keys())
    state, no_longer = bench.root / "one" / "state", asyncio.Event()
    # The grace ends once what is to end within it has, however long a busy machine takes for that.
    stopping = asyncio.create_task(stop_agents([state], PATIENCE_S, no_longer.is_set))
    late = order(drv("late", ": > $out"))
    await reader.until(lambda: reader.batches[-1].draining)
    await reader.agent.start_many([late.dump()])
    assert failure((await reader.finish(late))[0]).reason == "returned"
    gate.open()
    success((await reader.finish(running))[0])
    assert endless.step not in reader.reports
    no_longer.set()
    handed_back = failure((await reader.finish(endless))[0])
    assert handed_back.reason == "returned"
    assert "stopping" in handed_back.message
    while not stopping.done():
        await reader.hear(0.1)
    assert (state / "stopped").exists()


async def test_a_cancelled_build_leaves_no_process_and_the_slot_builds_on(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=2, nix_options={"sandbox-paths": "/bin/sh=/bin/busybox /bin/busybox"})
    endless = order(drv("endless", SURVIVOR))
    other = order(drv("other", FOREVER))
    await reader.agent.start_many([endless.dump(), other.dump()])
    await reader.until(lambda: endless.step in reader.logs and other.step in reader.logs)
    mark, untouched = hash_part("endlessout" + SURVIVOR), hash_part("otherout" + FOREVER)
    assert len(processes_with(mark)) >= 3
    for _ in range(2):
        await reader.agent.cancel([{"step": endless.step, "attempt": 1}])
    assert failure((await reader.finish(endless))[0]).reason == "cancelled"
    success((await reader.build(order(drv("after", "echo after > $out"))))[0])
    async with asyncio.timeout(PATIENCE_S):
        while processes_with(mark):  # noqa: ASYNC110 - other programs' processes send no event
            await asyncio.sleep(0.05)
    assert processes_with(untouched)


async def test_a_builder_that_lost_agent_owner_and_daemon_at_once_is_ended_by_the_next_agent(
    bench: AgentHarness,
) -> None:
    reader = await bench.agent(slots=1)
    orphan = order(drv("orphan", FOREVER))
    await reader.agent.start_many([orphan.dump()])
    await reader.until(lambda: orphan.step in reader.logs)
    mark = hash_part("orphanout" + FOREVER)
    owner = above(processes_with(mark)[0], "owner.py")
    for pid in (owner, *daemons_below(owner)):
        os.kill(pid, signal.SIGSTOP)
    for pid in (*daemons_below(owner), owner):
        os.kill(pid, signal.SIGKILL)
    await reader.agent.close()
    assert processes_with(mark)
    await bench.agent(slots=1)
    assert processes_with(mark) == []


async def test_cancelling_a_lease_that_is_not_known_or_finished_does_nothing(bench: AgentHarness) -> None:
    reader = await bench.agent()
    done = order(drv("done", ": > $out"))
    await reader.build(done)
    await reader.agent.cancel([{"step": done.step, "attempt": 1}, {"step": "never", "attempt": 7}])
    assert not (await reader.hear(0.0)).events


async def test_the_agent_survives_a_killed_daemon(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    for name, with_owner in (("silent", False), ("orphan", True)):
        made = drv(name, MUTE)
        victim, mark = order(made), made[1].outputs[0].path
        await reader.agent.start_many([victim.dump()])
        await reader.until(partial(processes_with, mark))
        builder = processes_with(mark)
        owner = above(builder[0], "owner.py")
        [daemon] = daemons_below(owner)
        for pid in (owner, daemon)[1 - with_owner :]:
            os.kill(pid, signal.SIGKILL)
        failed = failure((await reader.finish(victim))[0])
        # Not begun again in the same lease, though nothing was heard of it; and nothing of it goes on.
        assert failed.reason == "connection_lost"
        assert "connection to the Nix daemon" in failed.message
        assert not set(builder) & live_processes().keys()
    success((await reader.build(order(drv("next", ": > $out"))))[0])


async def test_daemons_that_died_while_nothing_was_built_are_replaced_unnoticed(bench: AgentHarness) -> None:
    before = set(descendants())
    reader = await bench.agent(slots=1)
    [first] = await reader.build(order(drv("first", ": > $out")))
    for pid in set(descendants()) - before:
        os.kill(pid, signal.SIGKILL)
    path = success(first).outputs[0].path
    [second] = await reader.build(order(drv("second", f"ls {path}; : > $out"), [path]))
    success(second)


async def test_a_daemon_that_cannot_be_reopened_is_the_farms_fault(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(descendants())
    reader = await bench.agent(slots=1)
    monkeypatch.setattr(daemon_pool, "open_stdio", lambda _, *reader: open_stdio(["/nonexistent/nix-daemon"], *reader))
    for pid in set(descendants()) - before:
        os.kill(pid, signal.SIGKILL)
    failed = failure((await reader.build(order(drv("lost", ": > $out"))))[0])
    assert failed.reason == "daemon_lost"


@pytest.mark.parametrize(
    "line",
    [
        '{"action":"setPhase","phase":7}',
        '{"action":"msg","level":[],"msg":"x"}',
        '{"action":7}',
        "[]",
        "5",
        '{"action":"start","type":101,"id":1,"level":0,"text":"","fields":[{}]}',
    ],
)
async def test_an_at_nix_line_that_nix_cannot_read_fails_for_good_and_the_slot_builds_on(
    bench: AgentHarness, line: str
) -> None:
    reader = await bench.agent(slots=1)
    nasty = order(drv("nasty", f"echo before; echo '@nix {line}' >&2; sleep 1; : > $out"))
    [report] = await reader.build(nasty)
    if not isinstance(report.result, Succeeded):  # later versions of Nix take it for a line of log
        failed = failure(report)
        assert failed.reason == "permanent"
        assert failed.message.startswith("the builder printed an @nix line that Nix cannot read: ")
    assert reader.logs[nasty.step].startswith(b"before\n")
    success((await reader.build(order(drv("good", ": > $out"))))[0])


async def test_lines_of_any_length_and_any_bytes_are_cut_and_the_build_goes_on(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    # The first is 100 MB long and the last has no end; builders may inject as many fields as they like.
    script = r"""
        head -c 100000000 /dev/zero | tr '\0' x; echo; printf '\377\0\033]\rover\n'
        f=1; for i in 1 2 3 4 5 6 7 8 9; do f=$f,$f; done
        echo '@nix {"action":"start","type":101,"id":1,"level":0,"text":"","fields":['$f']}'
        echo '@nix {"action":"result","type":7,"id":1,"fields":['$f']}'
        printf '@nix {"action":"msg","level":0,"msg":"'; head -c 20000000 /dev/zero | tr '\0' y; echo '"}'
        printf '@nix {"action":"setPhase","phase":"'; head -c 2000000 /dev/zero | tr '\0' z; echo '"}'
        echo '@nix {'; echo '@nix'; head -c 1000000 /dev/urandom; echo; echo end; printf unterminated; : > $out
    """
    wild = order(drv("wild", script))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    success((await reader.build(wild))[0])
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 48 * 1024
    log = reader.logs[wild.step]
    first, _, rest = log.partition(b"\n")
    assert first.endswith(b"x [drover: cut here, 100000000 bytes in all]")
    assert len(first) == 1024 * 1024
    assert rest.startswith(b"over")
    assert log.endswith(b"\nend\nunterminated\n")


async def test_a_line_without_an_end_is_stopped_before_the_daemon_takes_the_machines_memory(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.agent.build.MAX_DAEMON_BYTES", 128 * 1024 * 1024)
    reader = await bench.agent(slots=1)
    [report] = await reader.build(order(drv("endless", "tr '\\0' x < /dev/zero")))
    assert failure(report).reason == "log_limit"
    assert failure(report).message.startswith("the builder printed a line that is too long for Nix: ")
    success((await reader.build(order(drv("good", ": > $out"))))[0])


async def test_greetings_that_come_together_are_all_answered(bench: AgentHarness) -> None:
    agent = Agent(WorkerSettings(name="w", state_dir=bench.root / "w" / "state", store=str(bench.root / "w" / "store")))
    try:
        with pytest.raises(AgentError, match="not started"):
            await agent.events(0, 1000, 0.0)
        first, second = await asyncio.gather(agent.hello(bench.farm.dump()), agent.hello(bench.farm.dump()))
        assert first == second
        assert first["nix_version"]
        foreign = bench.farm.model_copy(update={"store_dir": "/elsewhere/store"})
        with pytest.raises(AgentError, match="builds for /nix/store, the farm for /elsewhere/store"):
            await agent.hello(foreign.dump())
    finally:
        await agent.close()
        await agent.close()


async def test_an_emulated_system_is_accepted_and_another_is_not(bench: AgentHarness) -> None:
    reader = await bench.agent(emulate=("aarch64-darwin",))
    mac = order(drv("mac", "echo mac > $out", system="aarch64-darwin"))
    arm = order(drv("arm", "echo arm > $out", system="riscv64-linux"))
    here, there = await reader.build(mac, arm)
    success(here)
    assert failure(there).reason == "infrastructure"


async def test_a_32_bit_derivation_is_built_as_its_own_system_on_a_64_bit_machine(bench: AgentHarness) -> None:
    reader = await bench.agent()
    hello = await reader.agent.hello(bench.farm.dump())
    assert "i686-linux" in hello["systems"]
    assert not hello["emulated"]
    small = order(drv("small", "uname -m > $out; uname -m", system="i686-linux"))
    success((await reader.build(small))[0])
    assert reader.logs[small.step] == b"i686\n", "Nix gives the build the personality of its system"


async def test_a_feature_that_is_offered_is_accepted_by_nix(bench: AgentHarness) -> None:
    reader = await bench.agent(features=("gpu",))
    special = order(drv("special", ": > $out", env={"requiredSystemFeatures": "gpu"}))
    other = order(drv("other", ": > $out", env={"requiredSystemFeatures": "quantum"}))
    here, there = await reader.build(special, other)
    success(here)
    assert failure(there).reason == "infrastructure"


async def test_nix_options_of_the_operator_reach_the_builds(bench: AgentHarness) -> None:
    marker = bench.root / "marker"
    marker.write_text("from the host\n")
    busybox = shutil.which("busybox")
    reader = await bench.agent(nix_options={"sandbox-paths": f"/bin/sh={busybox} /marker={marker}"})
    seeing = order(drv("seeing", "read line < /marker; echo $line; : > $out"))
    success((await reader.build(seeing))[0])
    assert reader.logs[seeing.step] == b"from the host\n"


async def test_a_derivation_that_cannot_be_read_fails_for_good(bench: AgentHarness) -> None:
    reader = await bench.agent()
    nonsense = order(drv("nonsense", "true")).model_copy(update={"derivation": b"Derive(nonsense"})
    failed = failure((await reader.build(nonsense))[0])
    assert failed.reason == "permanent"
    assert "cannot be read" in failed.message


def _spoil_store(bench: AgentHarness) -> Path:
    objects, aside = bench.root / "objects", bench.root / "aside"
    objects.rename(aside)
    objects.write_text("a file where the directory was")
    return aside


async def test_an_object_store_that_fails_is_the_farms_fault(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_runner, "UPLOAD_WITHIN_S", 0.3)
    reader = await bench.agent()
    _spoil_store(bench)
    failed = failure((await reader.build(order(drv("homeless", ": > $out"))))[0])
    assert failed.reason == "upload_failed"
    assert "could not be uploaded" in failed.message


async def test_an_upload_waits_for_a_store_that_fails_for_a_while_and_says_so(bench: AgentHarness) -> None:
    reader = await bench.agent()
    aside = _spoil_store(bench)
    made = order(drv("patient", ": > $out"))
    await reader.agent.start_many([made.dump()])
    await reader.until(lambda: any("cannot write" in stage.phase for stage in reader.stages))
    (bench.root / "objects").unlink()
    aside.rename(bench.root / "objects")
    success((await reader.finish(made))[0])


async def test_an_error_that_nobody_foresaw_ends_one_lease_only(
    bench: AgentHarness, caplog: pytest.LogCaptureFixture
) -> None:
    reader = await bench.agent()
    bad = order(drv("bad", ": > $out")).model_copy(update={"drv_path": f"{STORE}/{hash_part('x')}-no-derivation"})
    good = order(drv("good", ": > $out"))
    unforeseen, fine = await reader.build(bad, good)
    assert failure(unforeseen).reason == "infrastructure"
    assert "\n" not in failure(unforeseen).message
    success(fine)
    assert sum(record.exc_info is not None for record in caplog.records) == 1


async def test_a_farm_whose_object_store_is_not_seen_here_is_refused(bench: AgentHarness) -> None:
    reader = await bench.agent(greet=False)
    elsewhere = bench.farm.model_copy(update={"object_store_url": (bench.root / "elsewhere").as_uri()})
    with pytest.raises(AgentError, match="cannot serve this farm"):
        await reader.agent.hello(elsewhere.dump())


async def test_leases_that_come_before_the_greeting_are_handed_back(bench: AgentHarness) -> None:
    reader = await bench.agent(greet=False)
    assert failure((await reader.build(order(drv("early", ": > $out"))))[0]).reason == "returned"


async def test_an_agent_that_cannot_reach_nix_says_so_at_its_start(bench: AgentHarness) -> None:
    with pytest.raises(Exception, match="gives no connection"):
        await bench.agent(nix_daemon="/nonexistent/nix-daemon")


async def test_closing_ends_all_processes_of_the_agent(bench: AgentHarness) -> None:
    before = set(descendants())
    reader = await bench.agent()
    endless = order(drv("closing", FOREVER))
    await reader.agent.start_many([endless.dump()])
    await reader.until(lambda: endless.step in reader.logs)
    await reader.agent.close()
    assert set(descendants()) <= before
    with pytest.raises(AgentError):
        await reader.agent.events(0, 1000, 0.0)


def test_store_paths_of_the_bench_are_well_formed() -> None:
    path, derivation = drv("some", "true")
    assert STORE_DIR.parse(path) == StorePath(hash_part("drv" + "some" + "true"), "some.drv")
    assert STORE_DIR.parse(derivation.outputs[0].path).name == "some"
