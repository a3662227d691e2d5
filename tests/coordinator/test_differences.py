"""Two questions about a step that ran: why did it run, and what is different from the last build of its name."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import create_engine, text

from coordinator.cli.reasons import difference_lines, why_lines
from coordinator.client.errors import RefusedError
from coordinator.readmodel.runs import run_reasons
from coordinator.stores.timings import AttemptTiming, Outcome

from .conftest import OpenedFarm, OpenFarm
from .test_story import told

#: A shell with a list of patches, an environment that has it, and what is built with that.
GRAPH = """rec {{
  bash = runOn "x86_64-linux" {{ patches = {patches}; }} "bash-5.2" "echo > $out";
  stdenv = run "stdenv-linux" "read x < ${{bash}}; echo > $out";
  lib = runOn "x86_64-linux" {{ inherit stdenv; }} "lib-{version}" "read x < ${{stdenv}}; echo > $out";
  app = runOn "x86_64-linux" {{ inherit stdenv lib; }} "app-{version}" "read x < ${{lib}}; echo > $out";
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
        for nothing in (farm.client.difference("no-such"), farm.client.difference("app", "no-such")):
            with pytest.raises(RefusedError) as refused:
                await nothing
            assert refused.value.http_status == 404


def test_each_attempt_has_the_reason_that_the_one_before_left() -> None:
    outcomes: list[Outcome | None] = ["retried", "lost", "returned", "cancelled", "failed", "done", None]
    timings = [AttemptTiming("s", number, worker="w", outcome=outcome) for number, outcome in enumerate(outcomes, 1)]
    timings[0].reason, timings[0].message = "killed", "by signal 9"
    assert [each.reason for each in run_reasons([*timings, AttemptTiming("s", 8)])] == [
        "a submission wanted it, and the farm's cache lacked its outputs",
        "attempt 1 failed (killed): by signal 9",
        "the worker w of attempt 2 was lost",
        "attempt 3 was handed back",
        "attempt 4 was stopped while no submission wanted it; later one did again",
        "attempt 5 failed for good; later it was asked for again",
        "attempt 6 had built it, and the cache has lost or collected an output since",
        "the end of attempt 7 is not known",
    ]
    assert run_reasons(timings[3:])[0].reason == "earlier attempts are no longer remembered"


async def test_a_derivation_that_the_farm_no_longer_has_is_said_to_be_gone(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        first = await built(farm, "[ ]", "1", "lib")
        await built(farm, "[ ]", "2", "lib")
        database = create_engine(farm.settings.database_url("derivations").replace("+aiosqlite", ""))
        with database.begin() as connection:
            assert connection.execute(text("DELETE FROM derivations WHERE step = :step"), {"step": first}).rowcount
        database.dispose()
        found = await farm.client.difference("lib")
        assert found.other is not None
        assert found.other.step == first
        assert "the farm no longer has the derivation" in "\n".join(difference_lines(found, 0.0))
