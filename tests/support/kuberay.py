"""Pods that KubeRay makes of a RayCluster, with what it adds to them.

From `ray-operator/controllers/ray/common/pod.go` of ray-project/kuberay at feeaf72facab4881ba2b179248bb67315634e229:
as far as it concerns a cluster whose containers keep their own commands, with features that are on by default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

OVERWRITE: Final = "ray.io/overwrite-container-cmd"
PORT: Final = "6379"
HEAD_GROUP: Final = "headgroup"


@dataclass(frozen=True, slots=True)
class MadePod:
    """One pod: the group it is of, and its metadata and specification."""

    group: str
    template: dict[str, Any]


def head_service(cluster: Mapping[str, Any]) -> str:
    """Return the name of the service that KubeRay makes for the head."""
    return f"{cluster['metadata']['name']}-head-svc"


def pods(cluster: Mapping[str, Any], namespace: str) -> Iterator[MadePod]:
    """Make the head's pod and one of each worker group, as KubeRay does."""
    spec, metadata = cluster["spec"], cluster["metadata"]
    assert metadata["annotations"][OVERWRITE] == "true", "KubeRay would replace the commands by `ray start`"
    address = f"{head_service(cluster)}.{namespace}.svc.cluster.local"
    yield _made(metadata["name"], HEAD_GROUP, spec["headGroupSpec"], address)
    for group in spec.get("workerGroupSpecs", ()):
        yield _made(metadata["name"], group["groupName"], group, address)


def _made(cluster: str, group: str, spec: Mapping[str, Any], address: str) -> MadePod:
    kind = "head" if group == HEAD_GROUP else "worker"
    head = "127.0.0.1" if group == HEAD_GROUP else address
    template = copy.deepcopy(dict(spec["template"]))
    labels = template["metadata"].setdefault("labels", {})
    labels |= {**spec.get("labels", {}), "ray.io/cluster": cluster, "ray.io/node-type": kind, "ray.io/group": group}
    container, init = template["spec"]["containers"][0], template["spec"].setdefault("initContainers", [])
    if kind == "worker":
        init.append(_wait_for_head(container, f"{address}:{PORT}"))
    where = [_value("FQ_RAY_IP", address), _value("RAY_IP", address.partition(".")[0])]
    for one in init:
        one["env"] = [*one.get("env", ()), *where]
    parameters = " ".join(f"--{name}={value}" for name, value in spec["rayStartParams"].items())
    container["env"] = [
        *container.get("env", ()),
        *(where if kind == "worker" else ()),
        _field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        _field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        _value("KUBERAY_GEN_RAY_START_CMD", f"ray start {'--head' if kind == 'head' else ''} {parameters} --block"),
        _value("RAY_PORT", PORT),
        _value("RAY_ADDRESS", f"{head}:{PORT}"),
        _value("RAY_USAGE_STATS_KUBERAY_IN_USE", "1"),
        _value("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1"),
    ]
    # It keeps probes that are there, and adds those that are not: the chart has its own where KubeRay's would fail.
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    return MadePod(group, template)


def _wait_for_head(container: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Make the init container by which a worker waits for its head: with the worker's image, rights and files."""
    script = (
        f"SECONDS=0\nwhile true; do\nif (( SECONDS <= 120 )); then\n"
        f"if ray health-check --address {address} > /dev/null 2>&1; then\necho 'GCS is ready.'\nbreak\nfi\n"
        f'echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."\nelse\n'
        f"if ray health-check --address {address}; then\nbreak\nfi\nfi\nsleep 5\ndone\n"
    )
    return {
        "name": "wait-gcs-ready",
        "image": container["image"],
        "command": ["/bin/bash", "-c", "--"],
        "args": [script],
        "securityContext": copy.deepcopy(container["securityContext"]),
        "env": copy.deepcopy(container["env"]),
        "volumeMounts": copy.deepcopy(container["volumeMounts"]),
    }


def _value(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
