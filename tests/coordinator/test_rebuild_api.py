"""Questions before and after a rebuild: what it would build, which outputs really changed, what it all follows from."""

from __future__ import annotations

import pytest

from coordinator.api.requests import ForecastQuery, PairsQuery
from coordinator.client.errors import RefusedError
from tests.support.cache import store_path

from .conftest import OpenedFarm, OpenFarm

#: A root that all stand on, a package that copies its text and one that only names it, one that fails, and one above.
GRAPH = """rec {{
  root = runOn "x86_64-linux" {{ text = "{text}"; comment = "{comment}"; }} "root" "echo $text > $out";
  copy = runOn "x86_64-linux" {{ inherit root; }} "copy" "read x < $root; echo $x > $out";
  names = runOn "x86_64-linux" {{ inherit root; }} "names" "echo $root > $out";
  bad = runOn "x86_64-linux" {{ inherit root; }} "bad" "echo > $out; exit {status}";
  above = runOn "x86_64-linux" {{ inherit bad copy; }} "above" "echo > $out";
  mac = runOn "aarch64-darwin" {{ inherit root; }} "mac" "echo > $out";
}}"""


def graph(text: str = "first", comment: str = "", status: int = 0) -> str:
    return GRAPH.format(text=text, comment=comment, status=status)


async def built(farm: OpenedFarm, text: str, *attrs: str) -> dict[str, tuple[str, str]]:
    """Build attributes; return the derivation and output of each."""
    view = await farm.ended((await farm.submit(text, *attrs)).id)
    return {root.attr: (root.drv, root.outputs["out"]) for root in view.roots}


async def test_a_forecast_says_what_would_be_built_what_is_cached_and_what_is_not_known(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        attrs = ("copy", "names", "bad", "above", "mac")
        roots = await farm.evaluate(graph(status=1), *attrs)
        query = ForecastQuery(drvs=tuple(root.drv for root in roots))
        fresh = await farm.client.forecast(query)
        assert (fresh.steps, fresh.cached, fresh.failed, fresh.unknown, fresh.cpu_unknown) == (6, 0, 0, 6, 6)
        assert [root.state for root in fresh.roots] == ["unknown"] * 5
        assert [(each.system, each.steps, each.slots) for each in fresh.systems] == [
            ("aarch64-darwin", 1, 0),
            ("x86_64-linux", 5, 2),
        ]
        assert (fresh.bound, fresh.bound_system, fresh.later_s) == ("no_worker", "aarch64-darwin", None)

        await built(farm, graph(status=1), "names", "copy", "above")
        known = await farm.client.forecast(query)
        assert dict(zip(attrs, [root.state for root in known.roots], strict=True)) == {
            "copy": "cached", "names": "cached", "bad": "failed", "above": "failed", "mac": "unknown",
        }  # fmt: skip
        by_attr = dict(zip(attrs, known.roots, strict=True))
        assert by_attr["above"].cause == by_attr["bad"].step == by_attr["bad"].cause
        assert (known.steps, known.failed) == (3, 2)
        # `mac` begins from the root that is built; its bytes and those of `copy` are known.
        assert known.inputs >= 2
        assert known.input_bytes > 0

        # Another comment: all would be built again, and the packages have histories now.
        roots = await farm.evaluate(graph(comment="other"), "names", "copy", "above")
        again = await farm.client.forecast(ForecastQuery(drvs=tuple(root.drv for root in roots)))
        assert (again.steps, again.cached, again.unknown) == (5, 0, 2)
        assert again.build_s > 0
        assert again.later_s is not None
        assert 0 < again.sooner_s <= again.later_s


async def test_outputs_that_differ_in_hashes_alone_are_no_ops_and_all_causes_are_folded(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        before = await built(farm, graph(), "root", "copy", "names", "above")
        after = await built(farm, graph("second!"), "root", "copy", "names", "above")
        attrs = list(before)
        outputs = PairsQuery(
            before=tuple(before[attr][1] for attr in attrs), after=tuple(after[attr][1] for attr in attrs)
        )
        found = (await farm.client.compare_outputs(outputs)).outputs
        assert {attr: each.likeness for attr, each in zip(attrs, found, strict=True)} == {
            "root": "different", "copy": "different", "names": "no-op", "above": "same",
        }  # fmt: skip
        assert all(each.nar_before and each.closure_after for each in found)

        drvs = PairsQuery(
            before=tuple(before[attr][0] for attr in attrs), after=tuple(after[attr][0] for attr in attrs)
        )
        causes = await farm.client.rebuild_causes(drvs)
        (cause,) = causes.causes
        assert (cause.names, cause.reach, cause.count) == (("root",), 4, 1)
        assert [(change.name, change.before, change.after) for change in cause.changes] == [
            ("text", "first", "second!")
        ]
        assert causes.reasons == ((0,),) * 4


async def test_what_is_no_derivation_not_known_or_too_much_is_named_and_what_is_absent_is_an_answer(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm:
        ask, causes, compare = farm.client.forecast, farm.client.rebuild_causes, farm.client.compare_outputs
        many = tuple(store_path(str(number)) for number in range(501))
        refused = [
            (ask(ForecastQuery(drvs=("/nix/store/x",))), "'x' is no store path name"),
            (ask(ForecastQuery(drvs=(f"{store_path('x')}.drv",))), "is not known here; send its closure first"),
            (causes(PairsQuery(before=(store_path("a"),), after=(store_path("b"),))), "is not the path of a deriv"),
            (causes(PairsQuery(before=("/nix/store/../x.drv",), after=("y",))), "is not the path of a derivation"),
            (compare(PairsQuery(before=many, after=many[1:])), "there are 501 paths before and 500 after"),
            (compare(PairsQuery(before=many, after=many)), "501 pairs of outputs; ask for 500 at once at most"),
        ]
        for asked, sentence in refused:
            with pytest.raises(RefusedError, match=sentence):
                await asked
        pair = PairsQuery(before=(f"{store_path('a')}.drv",), after=(f"{store_path('b')}.drv",))
        assert [(cause.uncompared, cause.names) for cause in (await causes(pair)).causes] == [("unknown", ("b",))]
        outputs = await compare(PairsQuery(before=("no path",), after=(store_path("b"),)))
        assert [each.likeness for each in outputs.outputs] == ["absent"]
