"""Somebody collects garbage in the workers' stores, again and again, with Nix's own collector."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from infra.process_tree import live_processes
from scheduler.model import FailureKind
from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.farm import nix_store
from tests.support.processes import ancestors, daemons_below, processes_with

pytestmark = pytest.mark.e2e

WAIT_FOR_GO = "while [ ! -e /tally/go ]; do /bin/busybox sleep 0.1; done"
#: Looks at its inputs after the collector has had time for some rounds.
LOOK = "/bin/busybox sleep 1; /bin/busybox cat ${toString inputs} > /dev/null || exit 1"


def test_a_graph_is_built_while_collectors_run(one: FarmUnderFault) -> None:
    file = one.graph(
        f"""
        look = name: inputs: step name inputs "{LOOK}";
        layer = name: inputs: map (n: look "${{name}}-${{toString n}}" inputs) (range 1 3);
        top = look "top" (layer "c" (layer "b" (layer "a" [ ])));
        """
    )
    with collectors(one, "left", "right"):
        view = one.ended(one.submit(file, "top"))
    assert view["state"] == "succeeded", one.farm.api(f"submissions/{view['id']}/steps")
    one.can_be_fetched(view)
    assert {one.runs()[step["name"]] for step in one.farm.api(f"submissions/{view['id']}/steps")} == {1}
    nothing_failed_that_had_begun(one)


def test_an_input_that_was_collected_between_is_fetched_again(one: FarmUnderFault) -> None:
    assert one.farm.drover("drain", "right").returncode == 0
    file = one.graph('below = step "below" [ ] ":"; above = step "above" [ below ] "/bin/busybox cat ${below}";')
    [root] = one.ended(one.submit(file, "below"))["roots"]
    below = root["outputs"]["out"]
    assert physical(one, "left", below).exists()
    kill_idle_daemons(one, "left")
    collect(one, "left")
    assert not physical(one, "left", below).exists()
    view = one.ended(one.submit(file, "above"))
    assert view["state"] == "succeeded", one.farm.api(f"submissions/{view['id']}/steps")
    assert one.runs()["below"] == 1
    one.can_be_fetched(view)
    nothing_failed_that_had_begun(one)


def test_a_running_build_keeps_its_inputs_although_the_daemon_that_rooted_them_dies(one: FarmUnderFault) -> None:
    # Built on the other machine, so that no connection keeps it on this one for having built it.
    file = one.graph(
        f"""
        base = step "base" [ ] ":";
        kept = step "kept" [ base ] "{WAIT_FOR_GO}; /bin/busybox cat ${{base}}";
        """
    )
    assert one.farm.drover("drain", "left").returncode == 0
    assert one.farm.drover("drain", "right", "--off").returncode == 0
    [root] = one.ended(one.submit(file, "base"))["roots"]
    base = physical(one, "left", root["outputs"]["out"])
    assert one.farm.drover("drain", "left", "--off").returncode == 0
    assert one.farm.drover("drain", "right").returncode == 0
    submission = one.submit(file, "kept")
    one.until(lambda: one.runs()["kept"])
    [out] = [s["outputs"]["out"] for s in one.farm.api(f"submissions/{submission}/steps") if s["name"] == "kept"]
    kill_idle_daemons(one, "left", but=processes_with(out)[0])
    collect(one, "left")
    assert base.exists()
    (one.tally / "go").touch()
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.api(f"submissions/{submission}/steps")
    assert one.runs()["kept"] == 1
    nothing_failed_that_had_begun(one)


def test_an_input_that_is_torn_out_is_fetched_again(one: FarmUnderFault) -> None:
    file = one.graph(
        """
        torn = step "torn" [ ] ":";
        before = step "before" [ torn ] ":";
        after = step "after" [ torn ] "/bin/busybox cat ${torn}";
        """
    )
    assert one.farm.drover("drain", "right").returncode == 0
    [root] = one.ended(one.submit(file, "torn"))["roots"]
    torn = root["outputs"]["out"]
    # From now on the worker takes it for valid without asking its store.
    assert one.ended(one.submit(file, "before"))["state"] == "succeeded"
    # What says that connections keep anything.
    for roots in (store(one, "left") / "nix/var/nix/temproots").iterdir():
        roots.unlink(missing_ok=True)
    collect(one, "left")
    assert not physical(one, "left", torn).exists()
    view = one.ended(one.submit(file, "after"))
    assert view["state"] == "succeeded", one.farm.api(f"submissions/{view['id']}/steps")
    one.can_be_fetched(view)
    assert FailureKind.INPUT_MISSING in [kind for step, kind in revoked(one) if step == "after"]
    nothing_failed_that_had_begun(one)


def revoked(one: FarmUnderFault) -> list[tuple[str, FailureKind]]:
    return [(fact.lease.step.partition("-")[2], fact.failure.kind) for fact in one.ended_early()]


def nothing_failed_that_had_begun(one: FarmUnderFault) -> None:
    # A collector that ends at the wrong moment can make Nix 2.8 refuse a build before it begins, on record.
    before_it_began = {FailureKind.RETURNED, FailureKind.INPUT_MISSING, FailureKind.INFRASTRUCTURE}
    assert {kind for _, kind in revoked(one)} <= before_it_began, revoked(one)


def kill_idle_daemons(one: FarmUnderFault, worker: str, but: int | None = None) -> None:
    """End the connections that keep paths alive, all but the one that a builder hangs on."""
    above = set(ancestors(but)) if but else set()
    idle = {pid for pid in daemons_below(one.leader(f"worker-{worker}")) if pid not in above}
    for pid in idle:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # What they keep alive is kept until they have ended, for which a killed process waits where the machine is busy.
    one.until(lambda: idle.isdisjoint(live_processes()))


@contextmanager
def collectors(one: FarmUnderFault, *workers: str) -> Iterator[None]:
    """Collect garbage in the workers' stores without a pause, in turn."""
    enough = threading.Event()

    def run() -> None:
        while not enough.is_set():
            for worker in workers:
                collect(one, worker)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def collect(one: FarmUnderFault, worker: str) -> None:
    done = nix_store(store(one, worker), "--gc")
    assert done.returncode == 0, done.stderr


def store(one: FarmUnderFault, worker: str) -> Path:
    return one.farm.state / "workers" / worker / "store"


def physical(one: FarmUnderFault, worker: str, path: str) -> Path:
    return store(one, worker) / path.removeprefix("/")
