"""`./run fleet`: a whole farm on this machine for people who try, with the services that a large one has.

It stays until Ctrl-C, a closed terminal or SIGTERM, and then leaves nothing behind; `--check` judges it and stops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fleet.check import build, judge
from tests.fleet.parts import Fleet, fleet, workers_of
from tests.fleet.place import FleetError, clear_dead, place

#: Linux workers beside the emulated Mac; each takes some 200 MB.
WORKERS = 3
MAX_WORKERS = 32
EXIT_INTERRUPTED = 130


def say(text: str, *, end: str = "\n") -> None:
    """Print a line, or nothing more once the terminal is gone."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End the fleet as Ctrl-C does."""
    raise KeyboardInterrupt


def run(root: Path, workers: int, *, check: bool) -> None:
    """Start the fleet, build, and stay; with `check` judge and return. Raises `FleetError`."""
    with fleet(root, workers_of(workers), say) as running:
        try:
            say("\nbuilding a small graph on both systems")
            result = build(running)
            if check:
                say("\nchecks")
                for sentence in judge(running, result, root / "plain-client"):
                    say(f"  {sentence}")
            else:
                _show(running, result)
                _stay(running)
        finally:
            say("\nstopping")


def _show(running: Fleet, result: dict[str, Any]) -> None:
    farm = running.farm
    say(
        f"""
open in a browser
  pages        {farm.url}/
  the build    {farm.url}/submissions/{result["id"]}
  their token  {farm.token}
  metrics      {farm.url}/metrics
  Prometheus   {running.targets_page}

in another terminal
  export DROVER_URL={farm.url} DROVER_TOKEN_FILE={farm.secrets / "api-token"}
  ./run drover top
  ./run drover build FILE -A ATTR

the coordinator's log is {farm.log_path}
Ctrl-C stops all of it and removes {farm.root}"""
    )
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(f"{farm.url}/")


def _stay(running: Fleet) -> None:
    """Return never; raises `FleetError` where the coordinator ends by itself."""
    status = running.farm.ended()
    raise FleetError(f"the coordinator ended with status {status}: {running.farm.last_words}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="./run fleet", description=__doc__)
    parser.add_argument("--check", action="store_true", help="start, build, judge, stop")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help="Linux workers beside the Mac (3)")
    options = parser.parse_args(words)
    if not 1 <= options.workers <= MAX_WORKERS:
        parser.error(f"--workers wants 1 to {MAX_WORKERS}")
    if not Path("/proc/self/environ").exists():
        parser.error("a local fleet needs Linux; `./run demo` runs everywhere")
    for program in ("prometheus", "setpriv"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    for dead in clear_dead():
        say(f"removed {dead}, which a fleet left that was killed")
    status = 0
    try:
        with place() as root:
            say(f"starting a fleet in {root}; Ctrl-C ends it")
            try:
                run(root, options.workers, check=options.check)
            except KeyboardInterrupt:
                status = EXIT_INTERRUPTED if options.check else 0
    except (FleetError, subprocess.TimeoutExpired) as error:
        say(f"fleet: {error}")
        return 1
    say("stopped; nothing is left of it")
    return status


if __name__ == "__main__":
    sys.exit(main())
