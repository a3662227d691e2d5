"""Images of this checkout, and the pods of the chart in them: from nothing to a build that a plain Nix client fetches.

The images are built here, and the pods are those of the chart's manifests, with what KubeRay adds: one coordinator, one
head and one worker on a bridge of this machine. The base of the images is built once; drover's own layers are built
twice, and have the same digests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from tests.deploy.test_kubernetes import CHART, helm
from tests.support import kuberay
from tests.support.farm import BIN, nix_store
from tests.support.idmaps import ID_START
from tests.support.images import TAG, build, built, configuration, mounted
from tests.support.patience import PATIENCE_S
from tests.support.pods import Node, Pod
from tests.support.processes import processes_with

pytestmark = pytest.mark.e2e

#: Diamonds, several outputs, an output that names another. Without fixed outputs, which a pod without a device for its
#: network does not take.
GRAPH: Final = """
let
  step = name: needs: extra: derivation ({
    inherit name needs; system = "x86_64-linux"; builder = "/bin/sh"; outputs = [ "out" "doc" ];
    args = [ "-c" "mkdir $out $doc; for need in $needs; do echo $need >> $out/needs; done; echo $out > $doc/of" ];
  } // extra);
  toolchain = step "toolchain" [ ] { };
  library = n: step "library-${toString n}" [ toolchain ] { requiredSystemFeatures = [ "large-memory" ]; };
  app = n: step "app-${toString n}" [ (library n) (library (n + 1)).doc ] { };
in { everything = step "everything" (map app [ 1 2 3 ]) { }; }
"""
NAMESPACE: Final = "builds"
REPOSITORY: Final = "registry.example.org/drover"
#: Only ends a test that hangs.
WITHIN_S: Final = PATIENCE_S


def manifests() -> list[dict[str, Any]]:
    """Return the objects of the small example, with these images, and with a feature that the demo's graph wants."""
    words = ("--set", f"image.tag={TAG}", "--set", "workers.small.features={large-memory}")
    ran = helm("template", "farm", CHART, "-n", NAMESPACE, "-f", CHART / "examples" / "small.yaml", *words)
    assert ran.returncode == 0, ran.stderr
    return [one for one in yaml.load_all(ran.stdout, yaml.CSafeLoader) if one]


class Kubernetes:
    """The chart's objects as pods of one node."""

    def __init__(self, node: Node, objects: list[dict[str, Any]]) -> None:
        self.node = node
        self.objects = {(one["kind"], one["metadata"]["name"]): one for one in objects}
        (cluster,) = (one for one in objects if one["kind"] == "RayCluster")
        node.secrets["drover-secrets"] = {
            "api-token": "a" * 64, "upload-secret": "b" * 64, "ray-token": "c" * 64, "cache-key": self._cache_key(),
        }  # fmt: skip
        node.configs = {name: one["data"] for (kind, name), one in self.objects.items() if kind == "ConfigMap"}
        made = {pod.group: pod.template for pod in kuberay.pods(cluster, NAMESPACE)}
        deployment = self.objects["Deployment", "farm-coordinator"]["spec"]["template"]
        templates = {"coordinator": deployment, "head": made[kuberay.HEAD_GROUP], "worker": made["small"]}
        addresses = {name: node.address() for name in templates}
        self._serve(templates, addresses)
        self.pods = {name: Pod(node, f"farm-{name}", templates[name], addresses[name]) for name in templates}

    def _cache_key(self) -> str:
        file = self.node.root / "cache-key"
        subprocess.run(
            ["nix-store", "--generate-binary-cache-key", "farm-1", file, self.node.root / "public-key"], check=True
        )
        return file.read_text()

    def _serve(self, templates: dict[str, Any], addresses: dict[str, str]) -> None:
        """Let each service have the address of the one pod that it selects: there is no proxy here."""
        for (kind, name), one in self.objects.items():
            if kind != "Service":
                continue
            wanted = one["spec"]["selector"].items()
            (found,) = (pod for pod, template in templates.items() if wanted <= template["metadata"]["labels"].items())
            (port,) = one["spec"]["ports"]
            ports = {
                given["name"]: given["containerPort"] for given in templates[found]["spec"]["containers"][0]["ports"]
            }
            assert ports.get(port["targetPort"], port["targetPort"]) == port["port"]
            self.node.services[name] = (port["port"], addresses[found])
        self.node.services["farm-head-svc"] = (6379, addresses["head"])

    @property
    def url(self) -> str:
        return f"http://{self.pods['coordinator'].address}:7878"

    def start(self) -> None:
        """Start all pods, and wait until each is ready."""
        self.pods["coordinator"].start()
        # A worker's own init container waits for the head, and says nothing of one that has ended.
        self.pods["head"].start().wait_ready()
        self.pods["worker"].start()
        for pod in self.pods.values():
            pod.wait_ready()
        until(lambda: self.worker_state() == "online")

    def worker_state(self) -> str:
        """Return how the coordinator sees the worker; empty until it has come."""
        return "".join(worker["state"] for worker in json.loads(self.run("workers", "--json"))["workers"])

    def drover(self, *arguments: str | Path) -> list[str]:
        token = self.node.root / "api-token"
        token.write_text(self.node.secrets["drover-secrets"]["api-token"])
        token.chmod(0o600)
        return [
            "env",
            f"DROVER_URL={self.url}",
            f"DROVER_TOKEN_FILE={token}",
            str(BIN / "drover"),
            *map(str, arguments),
        ]

    def run(self, *arguments: str | Path) -> str:
        ran = subprocess.run(self.drover(*arguments), capture_output=True, text=True, timeout=WITHIN_S, check=False)
        assert ran.returncode == 0, (ran.stderr, *(pod.log for pod in self.pods.values()))
        return ran.stdout


@pytest.fixture(scope="module")
def farm() -> Iterator[Kubernetes]:
    """The farm of the small example."""
    with ExitStack() as stack:
        images = stack.enter_context(mounted("coordinator", "worker"))
        named = {f"{REPOSITORY}/{name}:{TAG}": image for name, image in images.items()}
        # Not pytest's own directory: users of a user namespace must reach it.
        root = Path(stack.enter_context(TemporaryDirectory(prefix="drover-pods-")))
        root.chmod(0o755)
        node = Node(root, NAMESPACE, named)
        stack.enter_context(node.stack)
        kubernetes = Kubernetes(node, manifests())
        # The coordinator ends first: without a head it would wait for one.
        for name in ("head", "worker", "coordinator"):
            stack.callback(kubernetes.pods[name].stop)
        kubernetes.start()
        yield kubernetes


def test_the_same_checkout_makes_the_same_images() -> None:
    """Of the layers that each version has of its own; the base below is built once a state of its inputs."""
    first = built()
    assert first.keys() == {"coordinator", "worker"}
    assert build() == first


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_an_image_says_what_it_is_and_what_is_in_it(name: str) -> None:
    with mounted(name) as images:
        whole = configuration(name)
        labels = whole["config"]["Labels"]
        assert labels["org.opencontainers.image.title"] == f"drover {name}"
        assert labels["org.opencontainers.image.licenses"] == "MIT"
        assert labels["org.opencontainers.image.version"] == "0.1.0"
        revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=CHART)
        assert labels["org.opencontainers.image.revision"] == revision.stdout.strip()
        # Only the worker starts as root.
        assert whole["config"].get("User", "") == ("64000:64000" if name == "coordinator" else "")
        root = images[name].root
        bill = json.loads((root / "usr/share/drover/sbom.cdx.json").read_text())
        packages = {one["purl"].partition("@")[0]: one["version"] for one in bill["components"]}
        assert packages["pkg:pypi/drover"] == "0.1.0"
        assert packages["pkg:pypi/ray"] == "2.60.0"
        assert ("pkg:deb/debian/nix-bin" in packages) is (root / "usr/bin/nix-store").exists() is (name == "worker")
        # Nothing of tests or of this machine came along.
        assert "pkg:pypi/pytest" not in packages
        assert not list(root.glob("usr/local/lib/python3*/dist-packages/tests"))


def test_the_images_have_the_packages_that_are_tested() -> None:
    """Their lock is the part of this checkout's that is no tool of development."""
    ours, all_of_it = (
        {line.split()[0] for line in file.read_text().splitlines() if "==" in line}
        for file in (CHART.parents[1] / "images" / "requirements.lock", CHART.parents[2] / "requirements.lock")
    )
    assert ours < all_of_it
    assert any(line.startswith("ray==") for line in ours)
    assert not any(line.startswith("pytest==") for line in ours)


def test_the_pods_of_the_chart_build_a_graph_that_a_plain_client_fetches(farm: Kubernetes, tmp_path: Path) -> None:
    (worker,) = json.loads(farm.run("workers", "--json"))["workers"]
    assert (worker["name"], worker["state"], worker["isolation"]) == ("farm-worker", "online", "A")
    (tmp_path / "default.nix").write_text(GRAPH)
    shown = farm.run("build", tmp_path / "default.nix", "-A", "everything", "--store", tmp_path / "client", "--json")
    result = json.loads(shown.splitlines()[-1])
    assert result["counts"]["done"] == result["counts"]["total"] == 9
    paths = sorted(path for root in result["roots"] for path in root["outputs"].values())
    store = tmp_path / "plain"
    fetched = nix_store(store, "-r", *paths, options={
        "substituters": f"{farm.url}/cache", "require-sigs": "true",
        "trusted-public-keys": (farm.node.root / "public-key").read_text().strip(),
    })  # fmt: skip
    assert fetched.returncode == 0, fetched.stderr
    assert nix_store(store, "--verify", "--check-contents").returncode == 0


def test_containers_have_the_user_and_the_rights_of_their_manifest_and_write_volumes_alone(farm: Kubernetes) -> None:
    """What the kernel says of the first process of each: nothing of drover's own."""
    for name, pod in farm.pods.items():
        shown = pod.execute("cat", "/proc/1/status").stdout
        status = dict(line.split(":\t", 1) for line in shown.splitlines() if ":\t" in line)
        context = pod.container["securityContext"]
        added = context["capabilities"].get("add", [])
        assert int(status["CapEff"], 16).bit_count() == len(added)
        assert status["NoNewPrivs"] == "1"
        # 2: a filter of system calls.
        assert status["Seccomp"] == ("0" if name == "worker" else "2")
        assert status["Uid"].split()[0] == ("0" if name == "worker" else "64000")
        assert "Read-only file system" in pod.execute("touch", "/usr/local/bin/new").stderr
    # Root in the worker's pod is no one on this machine.
    (seen,) = {Path("/proc", str(pid)).stat().st_uid for pid in processes_with("POD_NAME=farm-worker")[:1]}
    assert seen == ID_START


def test_a_worker_whose_pod_is_deleted_ends_its_build_and_begins_none(farm: Kubernetes, tmp_path: Path) -> None:
    """The last of these tests, since the worker is gone afterwards."""
    salt = f"drain-{os.getpid()}"
    file = tmp_path / "default.nix"
    file.write_text(f"""
      let step = name: needs: script: derivation {{
        inherit name needs; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; salt = "{salt}";
      }};
      first = step "first" [ ] "while [ ! -e go ]; do sleep 0.1; done; echo > $out";
      in {{ second = step "second" [ first ] "echo > $out"; }}
    """)
    worker = farm.pods["worker"]
    command = farm.drover("build", file, "-A", "second", "--store", tmp_path / "client")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as client:
        try:
            until(lambda: bool(processes_with(f"salt={salt}")))
            worker.terminate()
            until(lambda: farm.worker_state() == "draining")
            assert worker.runs
            Path("/proc", str(processes_with(f"salt={salt}")[0]), "cwd", "go").touch()
            assert worker.ended() == 0, worker.log
            until(lambda: farm.worker_state() != "draining")
        finally:
            client.send_signal(signal.SIGINT)
            client.communicate(timeout=WITHIN_S)
    counts = json.loads(farm.run("submissions", "--newest", "1", "--json"))[0]["counts"]
    assert (counts["total"], counts["done"]) == (2, 1)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
