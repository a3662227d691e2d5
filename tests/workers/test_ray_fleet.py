"""Agents over Ray: found, greeted, given builds, lost and found again.

A real head, three real nodes on one machine, real builds. The nodes are shared by the module, so a test that hurts one
brings its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from infra.objects.store import open_object_store
from infra.process_tree import process_tree
from tests.support.patience import PATIENCE_S
from workers.agent.settings import native_system
from workers.ray_transport.access import make_token_file
from workers.ray_transport.driver import ActorCalls
from workers.ray_transport.fleet import REST_AFTER_S, RESTS, RayFleet
from workers.ray_transport.nodes import WORKER_LABEL, RayHead, RayJoiningNode, RayWorkerNode
from workers.ray_transport.offers import SLOT, NodeBundle, labels_of
from workers.ray_transport.signal_looks import QUIET_S, SignalLooks
from workers.ray_transport.timer_slack import USUAL_SLACK_NS
from workers.wire.fleet import FleetError, FleetEvent, WorkerConnected, WorkerGone, WorkerSilent, WorkerSpoke
from workers.wire.messages import Failed, FarmInfo, Hello, Lease, LogChunk, Report, Succeeded

from .conftest import drv, order

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Heard:
    """Everything that a fleet has sent, and a way to wait for more."""

    def __init__(self) -> None:
        self.events: list[FleetEvent] = []
        self.reports: dict[str, tuple[str, Report]] = {}
        self.logs: dict[str, bytes] = {}
        self._more = asyncio.Condition()

    async def sink(self, event: FleetEvent) -> None:
        async with self._more:
            self.events.append(event)
            if isinstance(event, WorkerSpoke):
                for sent in event.batch.events:
                    if isinstance(sent, Report):
                        self.reports[sent.step] = (event.worker, sent)
                    elif isinstance(sent, LogChunk):
                        self.logs[sent.step] = self.logs.get(sent.step, b"") + sent.data
            self._more.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self._more:
            await self._more.wait_for(condition)

    def hellos(self, worker: str) -> list[Hello]:
        return [e.hello for e in self.events if isinstance(e, WorkerConnected) and e.hello.worker == worker]

    def drains(self, worker: str) -> bool:
        said = [e.batch.draining for e in self.events if isinstance(e, WorkerSpoke) and e.worker == worker]
        return bool(said) and said[-1]

    def losses(self, worker: str) -> list[WorkerGone]:
        return [e for e in self.events if isinstance(e, WorkerGone) and e.worker == worker]


class Site:
    """The machine room of this module."""

    def __init__(self, root: Path, token: Path, farm: FarmInfo, head: RayHead) -> None:
        #: The node of whoever runs a fleet here.
        self.own = RayJoiningNode(head=head.address, token_file=token, base_dir=root)
        self.root = root
        self.token = token
        self.farm = farm
        self.head = head

    def node(self, name: str, machine: str = "") -> RayWorkerNode:
        """A node that is not started; on another `machine` it shares nothing with those of its name."""
        place = self.root / (machine or name)
        settings = Path(f"{place}.json")
        places = {"state_dir": str(place / "state"), "store": str(place / "store")}
        settings.write_text(json.dumps({"name": name, "slots": 1, **places}))
        return RayWorkerNode(
            name=name, head=self.head.address, token_file=self.token, settings_file=settings, base_dir=self.root
        )

    @asynccontextmanager
    async def fleet(self, rest_after_s: float = REST_AFTER_S) -> AsyncIterator[tuple[RayFleet, Heard]]:
        heard = Heard()
        fleet = RayFleet(token_file=self.token, farm=self.farm, rest_after_s=rest_after_s)
        async with fleet.connected(self.head.address, self.own.directory):
            serving = asyncio.create_task(fleet.run(heard.sink))
            try:
                yield fleet, heard
            finally:
                serving.cancel()
                await asyncio.wait((serving,))


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A short path, for Ray's sockets; and stores are read-only."""
    made = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    yield made
    for directory, _, _ in os.walk(made):
        Path(directory).chmod(0o755)
    shutil.rmtree(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(root: Path) -> AsyncIterator[Site]:
    token = make_token_file(root / "ray-token")
    objects = (root / "objects").as_uri()
    await open_object_store(objects).write_marker()
    # Nothing here has inputs, so nobody asks the cache.
    farm = FarmInfo(cache_url="http://127.0.0.1:9/cache", public_keys=(), object_store_url=objects)
    async with RayHead(token_file=token, base_dir=root) as head:
        site = Site(root, token, farm, head)
        async with AsyncExitStack() as nodes:
            async with asyncio.TaskGroup() as starting:
                for each in (site.own, *map(site.node, "abc")):
                    starting.create_task(nodes.enter_async_context(each))
            yield site
    assert left_behind(root) == {}


def left_behind(root: Path) -> dict[int, str]:
    """Command lines of live processes that name the directory of this module, by process."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(root) in line:
            found[int(entry.name)] = line
    return found


async def test_every_labelled_node_gets_one_agent_which_builds_and_reports(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: all(heard.hellos(name) for name in "abc"))
        assert set(fleet.workers) == {"a", "b", "c"}
        orders = {name: order(drv(f"on-{name}", f"echo here is {name}; echo {name} > $out")) for name in "abc"}
        for name, one in orders.items():
            await fleet.start_many(name, [one])
            await fleet.start_many(name, [one])
        await heard.until(lambda: len(heard.reports) == 3)
        for name, one in orders.items():
            worker, report = heard.reports[one.step]
            assert worker == name
            assert isinstance(report.result, Succeeded), report.result
            assert heard.logs[one.step] == f"here is {name}\n".encode()


async def test_a_build_cannot_see_the_token_nor_learn_where_it_lies(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("a")))
        script = f"if [ -e {site.token} ]; then echo seen; fi; set; read -r all < /proc/1/environ; echo $all; : > $out"
        one = order(drv("curious", script))
        await fleet.start_many("a", [one])
        await heard.until(lambda: one.step in heard.reports)
        log = heard.logs[one.step].decode()
        assert "curious" in log
        assert "RAY_" not in log
        assert "seen" not in log
        daemons = [pid for pid, line in left_behind(site.root).items() if "nix-daemon" in line]
        # A connection that has not been used for a while ends, and with it its daemon.
        environments = [said for pid in daemons if (said := of_process(pid, "environ"))]
        assert environments
        assert not [said for said in environments if "RAY_" in said]


async def test_a_build_sleeps_as_exactly_as_anywhere_although_its_agent_is_rays(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("a")))
        one = order(drv("sleeper", "read -r slack < /proc/1/timerslack_ns; echo slack $slack; : > $out"))
        await fleet.start_many("a", [one])
        await heard.until(lambda: one.step in heard.reports)
        assert heard.logs[one.step] == f"slack {USUAL_SLACK_NS}\n".encode()


async def test_a_worker_sends_again_what_it_still_has(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("b")))
        one = order(drv("kept", "echo kept > $out"))
        await fleet.start_many("b", [one])
        await heard.until(lambda: one.step in heard.reports)
        _, report = heard.reports[one.step]
        result = report.result
        assert isinstance(result, Succeeded)
        (output,) = result.outputs
        stored = site.root / "objects" / output.url
        stored.unlink()
        absent = f"/nix/store/{'0' * 32}-absent"
        (again,) = await fleet.provide("b", [output.path, absent], "")
        assert (again.path, again.nar_hash, again.url) == (output.path, output.nar_hash, output.url)
        assert stored.exists()
        assert await fleet.provide("c", [output.path], "") == ()


async def test_events_that_a_coordinator_left_unacknowledged_go_to_the_next_one(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("b")))
        before = heard.hellos("b")[0].incarnation
        one = order(drv("slow", "read -t 3 < /dev/zero; : > $out"))
        await fleet.start_many("b", [one])
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: one.step in heard.reports)
        assert heard.hellos("b")[0].incarnation == before


async def test_cancel_and_drain_reach_the_agent_and_an_unknown_worker_is_an_error(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("c")))
        endless = order(drv("endless", "while :; do :; done"))
        await fleet.start_many("c", [endless])
        await fleet.cancel("c", [Lease(step=endless.step, attempt=endless.attempt)])
        await heard.until(lambda: endless.step in heard.reports)
        await fleet.drain("c", on=True)
        late = order(drv("late", ": > $out"))
        await fleet.start_many("c", [late])
        await heard.until(lambda: late.step in heard.reports)
        assert isinstance(handed_back := heard.reports[late.step][1].result, Failed)
        assert handed_back.reason == "returned"
        await fleet.drain("c", on=False)
        with pytest.raises(FleetError, match="nobody"):
            await fleet.start_many("nobody", [endless])


async def test_calls_go_over_a_line_beside_ray_and_through_ray_where_it_breaks(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("c")))
        calls = fleet.calls_of("c")
        assert isinstance(calls, ActorCalls)

        def has_line() -> bool:
            return calls.has_line

        async with asyncio.timeout(PATIENCE_S):
            while not has_line():  # noqa: ASYNC110 - sends no event
                await asyncio.sleep(0.1)
        endless = order(drv("over-a-line", "echo begun; while :; do :; done"))
        await fleet.start_many("c", [endless])
        await heard.until(lambda: endless.step in heard.logs)
        assert has_line()
        calls.hang_up()
        await fleet.cancel("c", [Lease(step=endless.step, attempt=endless.attempt)])
        await heard.until(lambda: endless.step in heard.reports)
        assert not has_line()
        assert not any(isinstance(event, WorkerSilent) for event in heard.events)


async def test_the_programs_own_handling_of_signals_survives_ray(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    signals = asyncio.Queue[str]()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signals.put_nowait, "stop")
    try:
        async with site.fleet() as (_, heard):
            await heard.until(lambda: bool(heard.hellos("a")))
            os.kill(os.getpid(), signal.SIGTERM)
            assert await signals.get() == "stop"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await signals.get() == "stop"
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    assert "SIGTERM" not in capfd.readouterr().err


async def test_an_agent_that_dies_alone_is_lost_and_its_node_gets_another(site: Site) -> None:
    async with site.node("d") as node, site.fleet() as (_, heard):
        await heard.until(lambda: bool(heard.hellos("d")))
        for process in process_tree(node.pid):
            if process.parent in {p.pid for p in process_tree(node.pid)} and is_agent(process.pid):
                os.kill(process.pid, signal.SIGKILL)
        await heard.until(lambda: len(heard.hellos("d")) == 2)
        first, second = (hello.incarnation for hello in heard.hellos("d"))
        assert first != second
        assert [lost.incarnation for lost in heard.losses("d")] == [first]


async def test_a_node_that_ray_drains_gets_nothing_new_and_killed_in_the_middle_of_a_build_it_is_lost_and_others_go_on(
    site: Site,
) -> None:
    async with site.node("e") as node, site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("e")) and bool(heard.hellos("a")))
        endless = order(drv("doomed", "echo started; while :; do :; done"))
        await fleet.start_many("e", [endless])
        await heard.until(lambda: endless.step in heard.logs)
        # Ray takes a node with an agent for busy, whether it builds or not: it does not end it as idle.
        assert not await asyncio.to_thread(drain_by_ray, "e", "DRAIN_NODE_REASON_IDLE_TERMINATION")
        assert await asyncio.to_thread(drain_by_ray, "e", "DRAIN_NODE_REASON_PREEMPTION")
        await heard.until(lambda: heard.drains("e"))
        assert not heard.drains("a")
        late = order(drv("too-late", ": > $out"))
        await fleet.start_many("e", [late])
        await heard.until(lambda: late.step in heard.reports)
        assert isinstance(handed_back := heard.reports[late.step][1].result, Failed)
        assert handed_back.reason == "returned"
        # What runs goes on, until the machine is taken away.
        assert endless.step not in heard.reports
        for process in process_tree(node.pid):
            # Some end by themselves as soon as the one above them is gone.
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await heard.until(lambda: bool(heard.losses("e")))
        assert heard.losses("e")[0].incarnation == heard.hellos("e")[0].incarnation
        with pytest.raises(FleetError, match="e is not connected"):
            await fleet.start_many("e", [endless])
        other = order(drv("survivor", ": > $out"))
        await fleet.start_many("a", [other])
        await heard.until(lambda: other.step in heard.reports)


async def test_of_two_nodes_of_one_name_the_first_alone_is_given_work(site: Site) -> None:
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: bool(heard.hellos("a")))
        async with site.node("a", "elsewhere"), asyncio.timeout(PATIENCE_S):
            while "two Ray nodes are called a" not in fleet.trouble:  # noqa: ASYNC110 - sends no event
                await asyncio.sleep(0.1)
        built = order(drv("by-the-first", ": > $out"))
        await fleet.start_many("a", [built])
        await heard.until(lambda: built.step in heard.reports)
        assert len({hello.incarnation for hello in heard.hellos("a")}) == 1


def of_process(pid: int, name: str) -> str:
    """Return a text of /proc about a process, which may have ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def is_agent(pid: int) -> bool:
    return of_process(pid, "cmdline").startswith("ray::AgentHost")


async def test_what_is_requested_of_an_autoscaler_and_what_nodes_offer_stand_in_the_heads_tables(site: Site) -> None:
    """None runs here: what those of both versions read is asked of the real head."""
    labels = labels_of(("x86_64-linux",), ("kvm",))
    async with site.fleet() as (fleet, heard):
        await heard.until(lambda: all(heard.hellos(name) for name in "abc"))
        await fleet.request_nodes([NodeBundle({SLOT: 1.0}, labels)] * 3)
        assert json.loads(await asyncio.to_thread(requested_by_version_1)) == [{SLOT: 1.0}] * 3
        await asyncio.to_thread(let_version_2_run)
        await fleet.request_nodes([NodeBundle({SLOT: 1.0, "memory": 5.0}, labels)] * 2)
        nodes, asked = await asyncio.to_thread(read_by_version_2)
        assert asked == [({SLOT: 1.0, "memory": 5.0}, {f"{key}=true" for key in labels}, 2)]
        here = labels_of((native_system(),), ())
        assert [slots for slots, its in nodes if its.items() >= here.items()] == [1.0, 1.0, 1.0]
        await fleet.request_nodes([])
        assert (await asyncio.to_thread(read_by_version_2))[1] == []


async def test_agents_with_nothing_to_do_end_where_ray_may_end_their_nodes_and_come_back_for_work(site: Site) -> None:
    async with site.fleet(rest_after_s=0.2) as (fleet, heard):
        await heard.until(lambda: all(heard.hellos(name) for name in "abc"))
        # Before an autoscaler is asked for anything, an agent stays.
        assert not any(heard.losses(name) for name in "abc")
        await fleet.request_nodes([])
        await heard.until(lambda: all(heard.losses(name) for name in "abc"))
        assert {loss.reason for name in "abc" for loss in heard.losses(name)} == {RESTS}
        async with asyncio.timeout(PATIENCE_S):
            while len(await asyncio.to_thread(idle_nodes)) < 3:  # noqa: ASYNC110 - sends no event
                await asyncio.sleep(0.1)
        await fleet.request_nodes([NodeBundle({SLOT: 1.0}, labels_of((native_system(),), ()))])
        await heard.until(lambda: len(heard.hellos("a")) == 2)
        built = order(drv("once-more", ": > $out"))
        await fleet.start_many("a", [built])
        await heard.until(lambda: built.step in heard.reports)


async def test_ray_looks_for_signals_in_the_way_that_agents_let_pause(site: Site) -> None:
    async with site.fleet() as (_, heard):
        await heard.until(lambda: bool(heard.hellos("a")))
        actor = import_module("ray").remote(num_cpus=0)(actor_whose_looks_pause()).remote()
        async with asyncio.timeout(PATIENCE_S):
            assert await actor.looked.remote()


def actor_whose_looks_pause() -> type:
    """Return a class that other processes need not import. Its clock has every look come long after the last call."""

    class Looking:
        def __init__(self) -> None:
            self.paused = threading.Event()
            times = iter((0.0,))
            looks = SignalLooks(lambda: next(times, 2 * QUIET_S), lambda _: self.paused.set())
            looks.take_over(import_module("ray._raylet"))

        async def looked(self) -> bool:
            return await asyncio.to_thread(self.paused.wait, PATIENCE_S)

    return Looking


def idle_nodes() -> list[str]:
    """Return the nodes of workers that version 2 of the autoscaler takes for idle."""
    states = import_module("ray.core.generated.autoscaler_pb2").NodeStatus
    return [
        node.node_id.hex()
        for node in cluster_state().node_states
        if node.status == states.IDLE and node.labels.get(WORKER_LABEL)
    ]


def cluster_state() -> Any:
    gcs = import_module("ray.experimental.internal_kv").internal_kv_get_gcs_client()
    return import_module("ray.autoscaler.v2.sdk").get_cluster_resource_state(gcs)


def drain_by_ray(worker: str, reason: str) -> bool:
    """Have the head drain a node for ten minutes, as `ray drain-node` does; returns whether it takes that."""
    ray, messages = import_module("ray"), import_module("ray.core.generated.autoscaler_pb2")
    [node] = [each["NodeID"] for each in ray.nodes() if each["Alive"] and each["Labels"].get(WORKER_LABEL) == worker]
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # noqa: SLF001 - as the command does
    until_ms = int(time.time() * 1000) + 600_000
    accepted, _ = client.drain_node(node, messages.DrainNodeReason.Value(reason), "test", until_ms)
    return bool(accepted)


def requested_by_version_1() -> bytes:
    kv, names = import_module("ray.experimental.internal_kv"), import_module("ray._private.ray_constants")
    return bytes(kv._internal_kv_get(names.AUTOSCALER_RESOURCE_REQUEST_CHANNEL))  # noqa: SLF001 - Ray's own reader does it


def let_version_2_run() -> None:
    """Have the head's tables say that version 2 of the autoscaler runs, as its monitor does."""
    raylet, gcs = (
        import_module("ray._raylet"),
        import_module("ray.experimental.internal_kv").internal_kv_get_gcs_client(),
    )
    key, namespace = raylet.GCS_AUTOSCALER_V2_ENABLED_KEY, raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    gcs.internal_kv_put(key.encode(), b"1", True, namespace.encode())
    assert import_module("ray.autoscaler.v2.utils").is_autoscaler_v2(fetch_from_server=True)


def read_by_version_2() -> tuple[list[tuple[float, dict[str, str]]], list[tuple[dict[str, float], set[str], int]]]:
    """Return slots and labels of nodes, and resources, labels and number of what is requested."""
    state = cluster_state()
    nodes = [(node.total_resources[SLOT], dict(node.labels)) for node in state.node_states if node.total_resources]
    requests = [each for constraint in state.cluster_resource_constraints for each in constraint.resource_requests]
    return nodes, [
        (
            dict(each.request.resources_bundle),
            {
                f"{wish.label_key}={value}"
                for selector in each.request.label_selectors
                for wish in selector.label_constraints
                for value in wish.label_values
            },
            each.count,
        )
        for each in requests
    ]
