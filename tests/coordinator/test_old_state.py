"""A state directory that an earlier version left, as it lay after `drover up` was stopped, opens with this one.

`state_0_1_0.tar.xz` was made by a farm of commit 9335fc3 (0.1.0 before its release) with one worker: a graph of two
steps that succeeded, and one with a step that failed. The token and the keys in it belong to that farm alone.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import aiohttp
import pytest
import zstandard

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.config import LimitSettings, Settings
from infra.nix import narinfo
from infra.nix.base32 import encode
from infra.nix.signing import PublicKey
from infra.nix.store_path import StoreDir
from tests.coordinator.conftest import OpenFarm

LEFT = Path(__file__).with_name("state_0_1_0.tar.xz")
#: The submissions end longer ago every day.
NEVER_FORGET_DAYS = 1000 * 365
#: What was submitted; the outputs' paths follow from it.
GRAPH = """
rec {
  low = run "low" "echo low > $out; echo made low";
  top = run "top" "read x < ${low}; echo top of $x > $out; echo made top";
}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with tarfile.open(LEFT) as archive:
        archive.extractall(tmp_path / "farm", filter="data")
    return Settings(state_dir=tmp_path / "farm", port=0, limits=LimitSettings(history_days=NEVER_FORGET_DAYS))


async def test_outputs_of_an_earlier_version_are_shown_and_served_and_not_built_again(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, aiohttp.ClientSession() as web:
        failed, kept = await farm.client.submissions()
        assert (failed.label, failed.state) == ("failed", SubmissionState.FAILED)
        assert (kept.label, kept.state, kept.counts.done) == ("kept", SubmissionState.SUCCEEDED, 2)
        steps = {step.name: step for step in await farm.client.steps(failed.id)}
        assert steps["broken"].state is StepStatus.FAILED
        assert b"".join([chunk async for chunk in farm.client.log(kept.roots[0].step)]) == b"made top\n"

        (output,) = [step.outputs["out"] for step in await farm.client.steps(kept.id) if step.name == "top"]
        cache = farm.coordinator.ready.cache_url
        async with web.get(f"{cache}/{output.rpartition('/')[2][:32]}.narinfo") as answer:
            info = narinfo.parse(await answer.read(), StoreDir("/nix/store"))
        (key,) = (await farm.client.farm()).public_keys
        assert PublicKey.parse(key).verify(info.path.fingerprint(), info.path.sigs[0])
        async with web.get(f"{cache}/{info.stored.url}") as answer:
            nar = zstandard.ZstdDecompressor().decompressobj().decompress(await answer.read())
        assert info.path.nar_hash == f"sha256:{encode(hashlib.sha256(nar).digest())}"
        assert b"top of low\n" in nar

        again = await farm.ended((await farm.submit(GRAPH, "top")).id)
        assert (again.state, again.counts.done) == (SubmissionState.SUCCEEDED, 0)
        assert again.counts.held == again.counts.total
