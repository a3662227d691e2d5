"""Rebuilds without a farm: which attributes differ, which are chosen, what became of them, and what reports hold."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.difference_models import ChangeView
from coordinator.api.rebuild_models import (
    ComparedOutputView,
    ForecastView,
    LikenessName,
    RebuildCausesView,
    RebuildCauseView,
    SystemForecast,
)
from coordinator.cli.rebuild_junit import junit
from coordinator.cli.rebuild_markdown import MAX_BYTES, markdown
from coordinator.cli.rebuild_text import report_lines
from coordinator.rebuild.difference import AttrPair, Selection, differ, select
from coordinator.rebuild.model import (
    AttrReport,
    OutputChange,
    Package,
    RebuildReport,
    RebuildVerdict,
    RootCause,
    SetChange,
    SetSide,
    SideReport,
    Sizes,
)
from coordinator.rebuild.outcome import SideResult, SideState, by_root_cause, judge, with_content

GOLDEN = Path(__file__).parent / "reports"
LINUX, DARWIN = "x86_64-linux", "aarch64-darwin"
BUILT, FAILED, UNKNOWN = (SideResult(state, "cause" if state is SideState.FAILED else "") for state in SideState)


def package(attr: str, version: int, *people: str, drv: int | None = None) -> Package:
    name = attr.rpartition(".")[2]
    path = f"/nix/store/{version:032}-{name}"
    return Package(attr, LINUX, f"/nix/store/{drv or version:032}-{name}.drv", (("out", path),), people)


def side(name: str, *packages: Package, **failed: str) -> SetSide:
    return SetSide(name, {each.attr: each for each in packages}, failed)


def test_each_way_in_which_an_attribute_can_differ_is_told_apart() -> None:
    base = side("base", package("same", 1), package("fetched", 1), package("new", 1), package("gone", 1),
                package("broken", 1), both="x", mended="x", lost="x")  # fmt: skip
    head = side("head", package("same", 1), package("fetched", 1, drv=2), package("new", 2), package("added", 1),
                package("mended", 1), both="y", broken="y", fresh="y")  # fmt: skip
    found = differ(base, head)
    # Another derivation of the same output is no rebuild.
    assert found.unchanged == 2
    assert {pair.attr: pair.change for pair in found.pairs} == {
        "added": SetChange.ADDED, "both": SetChange.NEVER_EVALUATES, "broken": SetChange.NO_LONGER_EVALUATES,
        "fresh": SetChange.NO_LONGER_EVALUATES, "gone": SetChange.REMOVED, "lost": SetChange.REMOVED,
        "mended": SetChange.EVALUATES_AGAIN, "new": SetChange.CHANGED,
    }  # fmt: skip
    assert {pair.attr: pair.error for pair in found.pairs if pair.error} == {
        "both": "y", "broken": "y", "fresh": "y", "lost": "x", "mended": "x",
    }  # fmt: skip


def test_a_selection_takes_what_all_its_tests_take_with_or_without_the_system_in_front() -> None:
    names = ("python3.six", f"{LINUX}.python3.pip", f"packages.{LINUX}.python3.wheel", "perl", "python2")
    pairs = differ(side("base"), side("head", *(package(name, 1, "Ada") for name in names)))

    def chosen(selection: Selection) -> list[str]:
        few = {package("perl", 1).drv: (), package("python2", 1).drv: ()}
        found = select(pairs, selection, lambda: few)
        assert found.left_out == len(pairs.pairs) - len(found.pairs)
        return [pair.attr for pair in found.pairs]

    assert chosen(Selection()) == sorted(names)
    assert chosen(Selection(("python3.*",))) == sorted(names[:3])
    assert chosen(Selection(("perl", "python2"), re.compile("^py"))) == ["python2"]
    assert chosen(Selection(maintainers=("ADA",), at_most_dependents=0)) == ["perl", "python2"]
    assert chosen(Selection(maintainers=("bob",))) == []


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        (BUILT, BUILT, RebuildVerdict.BUILT),
        (BUILT, FAILED, RebuildVerdict.NEWLY_FAILING),
        (FAILED, FAILED, RebuildVerdict.STILL_FAILING),
        (FAILED, BUILT, RebuildVerdict.FIXED),
        (UNKNOWN, FAILED, RebuildVerdict.FAILING),
        (UNKNOWN, BUILT, RebuildVerdict.BUILT),
        (BUILT, UNKNOWN, RebuildVerdict.NOT_BUILT),
    ],
)
def test_a_verdict_follows_from_both_results(base: SideResult, head: SideResult, verdict: RebuildVerdict) -> None:
    pair = AttrPair("a", SetChange.CHANGED, package("a", 1), package("a", 2))
    assert judge(pair, base, head).verdict is verdict
    # What the base has not fails newly or is new; what the head has not has no verdict.
    added = judge(replace(pair, change=SetChange.ADDED, before=None), UNKNOWN, head).verdict
    assert added is (RebuildVerdict.NEWLY_FAILING if head is FAILED else judge(pair, UNKNOWN, head).verdict)
    removed = judge(replace(pair, change=SetChange.REMOVED, after=None), base, UNKNOWN)
    assert removed.verdict is RebuildVerdict.NOTHING


def output(likeness: LikenessName, before: int | None = 10, after: int | None = 10) -> ComparedOutputView:
    return ComparedOutputView(
        likeness=likeness, nar_before=before, nar_after=after, closure_before=before, closure_after=after
    )


def test_a_no_op_is_one_in_all_outputs_and_what_is_not_known_is_not_guessed() -> None:
    report = AttrReport("a", LINUX, SetChange.CHANGED)
    assert with_content(report, [output("no-op"), output("same")]).content is OutputChange.NO_OP
    assert with_content(report, [output("no-op"), output("absent", None)]).content is OutputChange.UNKNOWN
    grown = with_content(report, [output("different", 10, 30), output("too large", 5, 5)])
    assert (grown.content, grown.nar.delta, grown.closure) == (OutputChange.DIFFERENT, 20, Sizes(10, 30))
    assert with_content(report, [output("absent", None)]).nar.delta is None


def test_failures_stand_by_root_cause_with_what_fails_newly_first() -> None:
    def failing(attr: str, cause: str, verdict: RebuildVerdict) -> AttrReport:
        return AttrReport(attr, LINUX, SetChange.CHANGED, verdict, root_cause=cause)

    reports = [
        failing("a", "old", RebuildVerdict.STILL_FAILING),
        failing("b", "old", RebuildVerdict.STILL_FAILING),
        failing("c", "new", RebuildVerdict.NEWLY_FAILING),
        failing("d", "", RebuildVerdict.NEWLY_FAILING),
    ]
    known = RootCause("old", "old-1.0", LINUX, "failed", "exit code 1", ())
    found = by_root_cause(reports, {"old": known})
    assert [(cause.name, cause.attrs) for cause in found] == [("new", ("c",)), ("old-1.0", ("a", "b"))]


# Reports.

#: What a stranger may have in a name, a message or a log.
HOSTILE = (
    "@ada #12 </pre></details><b>x</b> ![i](//evil.example) [l](x) `a` |b| *c* www.evil.example \x1b[31m::error::y"
)


def report(hostile: str = "") -> RebuildReport:
    """A report with one of everything."""
    causes = RebuildCausesView(
        causes=(
            RebuildCauseView(
                names=("stdenv-1.0",), count=2, reach=4, change_count=1, drv="h", previous_drv="b",
                changes=(ChangeView(field="environment", name="text", before=f"first{hostile}", after="second"),),
            ),
            RebuildCauseView(
                names=("app1-1.0", "app2-1.0"), count=9, reach=1, change_count=3, drv="h", previous_drv="b",
                changes=(ChangeView(field="input", name="zlib", before=None, after="/nix/store/x-zlib"),),
            ),
        ),
        cause_count=3,
        unfollowed=2,
    )  # fmt: skip
    forecast = ForecastView(
        roots=(), derivations=9, steps=6, cached=2, failed=1, running=0, inputs=3, input_bytes=5_000_000,
        systems=(SystemForecast(system=LINUX, steps=6, unknown=2, build_s=7_300.0, slots=4),),
        build_s=7_300.0, unknown=2, cpu_s=900.0, cpu_unknown=4, sooner_s=60.0, later_s=600.0, bound="path",
    )  # fmt: skip

    def changed(
        attr: str, verdict: RebuildVerdict, content: OutputChange = OutputChange.UNKNOWN, **more: str
    ) -> AttrReport:
        sizes = Sizes(1024, 4096) if content is not OutputChange.UNKNOWN else Sizes()
        return AttrReport(
            attr + hostile, LINUX, SetChange.CHANGED, verdict, (0,), content=content, nar=sizes, closure=sizes, **more
        )

    failures = (
        RootCause("k1", f"app1-1.0{hostile}", LINUX, "failed", f"exit code 1{hostile}", (f"app1{hostile}",),
                  f"line 1\nline 2 & <b>{hostile}\n"),
        RootCause("k2", "old-1.0", LINUX, "failed", "exit code 2", (f"old{hostile}",), ""),
    )  # fmt: skip
    attributes = (
        changed("app1", RebuildVerdict.NEWLY_FAILING, root_cause="k1"),
        changed("docs", RebuildVerdict.BUILT, OutputChange.NO_OP),
        changed("lib", RebuildVerdict.FIXED, OutputChange.DIFFERENT),
        changed("old", RebuildVerdict.STILL_FAILING, root_cause="k2"),
        AttrReport(f"bad{hostile}", LINUX, SetChange.NO_LONGER_EVALUATES, error=f"is marked as broken{hostile}"),
        AttrReport(f"new{hostile}", DARWIN, SetChange.ADDED, RebuildVerdict.BUILT),
        AttrReport(f"gone{hostile}", DARWIN, SetChange.REMOVED),
    )
    return RebuildReport(
        SideReport(f"main{hostile}", 9, 0, "1111"), SideReport(f"HEAD{hostile}", 9, 1, "2222"), attributes, 3, 2,
        causes, forecast, None, failures, is_built=True, notes=(f"not taken: README{hostile}",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rendered"),
    [
        ("rebuild.markdown", markdown(report())),
        ("rebuild.txt", "\n".join(report_lines(report())) + "\n"),
        ("rebuild.xml", junit(report())),
        ("dry-run.markdown", markdown(replace(report(), is_built=False, failures=()))),
    ],
)
def test_a_report_is_as_the_golden_one(name: str, rendered: str, rewrite_screens: bool) -> None:
    if rewrite_screens:
        (GOLDEN / name).write_text(rendered)
    assert rendered == (GOLDEN / name).read_text()


def outside_of_code(page: str) -> str:
    """Return what Markdown and HTML take for their own: all that stands in no `code` and no `pre`."""
    return re.sub(r"<code>.*?</code>|<pre>\n.*?\n</pre>", "", page, flags=re.DOTALL)


@given(st.text(max_size=60) | st.just(HOSTILE))
@settings(max_examples=200, deadline=None)
def test_nothing_that_a_stranger_says_is_obeyed_by_markdown_html_or_xml(hostile: str) -> None:
    page, plain = markdown(report(hostile)), markdown(report())
    # The same skeleton, whatever the names are: of the same elements, and of the same text outside of code.
    assert outside_of_code(page).split() == outside_of_code(plain).split()
    for code in re.findall(r"<code>(.*?)</code>", page, flags=re.DOTALL):
        assert re.fullmatch(r"(?:[A-Za-z0-9 ,+=/→…±()-]|&#\d+;)*", code)
    for block in re.findall(r"<pre>\n(.*?)\n</pre>", page, flags=re.DOTALL):
        assert not re.search("[<>]", block)
    assert len(ET.fromstring(junit(report(hostile)).encode()).findall(".//testcase")) == 6  # noqa: S314 - our own
    for line in report_lines(report(hostile)):
        assert "\n" not in line
        assert "\x1b" not in line


def test_markdown_of_a_huge_rebuild_fits_a_comment_and_says_what_it_leaves_out() -> None:
    small = report()
    many = 40_000
    attributes = [replace(small.attributes[n % 4], attr=f"set.package-{n}-\N{SNOWMAN}") for n in range(many)]
    failures = [
        RootCause(f"k{n}", f"p{n}-1.0", LINUX, "failed", "exit code 1", (attributes[4 * n].attr,), "<&>\n" * 3_000)
        for n in range(500)
    ]
    page = markdown(replace(small, attributes=tuple(attributes), failures=tuple(failures)))
    assert len(page.encode()) <= MAX_BYTES
    assert "**10000 newly failing, 10000 still failing, 10000 fixed, 10000 built, 10000 no-op rebuilds**" in page
    assert "Left out, because a comment has no room for it: root causes of what is newly failing" in page
    for element in ("details", "pre", "summary", "code"):
        assert len(re.findall(f"<{element}[ >]", page)) == page.count(f"</{element}>")
    assert all(title in page for title in ("Why they changed", "Fixed: 10000", "No-op rebuilds: 10000", "Size as"))
    assert html.unescape(page).count("p0-1.0") == 1
