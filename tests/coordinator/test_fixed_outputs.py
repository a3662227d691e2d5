"""Sources never fail twice: what a fixed output wants and the farm has is neither fetched nor built."""

from __future__ import annotations

import hashlib

from coordinator.intake.fixed_outputs import FixedOutputs
from infra.cache.pulls.content_offers import ContentOffers
from infra.nix.content import FixedContent
from tests.coordinator.test_intake import IntakeHarness, limits, make, needs, room
from tests.infra.cache.test_content_offers import put
from tests.infra.nix.test_content import plain_file
from tests.support.graphs import Maker

__all__ = ["limits", "make", "room"]

CONTENT = FixedContent("", "sha256", hashlib.sha256(b"bytes").digest())


async def test_a_graph_ends_at_a_source_whose_content_is_here_under_another_name(
    room: IntakeHarness, make: Maker
) -> None:
    curl = make.plain("curl")
    source, stranger = make.fixed("source-1.1.tar.gz", b"bytes", [curl]), make.fixed("other", b"others", [curl])
    top = make.plain("top", [source, stranger])
    await room.send([curl, source, stranger, top])
    nodes = list((await room.derivations.nodes([source.name, stranger.name])).values())
    taken = await room.intake.fixed.contents(nodes)
    assert taken[source.outputs["out"]] == CONTENT
    read_again = FixedOutputs(room.derivations, ContentOffers(room.cache))
    assert taken == await read_again.contents(nodes), "as after a restart"
    whole = {
        "curl": [[]],
        "source-1.1.tar.gz": [["curl"]],
        "other": [["curl"]],
        "top": [["other", "source-1.1.tar.gz"]],
    }
    assert needs(await room.submit(top)) == whole
    await put(room.cache, CONTENT, "source-1.0.tar.gz", plain_file(b"bytes"))
    offers, room.intake.fixed.offers = room.intake.fixed.offers, None
    assert "source-1.1.tar.gz" in needs(await room.submit(source)), "where names are held apart"
    room.intake.fixed.offers = offers
    planned = await room.submit(top)
    assert needs(planned) == {"curl": [[]], "other": [["curl"]], "top": [["other", "source-1.1.tar.gz"]]}
    assert planned.held == (source.step,)
    assert await room.cache.missing([source.outputs["out"]]) == set()
    assert needs(await room.submit(source)) == {}, "nothing is left to do of what it stood on"
