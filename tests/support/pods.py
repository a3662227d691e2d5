"""Pods on this machine: what a kubelet and a container runtime make of a pod's specification, with crun.

A pod here is what the manifest says: command, environment, files of Secrets and ConfigMaps, volumes, user, rights,
system calls, a file system that is only read, a user namespace, a network of its own, and names of services. What is
not here: a scheduler, NetworkPolicies, limits of processor and memory, more than one container that stays.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.idmaps import ID_COUNT, ID_START, idmapped
from tests.support.patience import PATIENCE_S

#: As containerd has them, for a container that names none.
DEFAULT_CAPABILITIES: Final = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)
#: What `procMount: Default` covers and protects.
MASKED: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
)
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
#: The profile that container runtimes of Debian have in common.
SECCOMP: Final = Path("/usr/share/containers/seccomp.json")
#: Only end a test that hangs.
WITHIN_S: Final = PATIENCE_S


#: What becomes crun, where control groups of both versions are mounted too, which it refuses: it makes none here.
CRUN: Final = (
    *("unshare", "--mount", "sh", "-c", '! umount /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"', "sh"),
    "--cgroup-manager=disabled",
)


def run(*command: str | Path) -> str:
    """Run a command that must succeed; return what it wrote."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (command, ran.stderr)
    return ran.stdout


@dataclass(frozen=True, slots=True)
class Image:
    """An image of buildah's storage, mounted: its files, and what its configuration says."""

    root: Path
    environment: tuple[str, ...]
    user: str


@dataclass
class Node:
    """One machine of a cluster: a bridge, what its pods are called, and what was given to the cluster."""

    root: Path
    namespace: str
    images: Mapping[str, Image]
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    configs: dict[str, dict[str, str]] = field(default_factory=dict)
    #: Name of a service -> its port -> the address of the pod that it selects.
    services: dict[str, tuple[int, str]] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        number = os.getpid() % 16384
        self.bridge = f"drk{number}"
        self._network = f"10.{214 + number // 8192}.{number // 64 % 128 + 1}"
        self._given = 1
        self._cables = 0
        run("ip", "link", "add", self.bridge, "type", "bridge")
        self.stack.callback(run, "ip", "link", "del", self.bridge)
        run("ip", "addr", "add", f"{self._network}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def address(self) -> str:
        """Return an address that no pod has."""
        self._given += 1
        return f"{self._network}.{self._given}"

    def cable(self, address: str) -> str:
        """Return commands that give the network of process $pid an address and a cable to the bridge."""
        self._cables += 1
        name = f"{self.bridge}n{self._cables}"
        # The same for all containers of a pod, so that others need not learn it anew.
        mac = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        return (
            f"ip link add {name} type veth peer name eth0 address {mac} netns $pid\n"
            f"ip link set {name} master {self.bridge} up\n"
            f"inside() {{ nsenter -t $pid -n ip $@; }}\n"
            f"inside addr add {address}/24 dev eth0\ninside link set lo up\ninside link set eth0 up\n"
        )

    def hosts(self) -> str:
        """Return what the cluster's name server would answer, as lines of /etc/hosts."""
        return "".join(
            f"{address} {name}.{self.namespace}.svc {name}.{self.namespace}.svc.cluster.local {name}\n"
            for name, (_, address) in self.services.items()
        )


class Pod:
    """One pod, from its init containers to its end."""

    def __init__(self, node: Node, name: str, template: Mapping[str, Any], address: str) -> None:
        """`template` has the pod's metadata and specification as the API server would have them."""
        self.node, self.name, self.address = node, name, address
        self.spec: Mapping[str, Any] = template["spec"]
        self.labels: Mapping[str, str] = template["metadata"].get("labels", {})
        self.in_user_namespace = self.spec.get("hostUsers") is False
        self._shift = ID_START if self.in_user_namespace else 0
        self.place = node.root / name
        self.place.mkdir(parents=True)
        self._volumes = {volume["name"]: self._volume(volume) for volume in self.spec["volumes"]}
        self._roots: dict[str, Path] = {}
        self._process: subprocess.Popen[bytes] | None = None
        (self.container,) = self.spec["containers"]
        self.log_path = self.place / "log"

    @property
    def log(self) -> str:
        """What the pod's containers have written."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> Pod:
        """Run the init containers one after the other, then start the container."""
        for container in self.spec.get("initContainers", ()):
            process = self._start(container)
            try:
                status = process.wait(WITHIN_S)
            except subprocess.TimeoutExpired:
                status = -1
                run(*CRUN, "delete", "--force", self._id(container))
                process.wait()
            assert status == 0, f"{self.name}: {container['name']} ended with {status}: {self.log}"
        self._process = self._start(self.container)
        return self

    def wait_ready(self) -> Pod:
        """Wait until the startup probe has succeeded and then the readiness probe, as they stand in the manifest."""
        for kind in ("startupProbe", "readinessProbe"):
            if probe := self.container.get(kind):
                self._until(lambda probe=probe: self.probe(probe), kind)  # type: ignore[misc]
        assert self.probe(self.container["livenessProbe"]), self.log
        return self

    def probe(self, probe: Mapping[str, Any]) -> bool:
        """Return whether a probe succeeds now."""
        if "exec" in probe:
            return self.execute(*probe["exec"]["command"]).returncode == 0
        kind = "tcpSocket" if "tcpSocket" in probe else "httpGet"
        port = next(one["containerPort"] for one in self.container["ports"] if one["name"] == probe[kind]["port"])
        try:
            if kind == "tcpSocket":
                socket.create_connection((self.address, port), 5).close()
                return True
            with urllib.request.urlopen(f"http://{self.address}:{port}{probe[kind]['path']}", timeout=5):
                return True
        except (OSError, urllib.error.HTTPError):
            return False

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        words = [*CRUN, "exec", self._id(self.container), *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def terminate(self) -> None:
        """Begin the pod's end: its preStop hook if it has one, then SIGTERM."""
        hook = self.container.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook:
            assert self.execute(*hook["command"]).returncode == 0
        run(*CRUN, "kill", self._id(self.container), "TERM")

    def ended(self) -> int:
        """Wait for the container's end within the pod's grace; return its exit status."""
        assert self._process is not None
        return self._process.wait(min(self.spec["terminationGracePeriodSeconds"], WITHIN_S))

    @property
    def runs(self) -> bool:
        """Return whether the container has begun and not ended."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the container, at once if it does not end by itself."""
        if self._process is None or self._process.poll() is not None:
            return
        run(*CRUN, "kill", self._id(self.container), "TERM")
        try:
            self.ended()
        except subprocess.TimeoutExpired:
            run(*CRUN, "kill", self._id(self.container), "KILL")
            self._process.wait()

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not holds():
            assert self.runs, f"{self.name} ended before its {what} succeeded: {self.log}"
            assert time.monotonic() < deadline, f"{self.name}: {what} does not succeed: {self.log}"
            time.sleep(0.1)

    def _id(self, container: Mapping[str, Any]) -> str:
        return f"{self.node.bridge}-{self.name}-{container['name']}"

    def _start(self, container: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """Start a container: its namespaces first, then its network, then its program."""
        bundle = self.place / container["name"]
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._runtime(container)))
        name = self._id(container)
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [*CRUN, "run", "--bundle", bundle, name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        """Make a volume as a kubelet does; return its directory."""
        place = Path(self.place, "volumes", volume["name"])
        place.mkdir(parents=True)
        group = self.spec.get("securityContext", {}).get("fsGroup")
        if "secret" in volume or "configMap" in volume:
            self._files(place, volume, group)
        else:
            assert {"emptyDir", "persistentVolumeClaim"} & volume.keys(), volume
            os.chown(place, self._shift, group if group is not None else self._shift)
            place.chmod(0o777 if "emptyDir" in volume else 0o755 if group is None else 0o2775)
        return place

    def _files(self, place: Path, volume: Mapping[str, Any], group: int | None) -> None:
        """Write the files of a Secret or ConfigMap: links to a directory that is replaced as a whole."""
        secret = volume.get("secret")
        data = self.node.secrets[secret["secretName"]] if secret else self.node.configs[volume["configMap"]["name"]]
        given = secret or volume["configMap"]
        mode = given.get("defaultMode", 0o644)
        items = given.get("items") or [{"key": key, "path": key} for key in data]
        whole = place / "..2026_11_30"
        whole.mkdir()
        (place / "..data").symlink_to(whole.name)
        for item in items:
            file = whole / item["path"]
            file.write_text(data[item["key"]])
            # A volume's group may read what is in it.
            file.chmod(mode if group is None else mode | 0o440)
            os.chown(file, self._shift, group if group is not None else self._shift)
            (place / item["path"]).symlink_to(f"..data/{item['path']}")

    def _environment(self, container: Mapping[str, Any], image: Image) -> dict[str, str]:
        found = {name: value for name, _, value in (one.partition("=") for one in image.environment)}
        if self.spec.get("enableServiceLinks", True):
            for name, (port, address) in self.node.services.items():
                prefix = name.upper().replace("-", "_")
                found |= {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(port)}
                found[f"{prefix}_PORT"] = f"tcp://{address}:{port}"
        for one in container.get("env", ()):
            source = one.get("valueFrom", {})
            if "fieldRef" in source:
                value = self._field(source["fieldRef"]["fieldPath"])
            elif "secretKeyRef" in source:
                value = self.node.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            else:
                value = expanded(one.get("value", ""), found)
            found[one["name"]] = value
        return found | {"HOSTNAME": self.name}

    def _field(self, path: str) -> str:
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        if label:
            return self.labels[label[1]]
        known = {"status.podIP": self.address, "metadata.name": self.name, "metadata.namespace": self.node.namespace}
        return known[path]

    def _root(self, image: Image) -> Path:
        """Return the image's files as the pod sees them: in a user namespace they belong to its users."""
        if not self.in_user_namespace:
            return image.root
        if str(image.root) not in self._roots:
            self._roots[str(image.root)] = self.node.stack.enter_context(idmapped(image.root, self.place / "root"))
        return self._roots[str(image.root)]

    def _runtime(self, container: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the runtime is told of a container: the OCI's config.json."""
        image = self.node.images[container["image"]]
        context = {**self.spec.get("securityContext", {}), **container.get("securityContext", {})}
        environment = self._environment(container, image)
        image_uid, _, image_gid = (image.user or "0").partition(":")
        uid, gid = int(context.get("runAsUser", image_uid)), int(context.get("runAsGroup", image_gid or 0))
        assert uid != 0 or not context.get("runAsNonRoot"), f"{container['name']} would run as root"
        capabilities = capabilities_of(context)
        rights = [f"CAP_{name}" for name in sorted(capabilities)]
        words = [expanded(word, environment) for word in (*container["command"], *container.get("args", ()))]
        unmasked = context.get("privileged") or context.get("procMount") == "Unmasked"
        kinds = ["pid", "ipc", "uts", "mount", "network", *(["user"] if self.in_user_namespace else [])]
        ids = [{"containerID": 0, "hostID": ID_START, "size": ID_COUNT}]
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": uid, "gid": gid, "additionalGids": [*filter(None, [context.get("fsGroup")])]},
                "args": words,
                "env": [f"{name}={value}" for name, value in environment.items()],
                "cwd": container.get("workingDir", "/"),
                "capabilities": {"bounding": rights, "effective": rights, "permitted": rights},
                "noNewPrivileges": not context.get("allowPrivilegeEscalation", True),
            },
            "root": {"path": str(self._root(image)), "readonly": bool(context.get("readOnlyRootFilesystem"))},
            "hostname": self.name,
            "mounts": self._mounts(container),
            "linux": {
                "namespaces": [{"type": kind} for kind in kinds],
                **({"uidMappings": ids, "gidMappings": ids} if self.in_user_namespace else {}),
                "maskedPaths": [] if unmasked else MASKED,
                "readonlyPaths": [] if unmasked else READ_ONLY,
                **seccomp(context, capabilities),
            },
            # Once there are namespaces, and before the program begins.
            "hooks": {"createRuntime": [{"path": "/bin/sh", "args": ["sh", str(self._hook(container))]}]},
        }

    def _hook(self, container: Mapping[str, Any]) -> Path:
        """Write what gives the container the pod's address: the runtime tells it the process on standard input."""
        file = self.place / f"{container['name']}.network"
        file.write_text(
            "set -e\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
            """pid=$(sed -n 's/.*"pid"[^0-9]*\\([0-9]*\\).*/\\1/p' | head -n 1)\n""" + self.node.cable(self.address)
        )
        return file

    def _mounts(self, container: Mapping[str, Any]) -> list[dict[str, Any]]:
        hosts = self.place / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n{self.node.hosts()}")
        own = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
        plain = [
            mount("/proc", "proc", "proc"),
            mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
            mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            mount("/etc/hosts", "bind", hosts, "rbind", "rw"),
        ]
        given = [
            mount(one["mountPath"], "bind", self._volumes[one["name"]], "rbind", "ro" if one.get("readOnly") else "rw")
            for one in container.get("volumeMounts", ())
        ]
        return [*(one for one in plain if one["destination"] not in own), *given]


def mount(destination: str, kind: str, source: str | Path, *options: str) -> dict[str, Any]:
    """Return one entry of `mounts`."""
    return {"destination": destination, "type": kind, "source": str(source), "options": list(options)}


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """Return a value or argument with its $(NAME) of the environment; what is not there stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


def capabilities_of(context: Mapping[str, Any]) -> set[str]:
    """Return the capabilities that a container has, without CAP_."""
    if context.get("privileged"):
        last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
        shown = run("capsh", f"--decode={(1 << (last + 1)) - 1:016x}")
        return {word.strip().removeprefix("cap_").upper() for word in shown.partition("=")[2].split(",")}
    asked = context.get("capabilities", {})
    dropped = set(asked.get("drop", ()))
    kept = set() if "ALL" in dropped else set(DEFAULT_CAPABILITIES) - dropped
    return kept | set(asked.get("add", ()))


def seccomp(context: Mapping[str, Any], capabilities: set[str]) -> dict[str, Any]:
    """Return the system calls that a container may use: the runtime's profile for such capabilities, or all."""
    if context.get("privileged") or context.get("seccompProfile", {}).get("type", "Unconfined") == "Unconfined":
        return {}
    profile = json.loads(SECCOMP.read_text())
    mine = {"arches": {"amd64"}, "caps": {f"CAP_{name}" for name in capabilities}}

    def applies(rule: Mapping[str, Any]) -> bool:
        wanted, unwanted = rule.get("includes") or {}, rule.get("excludes") or {}
        return all(set(wanted.get(kind, ())) <= have for kind, have in mine.items() if kind != "arches") and all(
            not set(unwanted.get(kind, ())) & have for kind, have in mine.items()
        ) and (not wanted.get("arches") or bool(set(wanted["arches"]) & mine["arches"]))  # fmt: skip

    keys = ("names", "action", "args", "errnoRet")
    return {"seccomp": {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile.get("defaultErrnoRet", 1),
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{key: rule[key] for key in keys if rule.get(key) is not None}
                     for rule in profile["syscalls"] if applies(rule)],
    }}  # fmt: skip
