"""Requests about submissions are bounded and shared fairly, and never hold the farm up."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from coordinator.api.limits import MAX_ROOTS
from coordinator.api.sent_streams import encode_derivations
from coordinator.intake.limits import IntakeLimits
from tests.support.attack import FarmUnderAttack
from tests.support.graphs import Maker
from tests.support.loop import LoopStalls

pytestmark = pytest.mark.e2e

#: Memory that the limits allow beyond the budget: streams, answers, what the allocator keeps.
SLACK_BYTES = 128 * 1024 * 1024


def test_streams_that_inflate_a_thousandfold_share_one_budget_of_memory(own_farm: FarmUnderAttack) -> None:
    make = Maker()
    members = [make.plain(f"wide-{number}", text="x" * 15_900_000) for number in range(16)]
    stream = b"".join(encode_derivations((made.name, made.data) for made in members))
    assert len(stream) < 1_000_000
    before = own_farm.process.rss_bytes
    own_farm.process.reset_peak()
    with LoopStalls(own_farm.url) as stalls, ThreadPoolExecutor(3) as clients:
        sent = [
            clients.submit(own_farm.request, "PUT", "/api/v1/intake/derivations", stream, token=own_farm.token)
            for _ in range(3)
        ]
        assert [each.result().status for each in sent] == [204] * 3
    assert stalls.over(0.05) == 0
    assert own_farm.process.peak_rss_bytes - before < IntakeLimits().verifying_bytes + SLACK_BYTES


@pytest.mark.parametrize("roots", [MAX_ROOTS + 1, 1_000_000])
def test_a_submission_of_too_many_roots_is_refused_cheaply(own_farm: FarmUnderAttack, roots: int) -> None:
    drv = Maker().plain("one").drv
    body = b'{"roots":[' + b",".join([json.dumps({"attr": "a", "drv": drv}).encode()] * roots) + b"]}"
    before = own_farm.process.rss_bytes
    own_farm.process.reset_peak()
    with LoopStalls(own_farm.url) as stalls:
        answer = own_farm.request("POST", "/api/v1/submissions", body, token=own_farm.token)
    assert answer.status in {400, 413}
    assert b"100000" in answer.body or b"bytes" in answer.body
    assert stalls.over(0.05) == 0
    assert own_farm.process.peak_rss_bytes - before < 3 * SLACK_BYTES


def test_lists_are_paged_name_few_roots_and_lose_nothing(own_farm: FarmUnderAttack) -> None:
    """Many roots of one recipe that is held: the graph that made the list of submissions 41 MB long."""
    built = own_farm.build_text('shell "held" "echo > $out"', "--json")
    root = json.loads(built.stdout.splitlines()[-1])["roots"][0]
    roots = [{"attr": f"attribute-{number}", "drv": root["drv"]} for number in range(6008)]
    for number in range(12):
        wish = json.dumps({"label": f"label-{number}", "roots": roots}).encode()
        answer = own_farm.request("POST", "/api/v1/submissions", wish, token=own_farm.token)
        assert answer.status == 201, answer.body
        # Few roots suffice for a client that has just sent them all; it asks for the rest where it shows them.
        accepted = json.loads(answer.body)
        assert (len(accepted["roots"]), accepted["root_count"]) == (3, 6008)

    def pages(target: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while target:
            answer = own_farm.request("GET", target, token=own_farm.token)
            assert answer.status == 200
            assert len(answer.body) < 1_000_000
            found += json.loads(answer.body)
            link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("Link", ""))
            target = link[1] if link else ""
        return found

    before = own_farm.process.rss_bytes
    own_farm.process.reset_peak()
    with LoopStalls(own_farm.url) as stalls:
        listed = pages("/api/v1/submissions?limit=5")
        newest = listed[0]["id"]
        steps = pages(f"/api/v1/submissions/{newest}/steps")
        every = pages(f"/api/v1/submissions/{newest}/roots?limit=1000")
    assert [each["label"] for each in listed][:12] == [f"label-{number}" for number in reversed(range(12))]
    assert [len(each["roots"]) for each in listed[:12]] == [3] * 12
    assert [each["root_count"] for each in listed[:12]] == [6008] * 12
    assert [each["attr"] for each in every] == [each["attr"] for each in roots]
    assert [each["state"] for each in steps] == ["done"]
    assert stalls.over(0.05) == 0
    assert own_farm.process.peak_rss_bytes - before < SLACK_BYTES
    status = own_farm.drover("status", "--json").stdout
    assert len(json.loads(status)["submissions"]) == len(listed)
