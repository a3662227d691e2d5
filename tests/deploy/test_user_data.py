"""User data as Terraform renders it, run on fresh machines until a worker has joined a farm and built.

Machines are namespaces that the real systemd boots (`machines.py`), so units run as they are written, with their
rights. Real are Nix, Ray, PostgreSQL and S3 too. Stand-ins are what a cloud itself answers (`cloud.py`) and cloud-init,
which here is `sh`; the locked packages of Python are there already, since their installation takes a minute.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.deploy.cloud import AWS, Cloud, Guest, certificate, relayed, serving, with_tls
from tests.deploy.machines import Machine, Network, await_, layer, quietly
from tests.deploy.terraform import copied, plain_user_data, planned, providers, terraform
from tests.support.farm import BIN
from tests.support.patience import PATIENCE_S
from tests.support.servers import BUCKET, PostgresServer, S3Server

pytestmark = pytest.mark.e2e

REPOSITORY: Final = Path(__file__).resolve().parents[2]
ARCHIVE: Final = "archive.example.org"
#: This test's own addresses in the networks of the modules, and that of metadata.
HERE: Final = ("10.77.255.1/16", "10.78.0.1/24", "169.254.169.254/32")
S3_PORT: Final = 9000
TOKEN: Final = "r" * 64
#: Folders and files of an archive, as the documents make one.
PRODUCT: Final = ("coordinator", "infra", "scheduler", "workers", "terraform", "run", "pyproject.toml", "README.md")


def archive(to: Path) -> bytes:
    with tarfile.open(to, "w:gz", compresslevel=1) as tar:
        for name in PRODUCT:
            tar.add(REPOSITORY / name, f"drover/{name}")
    return to.read_bytes()


@dataclass(slots=True)
class Site:
    """The networks, the image of machines, what the cloud answers, and what Terraform has planned."""

    root: Path
    image: Path
    network: Network
    cloud: Cloud
    #: By module, run and address.
    plans: dict[str, dict[str, dict[str, dict[str, Any]]]]
    machines: list[Machine] = field(default_factory=list)

    def boot(self, name: str, address: str, devices: tuple[str, ...] = ()) -> Machine:
        machine = Machine(name, self.root, self.image, devices)
        self.machines.append(machine)
        self.network.plug(machine.pid, address)
        return machine

    def close(self) -> None:
        self.switch_off(*self.machines)

    def switch_off(self, *machines: Machine) -> None:
        for machine in machines:
            machine.close()
            self.machines.remove(machine)

    def guest(self, address: str, instance: str, role: str, run: str = "whole") -> Guest:
        """Tell the cloud of a machine, with the policy of its role."""
        policy = json.loads(self.plans["aws"][run][f"aws_iam_role_policy.{role}"]["policy"])
        guest = Guest(address, instance, policy["Statement"])
        self.cloud.guests[address] = guest
        return guest

    def user_data(self, module: str, run: str, resource: str) -> str:
        return plain_user_data(self.plans[module][run][resource])

    def drover(self, url: str, token: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a client's command in the networks."""
        file = self.root / "api-token"
        file.touch(mode=0o600)
        file.write_text(token)
        environment = {**os.environ, "DROVER_URL": url, "DROVER_TOKEN_FILE": str(file)}
        words = [*self.network.prefix, BIN / "drover", *arguments]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    def api(self, url: str, token: str, path: str) -> Any:
        words = ("curl", "-fsS", "-H", f"Authorization: Bearer {token}", f"{url}/api/v1/{path}")
        return json.loads(self.network.run(*words))


def start(machine: Machine, user_data: str) -> subprocess.Popen[str]:
    """Do what cloud-init does at the first start."""
    machine.run("sh", "-c", "umask 077 && mkdir -p /var/lib/cloud && cat > /var/lib/cloud/user-data", given=user_data)
    return subprocess.Popen(
        machine.command("sh", "/var/lib/cloud/user-data", RETRY_S="1"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, said
    return said


def plans(root: Path, sha256: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Plan the runs of the modules' own tests, with the archive and the bucket that are here."""
    folder = copied(root)
    found = {}
    with providers() as environment:
        for module in ("aws", "hetzner"):
            (file,) = (folder / module / "tests").glob("*.tftest.hcl")
            text = (
                file.read_text()
                .replace("0123456789abcdef" * 4, sha256)
                .replace("https://example.org", f"https://{ARCHIVE}")
            )
            file.write_text(text.replace("drover-cache-1", BUCKET))
            assert terraform(environment, folder / module, "init", "-backend=false").returncode == 0
            found[module] = planned(environment, folder / module)
    return found


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, postgres_server: PostgresServer
) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    content = archive(root / "drover.tar.gz")
    planned_runs = plans(root, hashlib.sha256(content).hexdigest())
    files = certificate(root / "tls", ARCHIVE)
    trusted = Path("/etc/ssl/certs/ca-certificates.crt").read_text() + files[0].read_text()
    here = HERE[0].partition("/")[0]
    image = layer(
        root / "image", REPOSITORY,
        {
            "usr/local/bin/aws": AWS,
            "etc/ssl/certs/ca-certificates.crt": trusted,
            "etc/hosts": f"127.0.0.1 localhost\n{here} {ARCHIVE} db.example.org\n",
            # Of AWS the address of S3 alone is another; credentials come from the machine's role.
            "etc/systemd/system/drover-coordinator.service.d/s3.conf": "[Service]\nEnvironment=AWS_ALLOW_HTTP=true "
            f"AWS_REGION=us-east-1 AWS_ENDPOINT_URL=http://{here}:{S3_PORT}\n",
        },
    )  # fmt: skip
    arns = {
        one["name"]: one["arn"]
        for name, one in planned_runs["aws"]["whole"].items()
        if "secretsmanager_secret." in name
    }
    cloud = Cloud(content, arns, s3_server.access_key, s3_server.secret_key)
    login = {"username": "drover", "password": "p/w%"}
    cloud.secrets["arn:aws:secretsmanager:eu-central-1:1:secret:database"] = json.dumps(login).encode()
    with ExitStack() as stack:
        with psycopg.connect(postgres_server.conninfo("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE drover")
        stack.callback(postgres_server.drop_database, "drover")
        network = Network(*HERE)
        stack.callback(network.close)
        made = Site(root, image, network, cloud, planned_runs)
        stack.callback(made.close)
        stack.enter_context(
            serving(cloud, network.listen("169.254.169.254", 80), with_tls(network.listen("0.0.0.0", 443), files))
        )
        stack.enter_context(relayed({
            network.listen(here, S3_PORT): lambda: asyncio.open_connection("127.0.0.1", s3_server.port),
            network.listen(here, 5432): lambda: asyncio.open_unix_connection(
                str(postgres_server.socket_dir / ".s.PGSQL.5432")
            ),
        }))  # fmt: skip
        yield made


def graph(place: Path, name: str, seconds: int) -> Path:
    """A derivation that takes so long; the shell of a sandbox is a busybox."""
    file = place / f"{name}.nix"
    file.write_text(
        f"""derivation {{
          name = "{name}"; system = "x86_64-linux"; builder = "/bin/sh";
          args = [ "-c" "sleep {seconds}; echo {name} > $out" ];
        }}"""
    )
    return file


def built(site: Site, farm: tuple[str, str], name: str, meanwhile: Callable[[], object], seconds: int = 0) -> str:
    """Build on a farm (URL and token), fetch the result with a plain Nix client, and return the worker's name."""
    url, token = farm
    store = site.root / f"client-{name}"
    ran = site.drover(url, token, "build", graph(site.root, name, seconds), "--store", store, "--detach", "--json")
    assert ran.returncode == 0, ran.stderr
    submission = json.loads(ran.stdout.splitlines()[-1])["id"]
    meanwhile()
    await_(lambda: site.api(url, token, f"submissions/{submission}")["state"] != "running", "the build did not end")
    (step,) = site.api(url, token, f"submissions/{submission}/steps")
    assert step["state"] == "done", site.drover(url, token, "why", step["key"]).stdout
    keys = " ".join(site.api(url, token, "farm")["public_keys"])
    path = step["outputs"]["out"]
    options = {"substituters": f"{url}/cache", "trusted-public-keys": keys, "build-users-group": ""}
    words = [word for option, value in options.items() for word in ("--option", option, value)]
    fetched = subprocess.run(
        [*site.network.prefix, "nix-store", "--store", site.root / f"plain-{name}", "-r", path, *words],
        capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(site.root)},
    )  # fmt: skip
    assert fetched.returncode == 0, fetched.stderr
    return str(step["worker"])


def test_a_coordinator_and_a_spot_worker_of_aws_make_a_farm_that_builds_and_drain_when_told(site: Site) -> None:
    coordinator = site.boot("coordinator", "10.77.0.10/16")
    site.guest("10.77.0.10", "i-coordinator", "coordinator")
    worker = site.boot("worker", "10.77.0.21/16")
    spot = site.guest("10.77.0.21", "i-spot", "worker")
    first = start(coordinator, site.user_data("aws", "whole", 'aws_instance.coordinator["a"]'))
    # At the same time: it waits for the token.
    second = start(worker, site.user_data("aws", "whole", 'aws_launch_template.worker["cheap"]'))
    assert finished(first).endswith("this machine is a coordinator\n")
    assert finished(second).endswith("this machine is a worker\n")
    shared = json.loads(site.cloud.secrets["drover/coordinators"])
    assert shared.keys() == {"api-token", "cache-key", "upload-secret"}
    url, token = "http://10.77.0.10:7878", shared["api-token"].strip()
    worker.until("has joined the farm", "drover-worker")

    def interrupt() -> None:
        """AWS takes the machine back in two minutes, and it builds."""
        await_(lambda: any(one["leases"] for one in site.api(url, token, "workers")), "the worker does not build")
        spot.metadata["spot/instance-action"] = json.dumps({"action": "terminate"})
        worker.until("the spot machine is taken back", "drover-drain")

    assert built(site, (url, token), "interrupted", interrupt, seconds=6) == "i-spot"
    await_(
        lambda: worker.run("systemctl", "is-active", "drover-worker").stdout == "inactive\n", "the worker does not end"
    )
    assert worker.run("systemctl", "show", "-P", "Result", "drover-worker").stdout == "success\n"
    assert [one for one in site.api(url, token, "workers") if one["state"] == "online"] == []
    assert site.cloud.refused == []
    # A worker's role opens the token and nothing else.
    assert worker.run("aws", "secretsmanager", "get-secret-value", "--secret-id", "drover/coordinators").returncode
    assert site.cloud.refused == [("i-spot", "drover/coordinators")]
    site.cloud.refused.clear()
    site.switch_off(coordinator, worker)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A disk with a file system, as a volume of Hetzner is; return its device's name."""
    file = tmp_path / "disk"
    with file.open("wb") as made:
        made.truncate(1 << 30)
    quietly("mkfs.ext4", "-q", file)
    device = quietly("losetup", "--find", "--show", file).strip()
    yield device.removeprefix("/dev/")
    quietly("losetup", "--detach", device)


def give(machine: Machine, name: str, value: str) -> None:
    """Do what the module's provisioner does over ssh."""
    place = "/etc/drover/given"
    put = f"umask 077 && mkdir -p {place} && cat > {place}/{name}.new && chmod 400 {place}/{name}.new"
    assert machine.run("sh", "-c", f"{put} && mv {place}/{name}.new {place}/{name}", given=value).returncode == 0


def test_a_coordinator_and_a_worker_of_hetzner_make_a_farm_that_builds(site: Site, disk: str) -> None:
    run = "without_bucket_and_domain"
    coordinator = site.boot("drover-coordinator", "10.77.200.1/16", (disk,))
    worker = site.boot("drover-x86-1", "10.77.200.2/16")
    first = start(coordinator, site.user_data("hetzner", run, "hcloud_server.coordinator"))
    user_data = site.user_data("hetzner", run, 'hcloud_server.worker["drover-x86-1"]')
    second = start(worker, user_data)
    # The private network, the volume and the secrets come after the start.
    site.network.plug(coordinator.pid, "10.78.0.10/24", "eth1")
    site.network.plug(worker.pid, "10.78.0.3/24", "eth1")
    coordinator.run("mkdir", "-p", "/dev/disk/by-id")
    coordinator.run("ln", "-s", f"/dev/{disk}", "/dev/disk/by-id/scsi-0HC_Volume_77")
    for machine in (coordinator, worker):
        give(machine, "ray-token", TOKEN)
    assert finished(first).endswith("this machine is a coordinator\n")
    assert finished(second).endswith("this machine is a worker\n")
    assert coordinator.run("findmnt", "-no", "SOURCE", "/var/lib/drover").stdout == f"/dev/{disk}\n"
    # As the module's output shows it.
    coordinator.until("public key", "drover-coordinator")
    worker.until("has joined the farm", "drover-worker")
    url, token = "http://10.78.0.10:7878", coordinator.read("/var/lib/drover/secrets/api-token").strip()
    assert built(site, (url, token), "plain", lambda: None) == "drover-x86-1"
    # What has not changed is let alone.
    main = worker.run("systemctl", "show", "-P", "MainPID", "drover-worker").stdout
    finished(start(worker, user_data))
    assert worker.run("systemctl", "show", "-P", "MainPID", "drover-worker").stdout == main
    site.switch_off(coordinator, worker)


#: Commands of macOS on a machine that is none.
MAC: Final = {
    "uname": "echo Darwin",
    "sudo": 'shift; exec "$@"',
    "launchctl": 'case "$1" in\nprint) exec test -e /run/joined ;;\nbootstrap) touch /run/joined ;;\n'
    'bootout) rm /run/joined ;;\nesac\necho "$*" >> /run/launchd',
}


def mac(site: Site, address: str) -> tuple[Machine, str, Path]:
    """Boot what looks like a Mac with ssh; return it, its host key and the private key that opens it."""
    machine = site.boot("mini1", f"{address}/16")
    for name, script in MAC.items():
        put = f"cat > /usr/local/bin/{name} && chmod 755 /usr/local/bin/{name}"
        machine.run("sh", "-c", put, given=f"#!/bin/sh\n{script}\n")
    key = site.root / "key"
    quietly("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    machine.run("sh", "-c", "umask 077; mkdir -p /root/.ssh /Library/LaunchDaemons; cat > /root/.ssh/authorized_keys",
                given=key.with_suffix(".pub").read_text())  # fmt: skip
    # As a Mac has them; Terraform asks for the first kind.
    keys = {
        kind: machine.run("dropbearkey", "-t", kind, "-f", f"/etc/{kind}").stdout
        for kind in ("ecdsa", "rsa", "ed25519")
    }
    host_key = " ".join(next(one for one in keys["ecdsa"].splitlines() if one.startswith("ecdsa-")).split()[:2])
    machine.run("dropbear", "-s", *(word for kind in keys for word in ("-r", f"/etc/{kind}")))
    return machine, host_key, key


def test_a_mac_joins_over_ssh_and_leaves_again(site: Site) -> None:
    address = "10.77.0.31"
    machine, host_key, key = mac(site, address)
    (site.root / "given-token").write_text(TOKEN)
    folder = site.root / "terraform" / "mac-fleet"
    text = site.user_data("aws", "whole", 'aws_instance.coordinator["a"]')
    known = dict(re.findall(r"^export (SOURCE_\w+)='(.*)'$", text, re.MULTILINE))
    variables = {
        "head": "10.77.0.10:6379", "source_url": known["SOURCE_URL"], "source_sha256": known["SOURCE_SHA256"],
        "ray_token_file": str(site.root / "given-token"), "private_key_file": str(key),
        "macs": {"mini1": {"ssh_host": address, "host_key": host_key, "user": "root", "features": ["big-parallel"]}},
    }  # fmt: skip

    def run(verb: str, **changed: str) -> subprocess.CompletedProcess[str]:
        # A wrong key is wrong for as long as it is tried; the right one may find a machine that is busy.
        given = {**variables, "connect_within_s": 10 if changed else 120}
        given["macs"] = {"mini1": {**variables["macs"]["mini1"], **changed}}
        (folder / "terraform.tfvars.json").write_text(json.dumps(given))
        return subprocess.run(
            [*site.network.prefix, "terraform", f"-chdir={folder}", verb, "-no-color", "-auto-approve"],
            env={**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert terraform({**os.environ, "TF_CLI_CONFIG_FILE": os.devnull}, folder, "init").returncode == 0
    # Another machine at its address gets nothing.
    ran = run("apply", host_key=" ".join(key.with_suffix(".pub").read_text().split()[:2]))
    assert "SSH authentication failed" in ran.stderr
    assert machine.run("test", "-e", "/root/.drover-setup").returncode
    ran = run("apply")
    assert ran.returncode == 0, ran.stderr + machine.run("journalctl", "--no-pager", "-t", "dropbear").stdout
    assert machine.read("/run/launchd") == "bootstrap system /Library/LaunchDaemons/org.drover.worker.plist\n"
    assert machine.read("/etc/drover/ray-token") == TOKEN
    assert machine.run("stat", "-c", "%a", "/etc/drover/ray-token").stdout == "400\n"
    assert machine.run("test", "-e", "/root/.drover-setup/ray-token").returncode
    assert "ADDRESS=10.77.0.31\nNAME=mini1\n" in machine.read("/etc/drover/worker.env")
    assert TOKEN not in (folder / "terraform.tfstate").read_text()
    # The script of the plist, with these files, starts the worker that they name.
    shown = machine.run("env", "DROVER=/bin/echo", "/opt/drover/infra/deploy/launchd/worker.sh").stdout
    assert shown.startswith("worker --head 10.77.0.10:6379 --host 10.77.0.31 --name mini1")
    assert "--feature big-parallel" in shown
    ran = run("destroy")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert machine.read("/run/launchd").splitlines()[-1] == "bootout system/org.drover.worker"
    assert machine.run("test", "-e", "/etc/drover/ray-token").returncode
    site.switch_off(machine)
