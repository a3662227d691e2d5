"""`drover top`: what the farm does now, drawn again every second on a terminal and printed once elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len

from coordinator.api.flakes import worker_sentence
from coordinator.api.models import TransferView
from coordinator.api.questions import ActivityView, QueueView, SlotView, WorkerActivityView
from coordinator.cli import exit_status
from coordinator.cli.eta import rate
from coordinator.cli.lines import Line, cell, cut, width_of
from coordinator.cli.live import SIGNS, Window
from coordinator.cli.printing import size
from coordinator.cli.rendering import counted, duration, eta_sentence, one_line
from coordinator.cli.screen import Screen, resizing
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import UnreachableError

#: Seconds between two looks.
LOOK_EVERY_S: Final = 1.0
#: Queues that are shown, and the longest line for an output that is no terminal.
QUEUES: Final = 6
#: Running submissions that are shown, and their part of the window's height.
RUNNING: Final = 6
RUNNING_PART: Final = 8
#: One queue is shown for so many rows of a window.
QUEUES_PART: Final = 5
_UNBOUNDED: Final = Window(200, 10_000)
_ENDS: Final = (signal.SIGINT, signal.SIGTERM)
#: Workers that are said to fail more than others.
BLAMED: Final = 3
#: Cells that the longest name of a step takes.
NAME_CELLS: Final = 40
#: Stages in which bytes are on their way.
_MOVES: Final = frozenset({"fetching", "uploading"})
#: Stages in which a lease has a slot.
_IN_SLOT: Final = frozenset({"fetching", "building"})


async def top(client: ApiClient, screen: Screen) -> int:
    """Show the farm until Ctrl-C, or once where there is no terminal."""
    activity = await client.activity()
    if not screen.live:
        screen.block(farm_lines(activity, time.time(), _UNBOUNDED))
        return exit_status.OK
    ended, awake = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        ended.set()
        awake.set()

    for each in _ENDS:
        loop.add_signal_handler(each, end)
    lines: list[Line] = []
    trouble = ""
    try:
        with resizing(awake.set):
            while not ended.is_set():
                lines = _frame(activity, trouble, screen.window())
                screen.draw(lines)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await awake.wait()
                awake.clear()
                try:
                    activity, trouble = await client.activity(), ""
                except UnreachableError as error:
                    trouble = f"{error}; this is how it was"
    finally:
        screen.undraw()
        screen.block(lines)
        for each in _ENDS:
            loop.remove_signal_handler(each)
    return exit_status.OK


def _frame(activity: ActivityView, trouble: str, window: Window) -> list[Line]:
    """Return the farm, below a line that says that it does not answer, if so."""
    if not trouble:
        return farm_lines(activity, time.time(), window)
    lines = farm_lines(activity, time.time(), Window(window.width, window.height - 1))
    return [cut([(one_line(trouble), "bold red")], window.width), *lines]


def farm_lines(activity: ActivityView, now: float, window: Window) -> list[Line]:
    """Return the farm, no wider and lower than the window: totals, troubles, workers with their steps, queues."""
    blamed = [(worker, note) for worker in activity.workers if (note := worker_sentence(worker.record))]
    notes = [*activity.troubles, *(f"{worker.name}: {note}" for worker, note in blamed[:BLAMED])]
    head = [_totals(activity, window.width), *([("! " + one_line(note), "yellow")] for note in notes)]
    head += _running_lines(activity, now, min(RUNNING, window.height // RUNNING_PART), window.width)
    queues = _queue_lines(activity.queues, min(QUEUES, max(1, window.height // QUEUES_PART)), window.width)
    room = max(1, window.height - 1 - len(head) - len(queues))
    lines = [*head, *_worker_lines(activity, now, room, window.width), *queues]
    return [cut(line, window.width) for line in lines[: max(1, window.height - 1)]]


def _totals(activity: ActivityView, width: int) -> Line:
    slots = sum(worker.slots for worker in activity.workers)
    busy = sum(_busy(worker) for worker in activity.workers)
    steps = activity.steps
    words = [
        counted(activity.worker_count, "worker"),
        f"{busy} of {slots} slots busy",
        f"{counted(activity.submissions.get('running', 0), 'submission')} running",
        f"{counted(steps.get('running', 0) + steps.get('publishing', 0), 'step')} running",
        f"{steps.get('ready', 0)} ready",
        f"{steps.get('waiting', 0)} waiting",
    ]
    if len(", ".join(words)) > width:
        # What counts most, in few words.
        words = [f"{busy}/{slots} slots busy", f"{steps.get('ready', 0)} ready", f"{steps.get('waiting', 0)} waiting"]
    return [(", ".join(words), "bold")]


def _running_lines(activity: ActivityView, now: float, room: int, width: int) -> list[Line]:
    """Return the throughput, and the newest submissions that run, with their ends."""
    lines: list[Line] = []
    if activity.throughput is not None and room:
        lines.append([(rate(activity.throughput), "")])
    total = activity.submissions.get("running", len(activity.running))
    for each in activity.running[:room]:
        end = eta_sentence(each.eta, now) if each.eta is not None else "its end is not worked out yet"
        name = f"{each.id} {one_line(each.label)}".rstrip()
        lines.append(
            [(cell(name, min(NAME_CELLS, width // 3)), "bold"), (f"  {each.done}/{each.total}  ", "green"), (end, "")]
        )
    if room and total > room:
        lines.append([(f"and {counted(total - room, 'more submission')}", "dim")])
    return lines


def _busy(worker: WorkerActivityView) -> int:
    return min(worker.slots, sum(1 for lease in worker.leases if lease.stage in _IN_SLOT))


def _worker_lines(activity: ActivityView, now: float, room: int, window_width: int) -> list[Line]:
    """Return each worker with as many of its steps as there is room for, the same number for all."""
    workers = activity.workers
    each = max((len(worker.leases) for worker in workers), default=0)
    while each > 1 and sum(_height(worker, each) for worker in workers) > room:
        each -= 1
    shown = workers if sum(_height(worker, each) for worker in workers) <= room else workers[: max(0, room - 1)]
    width = max((len(one_line(worker.name)) for worker in shown), default=0)
    names = [cell_len(one_line(lease.name)) for worker in shown for lease in worker.leases]
    states = max((len(_state(worker)) for worker in shown), default=0)
    widths = (width, states, min(NAME_CELLS, window_width // 3, max(names, default=0)))
    lines = [line for worker in shown for line in _worker(worker, now, each, widths)]
    if activity.worker_count > len(shown):
        lines.append([(f"and {counted(activity.worker_count - len(shown), 'more worker')}", "dim")])
    return lines


def _height(worker: WorkerActivityView, each: int) -> int:
    return max(1, min(len(worker.leases), each))


def _state(worker: WorkerActivityView) -> str:
    return "" if worker.state == "online" else f"{worker.state} "


def _worker(worker: WorkerActivityView, now: float, each: int, widths: tuple[int, int, int]) -> list[Line]:
    width, state_width, name_width = widths
    leases = sorted(worker.leases, key=lambda lease: (lease.stage not in _IN_SLOT, lease.started_at or now, lease.step))
    state = _state(worker)
    reason = one_line(worker.reason)
    head: Line = [
        (cell(one_line(worker.name), width), "cyan"),
        (f"  {_busy(worker):>3}/{worker.slots:<3} ", ""),
        (cell(state, state_width), "yellow"),
    ]
    if not leases:
        return [[*head, (reason or ("" if state else "idle"), "dim")]]
    indent: Line = [(" " * (width + 10 + state_width), "")]
    lines = [
        [*(indent if number else head), *_lease(lease, now, name_width)]
        for number, lease in enumerate(leases[: max(1, each)])
    ]
    if worker.lease_count > len(lines):
        lines[-1].append((f"  and {worker.lease_count - len(lines)} more", "dim"))
    return lines


def _lease(lease: SlotView, now: float, width: int) -> Line:
    sign, colour = SIGNS.get(lease.stage, SIGNS["queued"])
    age = duration(now - lease.started_at) if lease.started_at else ""
    doing = one_line(lease.phase) if lease.phase and lease.stage == "building" else one_line(lease.stage)
    if lease.transfer is not None and lease.stage in _MOVES:
        doing = _moved(lease.transfer)
    return [(sign, colour), (cell(one_line(lease.name), width), "bold"), (f"  {age:>6}  ", ""), (doing, "dim")]


def _moved(transfer: TransferView) -> str:
    """Return how far a transfer is, the most telling first because a narrow window cuts the rest."""
    done, whole = transfer.done_bytes, transfer.size_bytes
    return f"{min(100, 100 * done // whole)} % of {size(whole)}" if whole else size(done)


def _queue_lines(queues: Sequence[QueueView], most: int, width: int) -> list[Line]:
    """Return each queue with what holds it, in two lines where one is too narrow."""
    lines: list[Line] = []
    for queue in queues[:most]:
        needs = f" with {', '.join(map(one_line, queue.features))}" if queue.features else ""
        heading = f"{queue.count} ready for {one_line(queue.system)}{needs}"
        line: Line = [(f"{heading}: ", "blue"), (one_line(queue.reason), "")]
        lines += [line] if width_of(line) <= width else [[(f"{heading}:", "blue")], [("  ", ""), line[1]]]
    if len(queues) > most:
        lines.append([(f"and {counted(len(queues) - most, 'more queue')}", "dim")])
    return lines
