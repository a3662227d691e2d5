"""Timer slack of a thread: for how long the system may put off the ends of its timed waits, to have several at once.

Ray's programs have a dozen threads each that look four times a second for work which wakes them anyway, and no setting
for it. What waits with slack looks as often as the slack lets it. Only the ends of waits come later: what is waited for
wakes at once, and so do Ray's own timers, which are none of these waits.

Threads and programs inherit the slack of the thread that starts them. A system without it changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

#: Slack of Ray's threads, in nanoseconds: a time limit of a call between nodes ends later by at most this.
RAY_SLACK_NS: Final = 500_000_000
#: Slack of a thread as Linux has it, in nanoseconds: for what builds inherit.
USUAL_SLACK_NS: Final = 50_000


@contextmanager
def with_ray_slack() -> Iterator[None]:
    """Have what this thread starts inherit Ray's slack for as long as the block runs."""
    before_ns = timer_slack_ns()
    set_timer_slack(RAY_SLACK_NS)
    try:
        yield
    finally:
        set_timer_slack(before_ns)


def timer_slack_ns(thread: int | None = None) -> int:
    """Return the slack of a thread, the calling one where none is named; the usual one where the system tells none."""
    try:
        return int(_file(thread).read_text())
    except (OSError, ValueError):
        return USUAL_SLACK_NS


def set_timer_slack(slack_ns: int) -> None:
    """Set the slack of the calling thread, where the system lets it."""
    with suppress(OSError):
        _file(None).write_text(str(slack_ns))


def _file(thread: int | None) -> Path:
    return Path(f"/proc/{threading.get_native_id() if thread is None else thread}/timerslack_ns")
