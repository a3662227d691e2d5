"""Children that behave, and children that do not."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.process import (
    ChildProcess,
    Completed,
    ProcessNotFound,
    ProcessOutputTooLarge,
    ProcessTimeout,
    run,
)
from tests.support.patience import PATIENCE_S

ENV = {"PATH": os.environ["PATH"]}


def alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and waits to be collected by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def written(path: Path) -> int:
    """Return the process id in a file, 0 while it is not there."""
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what other processes do sets no event here
        await asyncio.sleep(0.01)


async def python(program: str, **changes: object) -> Completed:
    arguments: dict[str, object] = {"env": ENV, "timeout_s": PATIENCE_S, "max_output_bytes": 1_000_000} | changes
    return await run([sys.executable, "-c", program], **arguments)  # type: ignore[arg-type]


async def test_a_child_gets_its_input_environment_and_directory_and_gives_its_output(tmp_path: Path) -> None:
    program = (
        "import os, sys; d = sys.stdin.buffer.read(); print(len(d), os.getcwd(), sorted(os.environ)[0]); sys.exit(3)"
    )
    done = await python(program, input=b"x" * 900_000, cwd=tmp_path, env=ENV | {"A": "1"})
    assert done == Completed(3, f"900000 {tmp_path} A\n".encode(), b"")


async def test_nothing_of_our_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROVER_TEST_SECRET", "1")
    done = await run(["/usr/bin/env"], env={"ONLY": "this"}, timeout_s=PATIENCE_S, max_output_bytes=1000)
    assert done.stdout == b"ONLY=this\n"


async def test_a_child_that_ignores_its_input_is_no_error() -> None:
    assert await python("pass", input=b"x" * 5_000_000) == Completed(0, b"", b"")


async def test_a_child_that_a_signal_ends_says_so() -> None:
    assert (await python("import os; os.kill(os.getpid(), 9)")).returncode == -9


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_output_over_the_limit_kills_the_child(stream: str) -> None:
    program = f"import sys\nwhile True: sys.{stream}.write('x' * 1000)"
    with pytest.raises(ProcessOutputTooLarge, match="1000000 bytes"):
        await python(program)
    assert (await python(f"import sys; sys.{stream}.write('x' * 1000000)")).returncode == 0


async def test_a_program_or_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ProcessNotFound, match="no-such-program"):
        await run(["no-such-program"], env=ENV, timeout_s=1, max_output_bytes=1)
    with pytest.raises(ProcessNotFound):
        await python("pass", cwd=tmp_path / "nowhere")
    with pytest.raises(ProcessNotFound):
        await run(["a\0b"], env=ENV, timeout_s=1, max_output_bytes=1)


GRANDCHILD = (
    "import subprocess, sys, time\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(p.pid, file=open({path!r}, 'w'), flush=True)\n"
)


@pytest.mark.parametrize("ending", ["time.sleep(60)", "sys.exit()"])
async def test_a_timeout_kills_what_the_child_started_even_if_the_child_has_ended(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "pid"
    # A busy machine may not have started it within the first of these.
    for timeout_s in (1, 5, 25):
        with pytest.raises(ProcessTimeout, match=f"within {timeout_s} s"):
            await python(GRANDCHILD.format(path=str(path)) + ending, timeout_s=timeout_s)
        if written(path):
            break
    assert written(path)
    await until(lambda: not alive(written(path)))


async def test_cancelling_kills_the_child_and_what_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    task = asyncio.create_task(python(GRANDCHILD.format(path=str(path)) + "time.sleep(60)"))
    await until(lambda: written(path) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(written(path)))


async def test_a_child_that_is_held_can_be_talked_to_hung_up_on_and_killed() -> None:
    child = await ChildProcess.start(["/bin/sh", "-c", "read x; echo got $x; read y; exit 7"], env=ENV)
    child.stdin.write(b"it\n")
    assert await child.stdout.readline() == b"got it\n"
    assert child.returncode is None
    child.hang_up()
    assert await child.wait() == 7
    child.close_pipes()
    child = await ChildProcess.start(["/bin/sh", "-c", "while :; do sleep 1; done"], env=ENV)
    await child.kill()
    assert child.returncode == -9


async def test_a_kill_that_is_cancelled_has_waited_for_the_child_all_the_same() -> None:
    child = await ChildProcess.start(["sleep", "60"], env=ENV)
    killing = asyncio.create_task(child.kill())
    await asyncio.sleep(0)
    killing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await killing
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("turns", range(12))
async def test_a_start_that_is_cancelled_again_and_again_leaves_no_child(turns: int) -> None:
    before = children()
    starting = asyncio.create_task(ChildProcess.start(["sleep", "60"], env=ENV))
    for _ in range(turns):
        await asyncio.sleep(0)
    cancelled = starting.cancel()
    while not starting.done():
        await asyncio.sleep(0)
        starting.cancel()
    if cancelled:
        assert starting.cancelled()
        assert children() <= before
    else:
        await starting.result().kill()


async def test_a_start_that_fails_while_it_is_cancelled_is_cancelled() -> None:
    starting = asyncio.create_task(ChildProcess.start(["no-such-program"], env=ENV))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


def children() -> set[str]:
    """Return the numbers of this process's children that were not collected."""
    return {pid for each in Path("/proc/self/task").glob("*/children") for pid in each.read_text().split()}
