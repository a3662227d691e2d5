"""A worker that builds for long gets the large inputs of what it builds next meanwhile."""

from __future__ import annotations

import urllib.request

import pytest

from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.farm import nix_store

from .test_collected_inputs import physical, store

pytestmark = pytest.mark.e2e

#: More than what is worth a hint: a second at the rate of a worker of which none is measured.
MEGABYTES = 100


def test_inputs_of_the_next_lease_are_there_before_the_first_build_ends(one: FarmUnderFault) -> None:
    file = one.graph(
        f"""
        large = derivation {{
          name = "large"; system = "x86_64-linux"; builder = "/bin/sh"; salt = "{one.root}";
          args = [ "-c" "/bin/busybox dd if=/dev/zero of=$out bs=1M count={MEGABYTES}" ];
        }};
        long = step "long" [ ] "while [ ! -e /tally/end ]; do /bin/busybox sleep 0.1; done";
        next = step "next" [ large ] "/bin/busybox wc -c < ${{large}}";
        """
    )
    assert one.farm.drover("drain", "left").returncode == 0
    [root] = one.ended(one.submit(file, "large"))["roots"]
    large = root["outputs"]["out"]
    assert one.farm.drover("drain", "left", "--off").returncode == 0
    assert one.farm.drover("drain", "right").returncode == 0
    long = one.submit(file, "long")
    one.until(lambda: one.runs()["long"])
    assert not physical(one, "left", large).exists()
    submission = one.submit(file, "next")
    one.until(lambda: nix_store(store(one, "left"), "--check-validity", large).returncode == 0)
    assert one.view(long)["state"] == "running"
    assert not one.runs()["next"]
    (one.tally / "end").touch()
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.api(f"submissions/{submission}/steps")
    one.can_be_fetched(view)
    assert metric(one, "drover_helped_attempts_total") >= 1
    assert metric(one, "drover_fetched_ahead_bytes_total") > MEGABYTES << 20


def metric(one: FarmUnderFault, name: str) -> float:
    token = (one.farm.secrets / "api-token").read_text().strip()
    request = urllib.request.Request(f"{one.farm.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
