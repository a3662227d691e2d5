"""Requests to Ray's autoscaler: what they ask for, and when; that they arrive is shown in `tests/workers`."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.api.capacity_routes import CapacityClassView, CapacityView
from coordinator.fleet.autoscaling import MOST_BUNDLES, REPEAT_EVERY_S, Autoscaling, bundles_of
from scheduler.model import ANY_SYSTEM
from workers.agent.settings import WorkerSettings
from workers.ray_transport.offers import SLOT, NodeBundle, labels_of, node_offer
from workers.wire.fleet import FleetError
from workers.wire.messages import NETWORK_FEATURE

LINUX = "x86_64-linux"


def wanted(slots: int, hours: float = 1.0, *features: str, system: str = LINUX, memory: int = 0) -> CapacityClassView:
    return CapacityClassView(
        system=system, features=features, memory_bytes=memory, ready=slots, running=0, waiting=0, slots=slots,
        slots_present=0, hours=hours,
    )  # fmt: skip


def capacity(*classes: CapacityClassView) -> CapacityView:
    return CapacityView(at=1.0, classes=classes)


def test_a_bundle_is_a_slot_with_the_labels_of_nodes_that_fit() -> None:
    asked = bundles_of(capacity(wanted(2), wanted(1, 9.0, "kvm", memory=1 << 33)))
    plain = NodeBundle({SLOT: 1.0}, {"drover.system.x86_64-linux": "true"})
    kvm = NodeBundle({SLOT: 1.0, "memory": float(1 << 33)}, {**plain.labels, "drover.feature.kvm": "true"})
    assert asked == (kvm, plain, plain)
    # What every worker has is no label: any system, and the network.
    assert bundles_of(capacity(wanted(1, 1.0, NETWORK_FEATURE, system=ANY_SYSTEM))) == (NodeBundle({SLOT: 1.0}, {}),)
    assert bundles_of(capacity(wanted(0))) == ()
    assert len(bundles_of(capacity(wanted(10**9), wanted(5)))) == MOST_BUNDLES


def test_a_node_offers_what_bundles_ask_for() -> None:
    features = ("a b", "gccarch-x86-64-v3")
    values = {"state_dir": "/x", "store": "/y", "slots": 3, "systems": (LINUX,), "features": features}
    settings = WorkerSettings.model_validate({"name": "w", **values})
    offered = node_offer(settings)
    assert offered.slots == 3
    assert labels_of((LINUX,), ("big-parallel", *features)).items() <= offered.labels.items()
    assert all(len(key) <= 63 for key in labels_of((), ("x" * 200,)))


class Ports:
    """A farm's capacity, an autoscaler that may be away, and a clock."""

    def __init__(self) -> None:
        self.capacity = capacity(wanted(2))
        self.requests: list[int] = []
        self.away = False
        self.time = 0.0

    async def of(self) -> CapacityView:
        return self.capacity

    async def request(self, bundles: Sequence[NodeBundle]) -> None:
        if self.away:
            raise FleetError("the Ray head does not answer")
        self.requests.append(len(bundles))

    def now(self) -> float:
        return self.time


async def test_what_is_worth_having_is_requested_where_it_changed_after_a_while_and_once_the_head_is_back() -> None:
    ports = Ports()
    asking = Autoscaling(ports.of, ports.request, ports)
    await asking.look()
    await asking.look()
    assert ports.requests == [2]
    ports.time = REPEAT_EVERY_S
    await asking.look()
    assert ports.requests == [2, 2]
    ports.away, ports.capacity = True, capacity()
    await asking.look()
    ports.away = False
    await asking.look()
    # A farm that has nothing to do says so.
    assert ports.requests == [2, 2, 0]
