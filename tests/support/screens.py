"""A terminal in memory, and scripted events of a submission for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pyte

from coordinator.api.estimates import RunningView, ThroughputBar, ThroughputView
from coordinator.api.models import (
    Counts,
    CountsChanged,
    EtaView,
    FailureView,
    RootView,
    Snapshot,
    StepChanged,
    StepStatus,
    StepTransfer,
    StepView,
    SubmissionState,
    SubmissionView,
    TransfersChanged,
    TransferView,
    TreeNode,
    WatchEvent,
)
from coordinator.api.questions import ActivityView, QueueView, SlotView, WorkerActivityView
from coordinator.cli.follow import Follower
from coordinator.cli.live import Window, live_lines
from coordinator.cli.progress import Progress
from coordinator.cli.screen import Screen

NOW = 1_000_100.0


class Terminal:
    """A terminal's window and all that scrolled out of it. It is a stream: `Screen` writes to it."""

    encoding = "utf-8"

    def __init__(self, width: int, height: int) -> None:
        self.emulated = pyte.HistoryScreen(width, height, history=10_000, ratio=0.5)
        # A terminal's driver returns the carriage at a newline.
        self.emulated.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.emulated)
        self.written = ""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("a terminal in memory has no descriptor")

    def write(self, text: str) -> int:
        self.written += text
        self._stream.feed(text)
        return len(text)

    def flush(self) -> None:
        pass

    def scrolled(self) -> list[str]:
        """Return the lines that left the window upwards."""
        lines = self.emulated.history.top
        width = self.emulated.columns
        return ["".join(line[column].data for column in range(width)).rstrip() for line in lines]

    def shown(self) -> list[str]:
        """Return the lines in the window, without the empty lines below it."""
        lines = [line.rstrip() for line in self.emulated.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines


class Scripted:
    """A follower on a terminal in memory, driven by events and a clock that the test moves."""

    def __init__(self, width: int = 80, height: int = 24, on: Screen | None = None, **environment: str) -> None:
        """`on` is a screen of the test's own, in the place of the terminal in memory."""
        self.terminal = Terminal(width, height)
        screen = on or _Sized(self.terminal, {"TERM": "xterm-256color", **environment})
        self.screen = screen
        self.progress = Progress()
        self.follower = Follower(screen, self.progress)
        self.now = NOW

    def see(self, *events: WatchEvent, seconds: float = 1.0) -> None:
        """Take events in and draw a frame, some seconds later."""
        self.now += seconds
        for event in events:
            for news, step in self.progress.apply(event):
                self.follower.tell(news, step)
        self.follower.tell_built()
        self.screen.draw(live_lines(self.progress, self.now, self.screen.window()))

    def resize(self, width: int, height: int) -> None:
        self.terminal.emulated.resize(height, width)


class _Sized(Screen):
    """A screen that asks the terminal in memory for its size."""

    def __init__(self, terminal: Terminal, environment: dict[str, str]) -> None:
        super().__init__(terminal, environment)  # type: ignore[arg-type]
        self._terminal = terminal

    def window(self) -> Window:
        return Window(self._terminal.emulated.columns, self._terminal.emulated.lines)


def step(name: str, state: StepStatus = StepStatus.RUNNING, **more: Any) -> StepView:
    given: dict[str, Any] = {
        "key": f"{'0' * 32}-{name}",
        "name": name,
        "system": "x86_64-linux",
        "features": (),
        "drv": f"/nix/store/{'1' * 32}-{name}.drv",
        "outputs": {"out": f"/nix/store/{'0' * 32}-{name}"},
        "state": state,
        "attempt": 1,
        "worker": "native",
        "started_at": NOW - 62,
        "stage": "building",
    }
    return StepView(**{**given, **more})


def failed(name: str, **more: Any) -> StepView:
    given: dict[str, Any] = {
        "ended_at": NOW,
        "failure": FailureView(kind="permanent", message="builder failed with exit code 1"),
        "log_tail": "configuring\nno such file\n",
    }
    return step(name, StepStatus.FAILED, **{**given, **more})


def place(name: str, above: str = "", pending: int = 0) -> TreeNode:
    upper = f"{'0' * 32}-{above}" if above else ""
    return TreeNode(key=f"{'0' * 32}-{name}", name=name, above=upper, pending=pending)


def snapshot(counts: Counts, *steps: StepView, tree: Sequence[TreeNode] = ()) -> Snapshot:
    root = RootView(
        attr="hello", drv="/nix/store/x.drv", step=f"{'0' * 32}-hello", state=StepStatus.WAITING, outputs={}
    )
    submission = SubmissionView(
        id="abc123",
        label="",
        state=SubmissionState.RUNNING,
        created_at=NOW - 100,
        roots=(root,),
        counts=counts,
    )
    return Snapshot(submission=submission, steps=steps, tree=tuple(tree))


def counts(
    tree: Sequence[TreeNode] = (),
    stuck: Sequence[str] = (),
    uploaded: int = 0,
    eta: EtaView | None = None,
    **numbers: int,
) -> CountsChanged:
    return CountsChanged(
        counts=Counts(**numbers), uploaded_bytes=uploaded, stuck=tuple(stuck), tree=tuple(tree), eta=eta
    )


def moving(
    name: str, direction: Literal["fetch", "upload"], path: str, done_bytes: int, size_bytes: int | None
) -> TransfersChanged:
    transfer = TransferView(
        direction=direction,
        path=f"/nix/store/{'2' * 32}-{path}",
        source="objects",
        done_bytes=done_bytes,
        size_bytes=size_bytes,
    )
    return TransfersChanged(transfers=(StepTransfer(key=f"{'0' * 32}-{name}", transfer=transfer),))


def changed(*steps: StepView) -> list[StepChanged]:
    return [StepChanged(step=each) for each in steps]


def calm(watched: Scripted) -> None:
    """Little runs: all of the forest has room."""
    watched.see(
        snapshot(
            Counts(total=9, held=2, running=3, waiting=4),
            step("zlib-1.3", started_at=NOW - 12, phase="buildPhase"),
            step("openssl-3.3", started_at=NOW - 62, worker="ec2-large", phase="checkPhase", usual_s=58.4),
            step("llvm-18", started_at=NOW - 4, stage="fetching", usual_s=3600.0),
            tree=(
                place("zlib-1.3", "curl-8.9"),
                place("openssl-3.3", "curl-8.9"),
                place("curl-8.9", "git-2.46", 2),
                place("git-2.46", "hello", 1),
                place("hello", "", 2),
                place("llvm-18", "clang-18"),
                place("clang-18", "hello", 1),
            ),
        )
    )
    zlib = step("zlib-1.3", StepStatus.DONE, started_at=NOW - 12, ended_at=NOW + 1)
    watched.see(
        moving("llvm-18", "fetch", "gcc-14.2-lib", 12 << 20, 30 << 20),
        *changed(zlib),
        counts(
            total=9, held=2, done=1, running=2, waiting=4, uploaded=1536 * 1024, tree=[place("curl-8.9", "git-2.46", 1)]
        ),
    )


def failing(watched: Scripted) -> None:
    """A step failed, another waits for a worker that is not there, one is emulated."""
    calm(watched)
    mac = step("mac-thing", system="aarch64-darwin", worker="mac", emulated=True, started_at=NOW - 5, stage="uploading")
    watched.see(
        *changed(failed("openssl-3.3", worker="ec2-large"), mac),
        counts(
            total=9, held=2, done=1, running=2, ready=1, doomed=2, failed=1,
            stuck=["1 step waits: no worker offers riscv64-linux"],
            tree=[place("mac-thing", "hello"), place("hello", "", 3)],
            eta=EtaView(
                at=NOW, sooner_at=NOW + 3600, bound="no_worker", because="no worker offers riscv64-linux", steps=4
            ),
        ),
        moving("mac-thing", "upload", "mac-thing", 900 << 10, None),
    )  # fmt: skip


def crowded(watched: Scripted) -> None:
    """300 builds run on 12 workers, some of them with long names."""
    steps = [
        step(
            f"python3.12-package-number-{number}-1.{number}",
            worker=f"builder-{number % 12}",
            started_at=NOW - number,
            stage=("building", "building", "fetching", "uploading", "queued")[number % 5],
            phase="installCheckPhase" if number % 5 == 0 else "",
        )
        for number in range(300)
    ]
    tree = [place(each.name, "hello") for each in steps]
    watched.see(
        snapshot(
            Counts(total=90_000, held=5, running=300, waiting=89_695), *steps, tree=[*tree, place("hello", "", 300)]
        )
    )
    done = [replace(each, state=StepStatus.DONE, ended_at=NOW) for each in steps[:40]]
    eta = EtaView(
        at=NOW, sooner_at=NOW + 7200, later_at=NOW + 10800, bound="capacity", steps=89_955, unknown=70,
        because="48 slots for x86_64-linux and 89955 steps for them",
    )  # fmt: skip
    watched.see(*changed(*done), counts(total=90_000, held=5, done=40, running=260, waiting=89_695, eta=eta))


def busy_farm() -> ActivityView:
    """Return a farm of 12 workers with 300 builds, one of them quarantined, and what waits."""

    def lease(number: int) -> SlotView:
        stage = ("building", "building", "fetching", "uploading", "queued")[number % 5]
        name = f"python3.12-package-number-{number}-1.{number}"
        transfer = None
        if stage == "fetching":
            transfer = TransferView(
                direction="fetch", path=f"/nix/store/{'0' * 32}-input-{number}", source="objects",
                done_bytes=number << 20, size_bytes=900 << 20,
            )  # fmt: skip
        return SlotView(
            step=f"k{number}", name=name, stage=stage, phase="installCheckPhase", started_at=NOW - number,
            transfer=transfer,
        )  # fmt: skip

    workers = tuple(
        WorkerActivityView(
            name=f"builder-{number}",
            state="quarantined" if number == 7 else "online",
            slots=32,
            leases=tuple(lease(each) for each in range(300) if each % 12 == number),
            lease_count=25,
            reason="its disk is full" if number == 7 else "",
        )
        for number in range(12)
    )
    queues = (
        QueueView(system="x86_64-linux", features=("kvm",), count=1200, reason="all 12 workers that could are full"),
        QueueView(system="riscv64-linux", features=(), count=3, reason="no worker offers the system riscv64-linux"),
    )
    eta = EtaView(at=NOW, sooner_at=NOW + 600, later_at=NOW + 900, bound="capacity", because="384 slots", steps=6)
    return ActivityView(
        troubles=("builder-7 has 200 MB left",),
        steps={"running": 300, "ready": 1203, "waiting": 88_000},
        submissions={"running": 2},
        workers=workers,
        worker_count=12,
        queues=queues,
        running=(
            RunningView(id="4f086d30cb", label="nightly", done=300, total=90_000, created_at=NOW - 600, eta=eta),
            RunningView(id="515b8f2be1", label="", done=1, total=9, created_at=NOW - 60, eta=None),
        ),
        throughput=ThroughputView(until=NOW, every_s=60.0, bars=(ThroughputBar(finished=7, failed=1),) * 60),
    )
