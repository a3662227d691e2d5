"""The chart: examples are what Kubernetes and KubeRay take, and run the services' commands; contradictions are said.

No API server is to be had here, so nothing was applied: objects are held against Kubernetes' own schemas in strict
mode, those of KubeRay against a model of the fields that are used.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
import referencing
import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, model_validator

from coordinator.config import Settings
from tests.architecture.deploy_schemas import schema as settings_schema
from tests.deploy.test_services import parsed
from tests.deploy.tools import KUBERNETES, tools
from tests.support.units import DEPLOY, command, service
from workers.ray_transport.access import check_token_file

CHART: Final = DEPLOY / "kubernetes" / "drover"
EXAMPLES: Final = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
RENDERED: Final = DEPLOY / "kubernetes" / "rendered"
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")]


class PodTemplate(BaseModel):
    """A pod, which Kubernetes' own schema checks."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, Any]
    spec: dict[str, Any]


class HeadGroup(BaseModel):
    """`headGroupSpec` of KubeRay 1.5 and later, as far as the chart uses it."""

    model_config = ConfigDict(extra="forbid")

    rayStartParams: dict[str, str]  # noqa: N815 - KubeRay's names
    template: PodTemplate


class WorkerGroup(HeadGroup):
    """One of `workerGroupSpecs`."""

    groupName: _Label  # noqa: N815
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]  # noqa: N815
    maxReplicas: Annotated[int, Field(ge=0, le=2**31 - 1)]  # noqa: N815
    labels: dict[str, _Label]

    @model_validator(mode="after")
    def _labels_stand_at_the_top(self) -> WorkerGroup:
        assert "labels" not in self.rayStartParams, "KubeRay 1.5 refuses labels among the parameters"
        return self


class ClusterSpec(BaseModel):
    """`spec` of a RayCluster."""

    model_config = ConfigDict(extra="forbid")

    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup] = []  # noqa: N815


class ClusterMetadata(BaseModel):
    """`metadata` of a RayCluster: KubeRay derives names of services and pods from the name."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=47)]
    namespace: str = ""
    labels: dict[str, str]
    annotations: dict[str, str]


class Cluster(BaseModel):
    """A RayCluster."""

    model_config = ConfigDict(extra="forbid")

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: ClusterMetadata
    spec: ClusterSpec


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    places = dict.fromkeys(("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"), "/nowhere")
    environment = {**os.environ, **places}
    return subprocess.run([tools() / "helm", *arguments], env=environment, capture_output=True, text=True, check=False)


@cache
def rendered(example: str) -> str:
    ran = helm("template", "farm", CHART, "--namespace", "builds", "--values", CHART / "examples" / f"{example}.yaml")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@cache
def objects(example: str) -> list[dict[str, Any]]:
    return [one for one in yaml.load_all(rendered(example), yaml.CSafeLoader) if one]


def of_kind(example: str, kind: str) -> list[dict[str, Any]]:
    return [one for one in objects(example) if one["kind"] == kind]


def cluster(example: str) -> Cluster:
    (found,) = of_kind(example, "RayCluster")
    return Cluster.model_validate(found)


def pods(example: str) -> dict[str, dict[str, Any]]:
    """Return the specifications of all pods, by their component (and group)."""
    spec = cluster(example).spec
    (deployment,) = of_kind(example, "Deployment")
    found = {"coordinator": deployment["spec"]["template"]["spec"], "head": spec.headGroupSpec.template.spec}
    return found | {f"worker {group.groupName}": group.template.spec for group in spec.workerGroupSpecs}


@cache
def validator(version: str, name: str) -> jsonschema.Draft202012Validator:
    folder = tools() / "schemas" / version
    definitions = referencing.Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    whole = json.loads((folder / f"{name}.json").read_text())
    here = referencing.Resource.from_contents(whole)
    registry: referencing.Registry[Any] = definitions @ (here @ referencing.Registry())
    return jsonschema.Draft202012Validator(whole, registry=registry)


def faults(version: str, thing: dict[str, Any]) -> list[str]:
    """Return what Kubernetes' strict schema has against an object."""
    group, _, api = thing["apiVersion"].rpartition("/")
    name = "-".join(filter(None, (thing["kind"].lower(), group.partition(".")[0], api)))
    return [f"{error.json_path}: {error.message}" for error in validator(version, name).iter_errors(thing)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_object_is_what_kubernetes_takes(example: str) -> None:
    assert helm("lint", "--strict", CHART, "--values", CHART / "examples" / f"{example}.yaml").returncode == 0
    templates = [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": {"spec": spec}}
                 for name, spec in pods(example).items()]  # fmt: skip
    plain = [one for one in objects(example) if one["kind"] not in {"RayCluster", "ServiceMonitor"}]
    for version in KUBERNETES:
        for thing in [*plain, *templates]:
            assert faults(version, thing) == [], (version, thing["kind"])
    # The check itself finds what is misspelt.
    broken = json.loads(json.dumps(templates[0]))
    broken["template"]["spec"]["hostUser"] = False
    assert "hostUser" in faults(KUBERNETES[-1], broken)[0]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_plain_manifests_are_those_of_the_chart(example: str) -> None:
    file = RENDERED / f"{example}.yaml"
    assert file.read_text() == rendered(example), f"helm template farm … -f examples/{example}.yaml > {file}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_pods_run_what_the_services_of_systemd_run(example: str) -> None:
    for name, pod in pods(example).items():
        (container,) = pod["containers"]
        kind = name.partition(" ")[0]
        assert container["command"] == ["drover"]
        here, unit = parsed(container["args"]), command(f"drover-{kind}", {
            "HEAD": "$(POD_IP):6379" if kind == "head" else "farm-head.builds.svc:6379", "ADDRESS": "$(POD_IP)",
            "NAME": "$(POD_NAME)", "WORKER_OPTIONS": "", "/etc/drover/ray-token": "/run/drover/ray-token",
        })  # fmt: skip
        plain = parsed(unit)
        if kind == "worker":
            tun = any("tun" in resource for resource in container["resources"]["limits"])
            assert here["network"] is (tun or bool(container["securityContext"].get("privileged")))
        for own in ("slots", "features", "network") if kind == "worker" else ():
            plain.pop(own), here.pop(own)
        assert here == plain
        # Where they write is a volume, and the rest of the file system is not to be written.
        assert container["securityContext"].get("readOnlyRootFilesystem")
        mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert any(Path(here["state_dir"]).is_relative_to(mount) for mount in mounts)
        assert {"/tmp", "/dev/shm", "/run/drover"} <= set(mounts)  # noqa: S108
        assert {volume["name"] for volume in pod["volumes"]} >= {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_settings_of_the_chart_are_settings_of_drover(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/tmp"})  # noqa: S108
    (config,) = of_kind(example, "ConfigMap")
    values = yaml.safe_load((CHART / "examples" / f"{example}.yaml").read_text())
    settings = Settings(**tomllib.loads(config["data"]["farm.toml"]))
    assert settings.ray_address == "farm-head.builds.svc:6379"
    assert str(settings.ray_token_file) == "/run/drover/ray-token"
    assert settings.cache.max_bytes == values.get("settings", {}).get("cache", {}).get("max_bytes", 0)
    # What comes by the environment exists too.
    (container,) = pods(example)["coordinator"]["containers"]
    named = [one["name"] for one in container["env"] if one["name"].startswith("DROVER_")]
    assert {name.removeprefix("DROVER_").lower() for name in named} <= Settings.model_fields.keys()
    assert ("DROVER_JOURNAL_DATABASE_URL" in named) is ("database" in values)


@pytest.mark.parametrize("example", EXAMPLES)
def test_workers_have_the_rights_of_the_measured_unit_and_all_others_none(example: str) -> None:
    measured = {word.removeprefix("CAP_") for word in service("drover-worker")["CapabilityBoundingSet"][0].split()}
    for name, pod in pods(example).items():
        (container,) = pod["containers"]
        context = container["securityContext"]
        if context.get("privileged"):
            assert name == "worker kvm"
            continue
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["allowPrivilegeEscalation"] is False
        if name.startswith("worker"):
            assert set(context["capabilities"]["add"]) == measured
            # Kubernetes takes the first only with the second.
            assert (context["procMount"], pod["hostUsers"]) == ("Unmasked", False)
        else:
            assert "add" not in context["capabilities"]
            assert context["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_pod_that_goes_lets_its_builds_end(example: str) -> None:
    for name, pod in pods(example).items():
        (container,) = pod["containers"]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        if name.startswith("worker"):
            assert pod["terminationGracePeriodSeconds"] > int(environment["DROVER_STOP_GRACE_S"])
    groups = {group.groupName: group.replicas for group in cluster(example).spec.workerGroupSpecs}
    budgets = {one["metadata"]["name"]: one["spec"]["minAvailable"] for one in of_kind(example, "PodDisruptionBudget")}
    assert budgets == {f"farm-{name}": count - 1 for name, count in groups.items() if count > 1}


def test_secrets_as_kubernetes_mounts_them_become_files_that_drover_takes(tmp_path: Path) -> None:
    """A Secret is links to files that a group may read, which drover refuses of its token."""
    given, own = tmp_path / "given", tmp_path / "own"
    (given / "..data").mkdir(parents=True)
    own.mkdir()
    (given / "..data" / "ray-token").write_text("t" * 64)
    (given / "..data" / "ray-token").chmod(0o440)
    (given / "ray-token").symlink_to("..data/ray-token")
    with pytest.raises(Exception, match="is not a plain file"):
        check_token_file(given / "ray-token")
    for pod in pods("production").values():
        (init,) = pod["initContainers"]
        shell, flag, script = init["command"]
        script = script.replace("/run/given", str(given)).replace("/run/drover", str(own))
        subprocess.run([shell, flag, script], check=True)
        check_token_file(own / "ray-token")
        (own / "ray-token").unlink()


def test_a_standby_keeps_nothing_of_its_own_and_clients_reach_only_the_http_side() -> None:
    (deployment,) = of_kind("production", "Deployment")
    assert deployment["spec"]["replicas"] == 2
    assert of_kind("production", "PersistentVolumeClaim")[0]["metadata"]["name"] == "farm-head"
    assert len(of_kind("production", "PersistentVolumeClaim")) == 1
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("production", "NetworkPolicy")}
    assert [rule["ports"] for rule in policies["farm-coordinator"]["ingress"]] == [[{"port": 7878, "protocol": "TCP"}]]
    ((ours,),) = [rule["from"] for rule in policies["farm-ray"]["ingress"]]
    assert ours == {"podSelector": policies["farm-ray"]["podSelector"]}
    # What Prometheus selects is the coordinator's service.
    (monitor,) = of_kind("production", "ServiceMonitor")
    (selected,) = [
        one for one in of_kind("production", "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    ]  # fmt: skip
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= {
        port["name"] for port in selected["spec"]["ports"]
    }


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["secretName="], "make a Secret with api-token, upload-secret, cache-key and ray-token"),
        (["image.repository="], "image.repository is empty"),
        (["image.tag=latest"], "name one version"),
        (["image.digests.worker=sha256:abc"], "'sha256:abc' does not match pattern"),
        (["coordinator.replicas=2"], "stands by on a shared PostgreSQL only"),
        (["coordinator.replicas=2", "database.secretName=db"], "both coordinators must see the same objects"),
        (["workers.Small.replicas=1"], "workers.Small is no name of a group"),
        (["workers.mac.system=aarch64-darwin"], "Macs join by themselves"),
        (["workers.small.replicas=11"], "which is not between minReplicas 0 and maxReplicas 10"),
        (["settings.prot=1"], "additional properties 'prot' not allowed"),
        (["settings.limits.graph_size=0"], "minimum: got 0, want 1"),
        (["workerDefaults.sandbox=none"], "value must be one of 'user-namespace', 'privileged'"),
        (["wrokers.small.replicas=1"], "additional properties 'wrokers' not allowed"),
    ],
)
def test_values_that_contradict_are_one_clear_error(values: list[str], says: str) -> None:
    sets = [word for value in values for word in ("--set", value)]
    ran = helm("template", "farm", CHART, "--values", CHART / "examples" / "small.yaml", *sets)
    assert ran.returncode != 0
    assert says in ran.stderr


def test_a_name_that_is_too_long_is_refused() -> None:
    ran = helm("template", "f" * 31, CHART, "--values", CHART / "examples" / "small.yaml")
    assert "has more than 30 characters" in ran.stderr


def test_the_values_know_every_setting_that_drover_has() -> None:
    known = json.loads((CHART / "values.schema.json").read_text())
    assert known["properties"]["settings"]["properties"].keys() == settings_schema()["properties"].keys()


#: Findings of trivy that are on purpose: pod -> the right that its sandbox takes.
WANTED: Final = {
    **dict.fromkeys(
        ("production arm-small", "production x86-large", "production x86-small", "small small", "small fetch"), "KSV005"
    ),
    "production kvm": "KSV017",
}


def test_a_scan_of_policies_finds_only_what_the_sandbox_needs(tmp_path: Path) -> None:
    """The scanner knows no RayCluster, so it gets the pods of both examples as such."""
    for example in EXAMPLES:
        (tmp_path / f"{example}.yaml").write_text(rendered(example))
        for name, pod in pods(example).items():
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "builds"}, "spec": pod}
            file = tmp_path / f"{example} {name.removeprefix('worker ')}.yaml"
            file.write_text(yaml.dump(whole, Dumper=yaml.CSafeDumper))
    scanned = subprocess.run(
        [tools() / "trivy", "config", "--quiet", "--skip-check-update", "--format", "json", "--misconfig-scanners",
         "kubernetes", "--cache-dir", tmp_path / "cache", "--severity", "HIGH,CRITICAL", tmp_path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(scanned.stdout)
    found = [
        (result["Target"].removesuffix(".yaml"), fault["ID"])
        for result in report["Results"]
        for fault in result.get("Misconfigurations") or []
    ]
    assert sorted(found) == sorted(WANTED.items())
