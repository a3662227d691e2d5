"""Offers of worker nodes in Ray's words: slots as a resource, systems and features as labels.

Ray schedules nothing by them; an autoscaler counts by them which nodes are there and which to start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from workers.agent.settings import HostSpec, WorkerSettings, native_system, offer

#: Resource of a node: builds that it does at one time.
SLOT: Final = "drover_slot"
#: Begins of labels, and the value of each that is there.
SYSTEM_LABEL: Final = "drover.system."
FEATURE_LABEL: Final = "drover.feature."
HAS_IT: Final = "true"
#: Characters that a label's name may not have (Kubernetes' syntax), and the most that it may have.
_NO_LABEL: Final = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST: Final = 63


@dataclass(frozen=True, slots=True)
class NodeBundle:
    """Resources that one node should have, and labels of it."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """The offer of one worker's node."""

    slots: int
    labels: Mapping[str, str]


def labels_of(systems: Iterable[str], features: Iterable[str]) -> dict[str, str]:
    """Return the labels of a node that has these systems and features."""
    names = [*(SYSTEM_LABEL + each for each in systems), *(FEATURE_LABEL + each for each in features)]
    return {_NO_LABEL.sub("_", name)[:_LONGEST].rstrip("._-"): HAS_IT for name in names}


def node_offer(settings: WorkerSettings) -> NodeOffer:
    """Return the offer of a node with these settings on this machine, by what can be seen without asking its Nix."""
    host = HostSpec(native_system(), os.cpu_count() or 1, has_kvm=os.access("/dev/kvm", os.R_OK | os.W_OK))
    found = offer(settings, host)
    return NodeOffer(found.slots, labels_of(found.systems, found.features))
