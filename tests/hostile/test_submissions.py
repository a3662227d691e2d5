"""What clients send and ask about submissions is bounded, shared fairly, and never holds the farm up."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from coordinator.framing import encode_derivations
from coordinator.intake import IntakeLimits
from coordinator.schema import MAX_ROOTS
from tests.support.attack import FarmUnderAttack
from tests.support.graphs import Maker
from tests.support.loop import LoopStalls

pytestmark = pytest.mark.e2e

#: Memory that the limits allow beyond the budget: streams, answers, what the allocator keeps.
SLACK_BYTES = 128 * 1024 * 1024


def test_streams_that_inflate_a_thousandfold_share_one_budget_of_memory(readme_farm: FarmUnderAttack) -> None:
    make = Maker()
    members = [make.plain(f"wide-{number}", text="x" * 15_900_000) for number in range(16)]
    stream = b"".join(encode_derivations((made.name, made.data) for made in members))
    assert len(stream) < 1_000_000
    before = readme_farm.process.rss_bytes
    readme_farm.process.reset_peak()
    with LoopStalls(readme_farm.url) as stalls, ThreadPoolExecutor(3) as clients:
        sent = [
            clients.submit(readme_farm.request, "PUT", "/api/v1/intake/derivations", stream, token=readme_farm.token)
            for _ in range(3)
        ]
        assert [each.result().status for each in sent] == [204] * 3
    assert stalls.over(0.05) == 0
    assert readme_farm.process.peak_rss_bytes - before < IntakeLimits().verifying_bytes + SLACK_BYTES


@pytest.mark.parametrize("roots", [MAX_ROOTS + 1, 1_000_000])
def test_a_submission_of_too_many_roots_is_refused_cheaply(readme_farm: FarmUnderAttack, roots: int) -> None:
    drv = Maker().plain("one").drv
    body = b'{"roots":[' + b",".join([json.dumps({"attr": "a", "drv": drv}).encode()] * roots) + b"]}"
    before = readme_farm.process.rss_bytes
    readme_farm.process.reset_peak()
    with LoopStalls(readme_farm.url) as stalls:
        answer = readme_farm.request("POST", "/api/v1/submissions", body, token=readme_farm.token)
    assert answer.status in {400, 413}
    assert b"100000" in answer.body or b"bytes" in answer.body
    assert stalls.over(0.05) == 0
    assert readme_farm.process.peak_rss_bytes - before < 3 * SLACK_BYTES
