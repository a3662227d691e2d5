"""Two questions about a step that ran: why did it run, and what is different from the last build of its name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from coordinator.cli.reasons import difference_lines, why_lines
from coordinator.client.errors import RefusedError
from coordinator.readmodel.comparisons import PAGE, WHOLE, Comparisons
from coordinator.readmodel.runs import run_reasons
from coordinator.stores.derivation_records import Kind, NewDerivation, Node
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.timings import AttemptTiming, Outcome
from infra.nix import aterm
from infra.nix.causes import Uncompared
from infra.nix.derivation import Derivation, DerivationOutput
from scheduler.events import SubmissionExpired
from scheduler.model import StepKey, SubmissionId

from .conftest import OpenedFarm, OpenFarm
from .test_story import told
from .test_web import browser_of

#: A shell with a list of patches, an environment that has it, and what is built with that.
GRAPH = """rec {{
  bash = runOn "x86_64-linux" {{ patches = {patches}; }} "bash-5.2" "echo > $out";
  stdenv = run "stdenv-linux" "read x < ${{bash}}; echo > $out";
  lib = runOn "x86_64-linux" {{ inherit stdenv; }} "lib-{version}" "read x < ${{stdenv}}; echo > $out";
  app = runOn "x86_64-linux" {{ inherit stdenv lib; }} "app-{version}" "echo ${{lib}} > $out";
}}"""
NASTY = r'"\t\n::error::oops <script>alert(1)</script>"'


async def built(farm: OpenedFarm, patches: str, version: str, attr: str = "app") -> str:
    view = await farm.ended((await farm.submit(GRAPH.format(patches=patches, version=version), attr, label="mine")).id)
    return view.roots[0].step


async def test_a_build_is_compared_with_the_last_of_its_name_down_to_the_first_causes(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        first = await built(farm, "[ ]", "1")
        alone = await farm.client.difference("app")
        assert (alone.other, alone.note) == (None, "no earlier build of app on x86_64-linux is remembered")
        same_version = await built(farm, "[ ]", "2", "lib")
        second = await built(farm, NASTY, "2")

        # By attribute, key, .drv and output.
        step = await farm.client.step(second)
        names = ["app", second, step.drv, f"{step.drv}^out", *step.outputs.values()]
        answers = [await farm.client.difference(name) for name in names]
        assert answers == [answers[0]] * len(names)
        found = answers[0]
        assert found.other is not None
        assert (found.other.step, found.other.outcome) == (first, "done")
        assert {cause.way: [change.name for change in cause.changes] for cause in found.causes} == {
            (): ["name"], ("lib-2",): ["name"], ("stdenv-linux", "bash-5.2"): ["patches"],
        }  # fmt: skip
        assert await farm.client.difference(first, second) != found
        assert (await farm.client.difference("app", "app")).note == "both are the same derivation"
        # Between a step and another one of its name that is not the last.
        whole = await farm.client.difference("lib-2", same_version)
        assert [cause.way for cause in whole.causes] == [("stdenv-linux", "bash-5.2")]

        whole_text = await asyncio.to_thread(told, farm, "diff", "app")
        lines = ["because of stdenv-linux \u2192 bash-5.2", "  environment patches", "    -", "    + \\t\\n::error"]
        assert "\n".join(lines) in whole_text
        assert "\n::error" not in whole_text
        because = await asyncio.to_thread(told, farm, "why", "app")
        assert "ran        attempt 1: a submission wanted it, and the farm's cache lacked its outputs" in because
        assert "changed    since app-1, done " in because
        assert "because of lib-2 (was lib-1)" in because
        reasons = await farm.client.why("bash-5.2")
        [wanted] = reasons.wanted_by
        # The submission has ended: the way is that of the recipes.
        assert (wanted.label, wanted.attr, wanted.path) == ("mine", "app", ("app-2", "stdenv-linux", "bash-5.2"))
        assert "built for" in "\n".join(why_lines(reasons, 0.0))
        async with browser_of(farm) as browser:
            await browser.log_in()
            page = (await browser.get(f"/steps/{second}"))[1]
        assert "because of stdenv-linux \u2192 bash-5.2" in page
        assert "oops &lt;script&gt;alert(1)&lt;/script&gt;</ins>" in page
        assert f'<li>for submission <a href="/submissions/{wanted.submission}">mine</a>, root app: app-2</li>' in page
        assert "<li><code>" in page.partition("refers to 1 path")[2]
        for nothing in (farm.client.difference("no-such"), farm.client.difference("app", "no-such")):
            with pytest.raises(RefusedError) as refused:
                await nothing
            assert refused.value.http_status == 404


def stored(name: str, modulo: bytes, inputs: Sequence[str] = (), value: bytes = b"") -> NewDerivation:
    """A derivation as intake would store it."""
    drv = f"{name[:1] * 32}-{name[1:]}.drv"
    text = aterm.render(
        Derivation(
            outputs=(DerivationOutput("out", f"/nix/store/{name[:1] * 32}-{name[1:]}"),),
            input_drvs=tuple((f"/nix/store/{each}", ("out",)) for each in inputs),
            input_srcs=(),
            system="x86_64-linux",
            builder="/bin/sh",
            args=(),
            env=((b"value", value),),
        )
    )
    return NewDerivation(Node(drv, StepKey(drv), Kind.FIXED, "x86_64-linux", (), (), tuple(inputs)), modulo, (), text)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_what_changes_no_output_is_no_cause_and_what_is_too_large_is_left_to_a_command(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite"
    store = DerivationStore.open(url if kind == "sqlite" else request.getfixturevalue("postgres_url"))
    try:
        await store.prepare()
        # A tarball that another curl fetches is the same tarball; a large input of the other differs at its end.
        tarballs = [stored(f"{side}tarball", b"same", value=side.encode()) for side in "12"]
        large = [stored(f"{side}large", side.encode(), value=b"x" * (3 << 20) + side.encode()) for side in "34"]
        tops = [
            stored(f"{side}top", side.encode(), [each.node.drv for each in inputs])
            for side, inputs in zip("56", zip(tarballs, large, strict=True), strict=True)
        ]
        await store.add([*tarballs, *large, *tops])
        comparisons = Comparisons(store)
        drvs = [top.node.drv for top in tops]
        [left] = (await comparisons.causes(drvs[0], drvs[1], PAGE)).causes
        assert (left.way, left.uncompared) == (("large",), Uncompared.TOO_LARGE)
        found = await comparisons.causes(drvs[0], drvs[1], WHOLE)
        [[change]] = [cause.changes for cause in found.causes]
        assert (change.before, change.after) == ("\u2026" + "x" * 40 + "3", "\u2026" + "x" * 40 + "4")
        # Asked about itself, the tarball has a difference.
        assert (await comparisons.causes(tarballs[0].node.drv, tarballs[1].node.drv)).count == 1
        assert (await comparisons.causes(drvs[1], drvs[1])).count == 0
    finally:
        await store.close()


def test_each_attempt_has_the_reason_that_the_one_before_left() -> None:
    outcomes: list[Outcome | None] = ["retried", "lost", "returned", "moved", "cancelled", "failed", "done", None]
    timings = [AttemptTiming("s", number, worker="w", outcome=outcome) for number, outcome in enumerate(outcomes, 1)]
    timings[0].reason, timings[0].message = "killed", "by signal 9"
    assert [each.reason for each in run_reasons([*timings, AttemptTiming("s", 9)])] == [
        "a submission wanted it, and the farm's cache lacked its outputs",
        "attempt 1 failed (killed): by signal 9",
        "the worker w of attempt 2 was lost",
        "attempt 3 was handed back",
        "attempt 4 was stopped for another one elsewhere",
        "attempt 5 was stopped while no submission wanted it; later one did again",
        "attempt 6 failed for good; later it was asked for again",
        "attempt 7 had built it, and the cache has lost or collected an output since",
        "the end of attempt 8 is not known",
    ]
    assert run_reasons(timings[3:])[0].reason == "earlier attempts are no longer remembered"


async def test_a_forgotten_build_is_compared_until_its_derivation_is_gone_which_is_said(
    open_farm: OpenFarm,
) -> None:
    async with open_farm("one") as farm:
        first = await built(farm, "[ ]", "1", "lib")
        [forgotten] = await farm.client.submissions()
        old = await farm.client.step(first)
        second = await built(farm, "[ ]", "2", "lib")
        await farm.coordinator.engine.offer(SubmissionExpired(SubmissionId(forgotten.id)))
        await farm.until(lambda: farm.coordinator.views.row_of(StepKey(first)) is None)
        answers = [await farm.client.difference("lib", name) for name in ("", first, old.drv, *old.outputs.values())]
        assert answers == [answers[0]] * 4
        assert [(cause.way, cause.change_count) for cause in answers[0].causes] == [((), 1)]
        async with browser_of(farm) as browser:
            await browser.log_in()
            page = (await browser.get(f"/steps/{second}"))[1]
        assert f"Against lib-1 <code>{first}</code>" in page
        # The other way round too.
        assert (await farm.client.difference(old.drv, second)).step.step == first
        with pytest.raises(RefusedError, match="there is no step"):
            await farm.client.difference("lib", f"{'0' * 32}-never-1.0.drv")

        await built(farm, "[ ]", "3", "lib")
        database = create_engine(farm.settings.database_url("derivations").replace("+aiosqlite", ""))
        with database.begin() as connection:
            assert connection.execute(text("DELETE FROM derivations WHERE step = :step"), {"step": second}).rowcount
        database.dispose()
        gone = "the farm no longer has the derivation"
        last = await farm.client.difference("lib")
        assert last.other is not None
        assert last.other.step == first
        assert last.note == f"{gone} of the last one, step {second}"
        named = await farm.client.difference("lib", second)
        assert [cause.uncompared for cause in named.causes] == ["unknown"]
        assert gone in "\n".join(difference_lines(named, 0.0))
