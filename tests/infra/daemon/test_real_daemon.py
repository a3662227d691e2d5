"""The client against a real `nix-daemon --stdio` with the sandbox on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from infra.daemon import (
    BasicDerivation,
    BuildMode,
    BuildStatus,
    DaemonConnection,
    DaemonError,
    DaemonGone,
    DaemonOperationError,
    DaemonSourceError,
    GcAction,
    Message,
    Options,
    Phase,
    PrintedLines,
    Upload,
    open_socket,
    open_stdio,
)
from infra.daemon.framed import FRAME_BYTES
from infra.nix import aterm
from infra.process import ChildProcess
from tests.infra.daemon.conftest import Bare, Store, add, nar_of_file, processes_mentioning, store_path, until
from tests.support.attack import ProcessGauge
from tests.support.patience import PATIENCE_S
from tests.support.processes import LEAVES_A_PROCESS, SURVIVOR, daemons_below


def nothing(_: object) -> None:
    pass


async def first_connection(path: Path) -> DaemonConnection:
    """Connect once a daemon listens, which its socket does after it is there, and not before with another connection.

    Each connection opens the store, and where two do so at once one of them may fail to make it.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(DaemonGone):
                return await open_socket(str(path))
            await asyncio.sleep(0.01)


async def test_a_build_succeeds_and_its_output_can_be_read(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("hello", "echo hello > $out")
    result = await connection.build_derivation(drv_path, derivation, nothing)
    out = derivation.outputs[0].path
    assert (result.status, result.error_msg, result.built_outputs) == (BuildStatus.BUILT, "", (("out", out),))
    assert result.times_built == 1
    assert 0 < result.start_time <= result.stop_time
    info = await connection.query_path_info(out)
    assert info is not None
    assert (info.deriver_path, info.references) == (drv_path, ())
    nar = b"".join([chunk async for chunk in connection.nar_from_path(out, info.nar_size)])
    assert nar == nar_of_file(b"hello\n")
    again = await connection.build_derivation(drv_path, derivation, nothing)
    assert again.status is BuildStatus.ALREADY_VALID
    assert again.status.is_success


async def test_the_derivation_of_a_drv_file_is_built_without_its_graph(store: Store) -> None:
    # The vector of infra/nix/FORMATS.md 3.2: the paths are what Nix itself computes for this derivation.
    drv = aterm.parse(
        b'Derive([("out","/nix/store/2jmiqxxd2z4ypk8am71rc6kffqzgma57-t","","")],[],[],"x86_64-linux","/bin/sh",'
        b'["-c","echo hi > $out"],[("builder","/bin/sh"),("name","t"),'
        b'("out","/nix/store/2jmiqxxd2z4ypk8am71rc6kffqzgma57-t"),("system","x86_64-linux")])'
    )
    source = store.upload("unused", b"")
    connection = await store.open()
    await connection.add_to_store_nar(source, dont_check_sigs=True)
    derivation = BasicDerivation.from_derivation(drv, [source.info.store_path])
    assert derivation.inputs == (source.info.store_path,)
    drv_path = "/nix/store/hb09lmdvs22v5ianga0vgpi9k446q3kw-t.drv"
    assert (await connection.build_derivation(drv_path, derivation, nothing)).status is BuildStatus.BUILT


async def test_a_failing_builder_is_a_permanent_failure_with_a_plain_message(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("failing", "echo no luck; exit 3")
    result = await connection.build_derivation(drv_path, derivation, nothing)
    assert result.status is BuildStatus.PERMANENT_FAILURE
    assert not result.status.is_success
    assert "exit code 3" in result.error_msg
    assert "\x1b" not in result.error_msg
    assert connection.unusable_reason is None


async def test_log_lines_arrive_byte_for_byte_and_phases_are_not_log_lines(store: Store) -> None:
    connection = await store.open()
    script = (
        "printf 'bin\\377\\0ary\\n\\n'; printf 'overwritten\\rXX\\n'; printf '\\033[1mbold\\033[0m\\n';"
        """echo '@nix {"action":"setPhase","phase":"x"}' >&2; echo > $out; printf 'no newline'"""
    )
    events: list[object] = []
    result = await connection.build_derivation(*store.derivation("noisy", script), events.append)
    assert result.status.is_success
    lines = [event for event in events if isinstance(event, PrintedLines)]
    assert b"".join(each.data for each in lines) == (b"bin\xff\x00ary\n\nXXerwritten\n\x1b[1mbold\x1b[0m\nno newline\n")
    assert sum(each.count for each in lines) == 5
    assert [event for event in events if isinstance(event, Phase)] == [Phase("x")]


async def test_text_that_a_builder_injects_is_a_message_and_never_a_log_line(store: Store) -> None:
    connection = await store.open()
    injected = r"""echo '@nix {"action":"msg","level":0,"msg":"\u001b[31minjected\u001b[0m"}' >&2; echo > $out"""
    events: list[object] = []
    await connection.build_derivation(*store.derivation("injecting", injected), events.append)
    assert events == [Message("injected")]


async def test_several_outputs_refer_to_each_other_and_to_inputs(store: Store) -> None:
    connection = await store.open()
    source = store.upload("source", b"a source\n")
    await connection.add_to_store_nar(source, dont_check_sigs=True)
    script = "read line < SOURCE; echo SOURCE $line > $out; echo $out > $dev; echo plain > $doc"
    drv_path, derivation = store.derivation(
        "several",
        script.replace("SOURCE", source.info.store_path),
        inputs=(source.info.store_path,),
        outputs=("out", "dev", "doc"),
    )
    result = await connection.build_derivation(drv_path, derivation, nothing)
    paths = {output.name: output.path for output in derivation.outputs}
    assert dict(result.built_outputs) == paths
    references = {}
    for name, path in paths.items():
        info = await connection.query_path_info(path)
        assert info is not None
        references[name] = info.reference_paths
    assert references == {"out": (source.info.store_path,), "dev": (paths["out"],), "doc": ()}


async def test_many_paths_with_references_are_uploaded_in_one_stream_and_built_with(store: Store) -> None:
    connection = await store.open()
    base = store.upload("base", b"base")
    top = store.upload("top", base.info.store_path.encode(), references=(base.info.store_path,))
    big = store.upload("big", os.urandom(5 * FRAME_BYTES + 3))
    small = [store.upload(f"small{i}", b"%d" % i) for i in range(200)]
    uploads = [base, top, big, *small]
    await connection.add_multiple_to_store(uploads, dont_check_sigs=True)
    paths = {upload.info.store_path for upload in uploads}
    assert await connection.query_valid_paths([*paths, store_path("absent")]) == paths
    info = await connection.query_path_info(top.info.store_path)
    assert info is not None
    assert info == top.info
    # Only `top` is named: its closure is visible in the sandbox because it is valid.
    script = f"read line < {top.info.store_path}; read text < $line; echo $text; echo > $out"
    events: list[object] = []
    drv_path, derivation = store.derivation("uses", script, inputs=(top.info.store_path,))
    result = await connection.build_derivation(drv_path, derivation, events.append)
    assert result.status.is_success
    assert events == [PrintedLines(b"base\n", 1)]


@pytest.mark.parametrize("many", [True, False])
async def test_a_wrong_nar_hash_is_refused_and_leaves_the_connection_usable(store: Store, many: bool) -> None:
    connection = await store.open()
    honest = store.upload("honest", b"x" * 3 * FRAME_BYTES)
    liar = Upload(replace(honest.info, nar_hash=store.upload("other", b"").info.nar_hash), honest.nar)
    with pytest.raises(DaemonOperationError, match="hash mismatch"):
        await add(connection, liar, many=many)
    assert await connection.query_valid_paths([liar.info.store_path]) == frozenset()
    assert await connection.query_path_info(liar.info.store_path) is None


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("delta", "complaint"), [(-8, "has more than"), (8, "ends 8 bytes early")])
async def test_a_nar_of_another_size_is_refused_here_and_leaves_the_connection_usable(
    store: Store, delta: int, complaint: str, many: bool
) -> None:
    connection = await store.open()
    honest = store.upload("honest", b"x" * 3 * FRAME_BYTES)
    wrong = Upload(replace(honest.info, nar_size=honest.info.nar_size + delta), honest.nar)
    with pytest.raises(DaemonSourceError, match=complaint):
        await add(connection, wrong, many=many)
    assert await connection.query_valid_paths([wrong.info.store_path]) == frozenset()


async def test_a_source_that_fails_half_way_passes_its_error_on_and_leaves_the_connection_usable(store: Store) -> None:
    connection = await store.open()
    honest = store.upload("honest", b"x" * 3 * FRAME_BYTES)

    async def failing() -> AsyncIterator[bytes]:
        async for chunk in honest.nar:
            yield chunk
            raise LookupError("the disk is gone")

    with pytest.raises(LookupError, match="the disk is gone"):
        await connection.add_multiple_to_store([Upload(honest.info, failing())], dont_check_sigs=True)
    assert await connection.query_valid_paths([honest.info.store_path]) == frozenset()


async def test_an_upload_whose_references_are_missing_is_refused(store: Store) -> None:
    connection = await store.open()
    orphan = store.upload("orphan", b"x", references=(store_path("nowhere"),))
    with pytest.raises(DaemonOperationError, match="nowhere"):
        await connection.add_to_store_nar(orphan, dont_check_sigs=True)
    assert connection.unusable_reason is None


async def test_a_missing_input_is_a_misc_failure(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("needy", "echo > $out", inputs=(store_path("nowhere"),))
    result = await connection.build_derivation(drv_path, derivation, nothing)
    assert result.status is BuildStatus.MISC_FAILURE
    assert "nowhere" in result.error_msg


async def test_a_timeout_in_the_options_ends_the_build(store: Store) -> None:
    connection = await store.open(timeout="1")
    result = await connection.build_derivation(*store.derivation("slow", "/bin/busybox sleep 60"), nothing)
    assert result.status is BuildStatus.TIMED_OUT
    # Options hold for what follows them only: without the limit the same connection builds as before.
    await connection.set_options(Options(build_cores=7, overrides={"timeout": "0"}))
    events: list[object] = []
    await connection.build_derivation(*store.derivation("cores", "echo $NIX_BUILD_CORES; echo > $out"), events.append)
    assert events == [PrintedLines(b"7\n", 1)]


async def test_check_mode_finds_a_build_that_is_not_deterministic(store: Store) -> None:
    connection = await store.open()
    build = store.derivation("dice", "/bin/busybox head -c 8 /dev/urandom > $out")
    first = await connection.build_derivation(*build, nothing)
    second = await connection.build_derivation(*build, nothing, mode=BuildMode.CHECK)
    assert (first.status, second.status) == (BuildStatus.BUILT, BuildStatus.NOT_DETERMINISTIC)


SLEEPER = "echo started; /bin/busybox sleep 60; echo > $out"


async def test_abort_ends_a_build_and_leaves_no_process(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("sleeper", SLEEPER)
    started = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        build = tasks.create_task(
            _ends_in_gone(connection.build_derivation(drv_path, derivation, lambda _: started.set()))
        )
        await started.wait()
        assert processes_mentioning(derivation.outputs[0].path)
        connection.abort("the lease was revoked")
    assert "the lease was revoked" in build.result()
    await connection.close()
    await until(lambda: not processes_mentioning(derivation.outputs[0].path))
    with pytest.raises(DaemonGone, match="the lease was revoked"):
        await connection.query_valid_paths([drv_path])


async def _ends_in_gone(call: Awaitable[object]) -> str:
    with pytest.raises(DaemonGone) as caught:
        await call
    return str(caught.value)


async def test_a_cancelled_build_hangs_up(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("sleeper", SLEEPER)
    started = asyncio.Event()
    build = asyncio.create_task(connection.build_derivation(drv_path, derivation, lambda _: started.set()))
    await started.wait()
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert connection.unusable_reason == "a request was interrupted by CancelledError"
    await until(lambda: not processes_mentioning(derivation.outputs[0].path))


async def test_an_error_of_the_listener_ends_the_build_and_reaches_the_caller(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("sleeper", SLEEPER)

    def full(_: object) -> None:
        raise BufferError("the log is full")

    with pytest.raises(BufferError):
        await connection.build_derivation(drv_path, derivation, full)
    await connection.close()
    await until(lambda: not processes_mentioning(derivation.outputs[0].path))


@pytest.mark.parametrize(
    ("sandbox", "end"),
    [(True, "close"), (True, "daemon killed"), (True, "owner killed"), (False, "close"), (False, "daemon killed")],
)
async def test_nothing_of_a_build_survives_its_connection(store: Store, *, sandbox: bool, end: str) -> None:
    place = store if sandbox else Bare(store.directory)
    connection = await place.open()
    store.connections.append(connection)
    drv_path, derivation = place.derivation("survivor", SURVIVOR)
    started = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        build = connection.build_derivation(drv_path, derivation, lambda _: started.set())
        tasks.create_task(_ends_early(build))
        await started.wait()
        out = derivation.outputs[0].path
        await until(lambda: len(processes_mentioning(out)) >= 3)
        assert connection.pid is not None
        match end:
            case "close":
                await connection.close()
            case "daemon killed":
                os.kill(daemons_below(connection.pid)[0], signal.SIGKILL)
            case _:
                os.kill(connection.pid, signal.SIGKILL)
    await until(lambda: not processes_mentioning(out))


@pytest.mark.parametrize("status", [0, 1], ids=["well", "badly"])
async def test_nothing_of_a_build_survives_its_end_while_the_daemon_goes_on(store: Store, status: int) -> None:
    place = Bare(store.directory)
    connection = await place.open()
    store.connections.append(connection)
    drv_path, derivation = place.derivation("leaves", LEAVES_A_PROCESS + f"echo > $out; exit {status}")
    out = derivation.outputs[0].path
    result = await connection.build_derivation(drv_path, derivation, nothing)
    assert result.status.is_success == (status == 0)
    assert processes_mentioning(out), "Nix ends it itself"
    await connection.end_orphans()
    assert not processes_mentioning(out)
    drv_path, derivation = place.derivation("next", "echo > $out")
    assert (await connection.build_derivation(drv_path, derivation, nothing)).status is BuildStatus.BUILT


async def _ends_early(build: Awaitable[object]) -> None:
    with pytest.raises(DaemonError):
        await build


async def test_closing_kills_a_daemon_that_does_not_react_and_its_builder(store: Store) -> None:
    connection = await store.open()
    drv_path, derivation = store.derivation("sleeper", SLEEPER)
    started = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_ends_in_gone(connection.build_derivation(drv_path, derivation, lambda _: started.set())))
        await started.wait()
        assert connection.pid is not None
        for pid in (connection.pid, daemons_below(connection.pid)[0]):
            os.kill(pid, signal.SIGSTOP)
        await connection.close()
    await until(lambda: not processes_mentioning(derivation.outputs[0].path))


async def test_a_listener_that_wants_time_is_waited_for(store: Store) -> None:
    connection = await store.open()
    heard: list[bytes] = []

    async def store_slowly(event: object) -> None:
        await asyncio.sleep(0.001)
        assert isinstance(event, PrintedLines)
        heard.append(event.data)

    await connection.build_derivation(*store.derivation("two", "echo 1; echo 2; echo > $out"), store_slowly)
    assert b"".join(heard) == b"1\n2\n"


async def test_fifty_megabytes_of_log_pass_through_a_bounded_buffer(store: Store) -> None:
    connection = await store.open()
    size, lines = 0, 0

    def listen(event: object) -> None:
        nonlocal size, lines
        assert isinstance(event, PrintedLines)
        size += len(event.data)
        lines += event.count

    script = f"/bin/busybox yes {'y' * 249} | /bin/busybox head -c 50000000; echo > $out"
    here = ProcessGauge(os.getpid())
    here.reset_peak()
    before = here.rss_bytes
    result = await connection.build_derivation(*store.derivation("chatty", script), listen)
    assert result.status.is_success
    assert (size, lines) == (50_000_000, 200_000)
    assert here.peak_rss_bytes - before < 8 * 1024 * 1024


async def test_a_nar_that_is_not_read_to_its_end_makes_the_connection_unusable(store: Store) -> None:
    connection = await store.open()
    upload = store.upload("big", os.urandom(3_000_000))
    await connection.add_to_store_nar(upload, dont_check_sigs=True)
    async for chunk in (nar := connection.nar_from_path(upload.info.store_path, upload.info.nar_size)):
        assert 0 < len(chunk) <= 1024 * 1024
        break
    await nar.aclose()
    with pytest.raises(DaemonGone):
        await connection.query_valid_paths([upload.info.store_path])


async def test_a_large_nar_comes_back_as_it_was_sent(store: Store) -> None:
    connection = await store.open()
    content = os.urandom(20_000_000)
    upload = store.upload("big", content)
    await connection.add_to_store_nar(upload, dont_check_sigs=True)
    chunks = [chunk async for chunk in connection.nar_from_path(upload.info.store_path, upload.info.nar_size)]
    assert b"".join(chunks) == nar_of_file(content)
    with pytest.raises(DaemonOperationError):
        async for _ in connection.nar_from_path(store_path("absent"), 112):
            pass
    assert connection.unusable_reason is None


async def test_temporary_roots_hold_for_as_long_as_their_connection(store: Store) -> None:
    holder, collector = await store.open(), await store.open()
    held, loose = store.upload("held", b"held"), store.upload("loose", b"loose")
    writer = await store.open()
    await writer.add_multiple_to_store([held, loose], dont_check_sigs=True)
    await holder.add_temp_roots([held.info.store_path])
    await writer.close()
    first = await collector.collect_garbage(GcAction.DELETE_DEAD)
    await holder.close()
    second = await collector.collect_garbage(GcAction.DELETE_SPECIFIC, paths=[held.info.store_path])
    assert (first.paths, second.paths) == ((loose.info.store_path,), (held.info.store_path,))
    assert first.freed_bytes > 0


async def test_requests_of_several_tasks_wait_for_each_other(store: Store) -> None:
    connection = await store.open()
    uploads = [store.upload(f"u{i}", b"%d" % i) for i in range(20)]
    await asyncio.gather(*(connection.add_to_store_nar(upload, dont_check_sigs=True) for upload in uploads))
    infos = await asyncio.gather(*(connection.query_path_info(upload.info.store_path) for upload in uploads))
    assert [info and info.store_path for info in infos] == [upload.info.store_path for upload in uploads]


async def test_an_old_daemon_without_a_trust_flag_is_probed(store: Store) -> None:
    connection = await store.open()
    upload = store.upload("any", b"any")
    assert await connection.is_trusted() is None
    assert await connection.is_trusted(upload.info.store_path) is None
    await connection.add_to_store_nar(upload, dont_check_sigs=True)
    assert await connection.is_trusted(upload.info.store_path) is True


async def test_a_path_that_is_no_derivation_is_refused_before_it_aborts_the_daemon(store: Store) -> None:
    connection = await store.open()
    _, derivation = store.derivation("x", "echo > $out")
    with pytest.raises(ValueError, match="is not the path of a derivation"):
        await connection.build_derivation(store_path("x"), derivation, nothing)


async def test_the_socket_of_a_running_daemon_serves_builds_and_notices_a_hang_up(
    store: Store, socket_dir: Path
) -> None:
    path = socket_dir / "socket"
    arguments = [word for word in store.command if word != "--stdio"]
    daemon = await ChildProcess.start(arguments, env=store.env | {"NIX_DAEMON_SOCKET_PATH": str(path)})
    try:
        async with await first_connection(path) as connection:
            await connection.set_options(Options(build_cores=1))
            assert connection.pid is None
            script = "/bin/busybox sleep 0.1; echo > $out; echo hello"
            events: list[object] = []
            result = await connection.build_derivation(*store.derivation("hello", script), events.append)
            assert (result.status, events) == (BuildStatus.BUILT, [PrintedLines(b"hello\n", 1)])
            drv_path, derivation = store.derivation("sleeper", SLEEPER)
            call = connection.build_derivation(drv_path, derivation, lambda _: connection.abort("enough"))
            assert "enough" in await _ends_in_gone(call)
        await until(lambda: not processes_mentioning(derivation.outputs[0].path))
    finally:
        await daemon.kill()


async def test_a_daemon_that_cannot_start_says_why(store: Store) -> None:
    with pytest.raises(DaemonGone, match="no-such-program"):
        await open_stdio(["no-such-program"], store.env)
    with pytest.raises(DaemonGone, match=r"exit status 1; standard error: .*unrecognised"):
        await open_stdio([*store.command, "--no-such-flag"], store.env)
