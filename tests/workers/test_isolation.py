"""Isolation of builds by an ordinary user's worker."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from tests.support.ordinary import SUBORDINATE_IDS, UID, OrdinaryUser

#: Isolates two workers and builds the same derivation in each; prints what each builder saw, and what fell short.
BUILD_IN_TWO_STORES = """
import asyncio, json, os, subprocess, sys
from pathlib import Path
from infra.daemon import BasicDerivation, BasicOutput, PrintedLines, open_stdio
from workers.agent.isolation import isolate
from workers.agent.settings import WorkerSettings, daemon_argv, inspect_host

SCRIPT = r'''
read line < /proc/self/uid_map; echo $line
for file in /bin/sh /etc/passwd /proc/sys/kernel/core_pattern; do (: >> $file) 2> /dev/null && echo $file; done
echo > $out
'''

async def build(name):
    home = Path.home()
    settings = WorkerSettings(name=name, state_dir=home / name / "state", store=str(home / name / "store"), slots=1)
    found = isolate(settings, inspect_host())
    lines = []
    path = f"/nix/store/{'0' * 32}-said"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **found.environment}
    connection = await open_stdio(daemon_argv(settings, found.machine), environment, found.building)
    async with connection:
        result = await connection.build_derivation(
            f"{path}.drv",
            BasicDerivation(
                outputs=(BasicOutput("out", path),),
                inputs=(),
                system=found.machine.system,
                builder=b"/bin/sh",
                args=(b"-c", SCRIPT.encode()),
                env=((b"out", path.encode()),),
            ),
            lambda event: lines.extend(event.data.decode().splitlines()) if isinstance(event, PrintedLines) else None,
        )
    owner = (home / name / "store/nix/store" / Path(path).name).stat().st_uid
    ids = found.building.uid_map[3:]
    return {"status": result.status.name, "said": lines, "owner": owner, "ids": ids, "lacks": found.shortfall}

print(json.dumps([asyncio.run(build(name)) for name in ("one", "two")]))
"""


@pytest.fixture
def user() -> Iterator[OrdinaryUser]:
    # Not below pytest's directory, which is closed to others.
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    root.chmod(0o755)
    yield OrdinaryUser(root)
    rmtree(root, ignore_errors=True)


def test_an_ordinary_user_with_sub_uids_builds_as_other_users_in_each_store(user: OrdinaryUser) -> None:
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = user.run(
        "env", *(f"{name}={value}" for name, value in path.items()), sys.executable, "-c", BUILD_IN_TWO_STORES
    )
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout)
    for built in (one, two):
        assert built["status"] == "BUILT"
        # Builders are the first of the build users inside, and no root; nothing of the host was written.
        assert built["said"] == ["1000 30001 1"]
        assert built["owner"] == UID
    first, count = SUBORDINATE_IDS
    ranges = [range(start, start + length) for _, start, length in ([0, *built["ids"][1:]] for built in (one, two))]
    assert all(ids.start >= first and ids.stop <= first + count for ids in ranges)
    assert not set(ranges[0]) & set(ranges[1])
