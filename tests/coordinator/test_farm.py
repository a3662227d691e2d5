"""The coordinator as a whole: what is submitted over HTTP is built, published, counted and told."""

from __future__ import annotations

from coordinator.schema import Counts, SubmissionState
from tests.coordinator.conftest import OpenFarm

DIAMOND = """
rec {
  low = run "low" "echo low > $out";
  left = run "left" "read x < ${low}; echo left $x > $out";
  right = run "right" "read x < ${low}; echo right $x > $out";
  top = run "top" "read l < ${left}; read r < ${right}; echo $l and $r > $out; echo done with top";
}
"""


async def test_a_submitted_graph_is_built_in_order_and_published(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        submitted = await farm.submit(DIAMOND, "top", label="diamond")
        view = await farm.ended(submitted.id)
        assert (view.state, view.label) == (SubmissionState.SUCCEEDED, "diamond")
        assert view.counts == Counts(total=4, done=4)
