"""The pages in a real browser, on a real farm: a person clicks from question to answer, and nothing else is needed.

Debian's Chromium, driven by Playwright. The farm has a diamond that fails, a step that two submissions share, one that
waits for a system that nobody offers, one that runs until it is allowed to end, and one whose worker is killed.

Each of the seven questions has a test of its name. The answer is one click away from where a person stands, which is
the page that the test opens first.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from sqlalchemy import select

from coordinator.api.route import Content
from coordinator.api.web_routes import FIND_STEP, LOGIN_PAGE, WEB_ROUTES
from coordinator.environments import tables
from coordinator.environments.coverage import SystemCoverage, day_of
from coordinator.environments.store import CoverageAssessment, EnvironmentStore
from coordinator.stores.timings import AttemptTiming, TimingStore
from infra.cache.catalog.database import FencingToken
from infra.database import open_engine
from tests.e2e.conftest import BUSYBOX, Expression, waiting_for
from tests.support.elsewhere import Program
from tests.support.farm import Farm, processes_naming
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

PATIENCE_MS = PATIENCE_S * 1000
PHONE: ViewportSize = {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE_MS)
#: Chromium under the names of distributions.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

GRAPH = """
    top = let
      bad = shell "pages-bad" "echo 'Running phase: buildPhase'; echo 'no <b>compiler</b> here'; exit 3";
      left = shell "pages-left" "echo ${bad} > $out";
      right = shell "pages-right" "echo ${bad} > $out";
    in shell "pages-top" "echo ${left} ${right} > $out";
    shared = shell "pages-shared" "echo shared > $out";
    above = shell "pages-above" "read x < ${(import ./default.nix).shared}; echo $x > $out";
    waits = shellFor "riscv64-linux" { name = "pages-waits"; } "echo > $out";
    runs = shell "pages-runs" "%s; echo done > $out";
""" % waiting_for("pages-runs")  # noqa: UP031 - the text is Nix, whose braces are its own


@dataclass
class Window:
    """A page in the browser, with what it asked for and complained of."""

    page: Page
    farm: Farm
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda told: self.complaints.append(told.text) if told.type == "error" else None)

    def open(self, address: str) -> Page:
        self.page.goto(self.farm.url + address)
        return self.page

    def log_in(self) -> None:
        self.open("/")
        self.page.fill("#token", (self.farm.secrets / "api-token").read_text().strip())
        self.page.click("main button")
        expect(self.page.locator("#live-workers")).to_be_visible()
        # The form came with status 401, which browsers report.
        self.complaints.clear()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, CHROMIUM)))
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=program, args=flags, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def spare(farm: Farm, gates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Program]]:
    """A worker of its own that joins the farm, which takes it some seconds."""
    root = tmp_path_factory.mktemp("spare")
    head = (farm.state / "ray-address").read_text().strip()
    program = Program(
        root / "log",
        *("worker", "--head", head, "--ray-token", farm.state / "ray-token", "--name", "spare"),
        *("--state-dir", root / "state", "--slots", "1", "--feature", "spare"),
        *("--nix-option", "sandbox-paths", f"{BUSYBOX['sandbox-paths']} /gates={gates}"),
        environment={"DROVER_TEST_MARK": str(root)},
    )
    with ThreadPoolExecutor() as threads:
        yield threads.submit(program.start, "has joined the farm")
    switch_off(program)


def switch_off(worker: Program) -> None:
    """Kill all processes of a worker, as if its machine had no power any more."""
    for pid in processes_naming(str(worker.path.parent)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    worker.process.wait()


@pytest.fixture(scope="module")
def submission(farm: Farm, spare: Future[Program], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of the submission that pages are about, while its last step runs; the spare worker is on its way."""
    file = Expression(tmp_path_factory.mktemp("pages")).write(GRAPH)
    shared = farm.build(file, "-A", "shared")
    assert shared.returncode == 0, shared.stderr
    attributes = [word for name in ("top", "shared", "above", "waits", "runs") for word in ("-A", name)]
    sent = farm.build(file, *attributes, "--detach")
    assert sent.returncode == 0, sent.stderr
    return str(farm.api("submissions")[0]["id"])


#: A step that names an input; the input's list of patches is what changes.
REBUILT = """
    over = shell "pages-over" "read x < ${
      shellFor "x86_64-linux" { name = "pages-low"; patches = [ PATCHES ]; } "echo low > $out"
    }; echo $x > $out";
"""


@pytest.fixture(scope="module")
def rebuilt(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of a step that was built once more because an input of it has changed."""
    expression = Expression(tmp_path_factory.mktemp("rebuilt"))
    for patches in ('"a.patch"', '"a.patch" "<b>.patch"'):
        done = farm.build(expression.write(REBUILT.replace("PATCHES", patches)), "-A", "over")
        assert done.returncode == 0, done.stderr
    return str(farm.api("steps/over")["key"])


#: Name of the environment that consists of the submission's roots.
ENVIRONMENT = "pages-dev"


@pytest.fixture(scope="module")
def environment(farm: Farm, submission: str) -> str:
    """An environment with a past, once all that can fail in it has failed."""
    for words in (("track", ENVIRONMENT), ("push", ENVIRONMENT, "--submission", submission)):
        done = farm.drover("environments", *words)
        assert done.returncode == 0, done.stderr
    with ThreadPoolExecutor() as threads:
        threads.submit(asyncio.run, remember(farm)).result()
    while not {"failed", "no worker"} <= {gap["reason"] for gap in gaps_of(farm)}:
        assert farm.drover("environments", "look", ENVIRONMENT).returncode == 0
    return ENVIRONMENT


def gaps_of(farm: Farm) -> list[dict[str, str]]:
    return list(farm.api(f"environments/{ENVIRONMENT}/coverage")["gaps"])


async def remember(farm: Farm) -> None:
    """Write how the environment stood two weeks ago."""
    url = f"sqlite+aiosqlite:///{farm.state}/environments.sqlite3"
    engine = open_engine(url)
    async with engine.connect() as connection:
        ((journal, epoch),) = (await connection.execute(select(tables.reign))).all()
    await engine.dispose()
    # By the farm's own right.
    store = EnvironmentStore.open(url, FencingToken(journal, epoch))
    then = CoverageAssessment(1, 1.0, (SystemCoverage("x86_64-linux", here=1, local=3),), ())
    await store.save_assessment(ENVIRONMENT, then, day_of(time.time()) - 14, 400)
    await store.close()


@pytest.fixture(scope="module")
def window(browser: Browser, farm: Farm, submission: str) -> Iterator[Window]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    window = Window(context.new_page(), farm)
    window.log_in()
    yield window
    context.close()
    assert [url for url in window.asked if not url.startswith(f"{farm.url}/")] == []
    assert window.complaints == []


def test_the_page_of_workers_shows_what_runs_on_each_and_how_its_machine_is(window: Window, submission: str) -> None:
    page = window.open("/workers")
    worker = page.locator("section", has=page.locator(".slot", has_text="pages-runs"))
    expect(worker).to_have_count(1)
    for figure in ("busy", "load by processor", "memory available", "free on its fullest disk"):
        expect(worker.locator("dl div", has_text=figure).locator("dd")).to_have_text(re.compile("[0-9]"))
    page.get_by_role("main").get_by_role("link", name="what ran in the last hour").click()
    expect(page.locator("#live-workers")).to_contain_text("Attempts")


def test_what_is_the_farm_doing_now(window: Window, submission: str, gates: Path) -> None:
    page = window.open("/submissions")
    page.get_by_role("link", name="drover").click()
    # The step is in a slot of a worker's row; the page follows without being loaded again, and keeps the focus.
    slot = page.locator(".workers tr .slot", has_text="pages-runs")
    expect(slot).to_be_visible()
    page.evaluate("window.mark = 'the same page'")
    link = page.locator("#live-submissions a", has_text="and 4 more").first
    link.focus()
    (gates / "pages-runs").touch()
    expect(slot).to_have_count(0)
    assert page.evaluate("window.mark") == "the same page"
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"/submissions/{submission}"
    page.keyboard.press("Enter")
    expect(page.locator(".legend", has_text="1 ready")).to_be_visible()


def test_which_root_cause_is_behind_the_failures(window: Window, submission: str) -> None:
    page = window.open("/")
    page.locator(f'#live-submissions a[href="/submissions/{submission}"]').first.click()
    expect(page.locator("#failures-title")).to_have_text("One failure, 3 steps cannot run because of it")
    expect(page.locator(".cause")).to_have_count(1)
    expect(page.locator(".cause pre")).to_contain_text("no <b>compiler</b> here")
    page.click(".cause h3 a")
    expect(page.locator("h1")).to_have_text("pages-bad")
    expect(page.locator(".why")).to_contain_text("It failed by itself.")
    # The graph around it: both that it dooms, and what stands on them.
    assert sorted(page.locator(".graph a title").all_text_contents()) == [
        "pages-bad, failed", "pages-left, doomed", "pages-right, doomed", "pages-top, doomed",
    ]  # fmt: skip
    page.locator(".graph a", has_text="pages-top").click()
    expect(page.locator(".why a")).to_have_text("pages-bad")
    page.click(".why a")
    page.get_by_role("link", name="Log", exact=True).click()
    expect(page.locator("#L2")).to_contain_text("no <b>compiler</b> here")
    page.fill("#log-find", "COMPILER")
    page.get_by_role("button", name="Search").click()
    page.locator(".found a").click()
    expect(page).to_have_url(re.compile(r"#L2$"))
    expect(page.get_by_role("navigation", name="Phases").get_by_role("link")).to_have_text("buildPhase")


def test_why_does_a_step_wait(window: Window) -> None:
    page = window.open("/")
    # Of the farm's page the queue says it already; of one step its own page does.
    expect(page.locator("#live-queue tr", has_text="riscv64-linux")).to_contain_text("no worker offers the system")
    page.fill("#find", "pages-waits")
    page.press("#find", "Enter")
    expect(page.locator(".why")).to_contain_text("No worker offers the system riscv64-linux")


def test_why_did_a_step_run(window: Window, submission: str) -> None:
    page = window.open(f"/submissions/{submission}")
    expect(page.locator("#live-reused div", has_text="in the cache before").locator("dd")).to_have_text("1")
    page.locator("#live-roots a", has_text="above").click()
    expect(page.locator(".why")).to_contain_text("It was built here, and its outputs are in the cache.")
    ran = page.locator("#live-ran")
    expect(ran.locator("li", has_text="root above")).to_contain_text("pages-above")
    expect(ran.locator("li", has_text="attempt 1")).to_contain_text("the farm's cache lacked its outputs")
    # Who waits for it, and what it stands on, which was not built for this submission.
    expect(page.locator("#live-waiting a", has_text="and 4 more")).to_have_attribute(
        "href", f"/submissions/{submission}"
    )
    expect(page.locator(".graph a", has_text="pages-shared")).to_be_visible()
    expect(page.locator(".output")).to_contain_text("closure")


def test_what_is_different_from_last_time(window: Window, farm: Farm, rebuilt: str) -> None:
    page = window.open("/submissions")
    page.get_by_role("main").get_by_role("link", name="over", exact=True).first.click()
    page.locator("#live-roots a", has_text="over").click()
    ran = page.locator("#live-ran")
    expect(ran.locator("li", has_text="root over")).to_contain_text("pages-over")
    expect(ran.locator("li", has_text="attempt 1")).to_contain_text("the farm's cache lacked its outputs")
    expect(ran.locator(".differs h3")).to_have_text("because of pages-low")
    expect(ran.locator("dt")).to_have_text("environment patches")
    expect(ran.locator("del")).to_have_text("a.patch")
    expect(ran.locator("ins")).to_have_text("a.patch <b>.patch")
    # The other build is a click away, and is the first of its name.
    ran.get_by_role("link", name="pages-over").click()
    expect(ran).to_contain_text("No earlier build of pages-over")
    told = farm.drover("diff", rebuilt)
    assert told.stdout.endswith(
        "because of pages-low\n  environment patches\n    - a.patch\n    + a.patch <b>.patch\n"
    ), told.stdout + told.stderr
    assert "changed    since pages-over, done" in farm.drover("why", rebuilt).stdout


def test_when_will_it_be_finished_and_what_bounds_that(window: Window, farm: Farm, submission: str) -> None:
    page = window.open("/")
    expect(page.locator("svg.throughput").first).to_have_attribute("aria-label", re.compile("Last hour: [1-9]"))
    line = page.locator("#live-submissions li", has=page.locator(f'a[href="/submissions/{submission}"]'))
    expect(line.locator(".end")).to_contain_text("No end in sight: no worker offers the system riscv64-linux.")
    line.get_by_role("link").click()
    expect(page.locator("#live-head .end")).to_contain_text("No end in sight")
    expect(page.locator("#live-path caption").first).to_contain_text("Critical path")
    expect(page.locator("#live-path tr", has_text="riscv64-linux")).to_contain_text("1 step")
    told = farm.drover("eta", submission)
    assert "no end in sight: no worker offers the system riscv64-linux" in told.stdout, told.stderr
    assert "critical path to come" in told.stdout


def test_where_did_the_time_go(window: Window, submission: str) -> None:
    page = window.open(f"/submissions/{submission}")
    page.locator("#live-roots a", has_text="runs").click()
    expect(page.locator("#live-attempts .legend li", has_text=re.compile("build"))).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="timeline").click()
    box = page.locator("#timeline a.run", has_text="pages-runs")
    expect(box.locator(".span-build")).to_have_count(1)
    # With its scripts, which run once all of it has come: what is pressed before goes nowhere.
    page.wait_for_load_state()
    # Keys move the window, its address can be sent to another, and the way back leads where one was.
    whole, width = page.url, box.locator("rect").first.get_attribute("width")
    page.focus("#timeline")
    page.keyboard.press("+")
    expect(page).to_have_url(re.compile("from=.*to="))
    assert page.evaluate("document.activeElement.id") == "timeline"
    page.go_back()
    expect(page).to_have_url(whole)
    expect(page.locator("#live-window p").first).to_contain_text("up to now")
    assert width is not None
    # Each attempt is a link; so are the same in the table.
    page.locator("summary").click()
    page.locator("#live-attempts a", has_text="pages-runs").click()
    expect(page.locator("h1")).to_have_text("pages-runs")


def test_of_thousands_of_attempts_the_timeline_shows_how_many_ran_and_closer_each(window: Window, farm: Farm) -> None:
    now = time.time()
    begins = [now - 1800 + number / 4 for number in range(3_000)]
    many = [
        AttemptTiming(f"{'0' * 32}-old-{number}", 1, name=f"old-{number}", worker=f"old-{number % 3}", leased_at=at)
        for number, at in enumerate(begins)
    ]
    for each, at in zip(many, begins, strict=True):
        each.ended_at, each.outcome = at + 8, "lost" if each.name == "old-1500" else "done"
    # Playwright has a loop of its own in this thread.
    with ThreadPoolExecutor() as threads:
        threads.submit(asyncio.run, keep(farm, many)).result()
    page = window.open("/")
    page.get_by_role("link", name="what ran in the last hour").click()
    expect(page.locator(".area.is-done")).not_to_have_count(0)
    expect(page.locator(".area.mark.is-lost")).to_have_count(1)
    row = page.locator("#live-workers tr", has_text="old-0").locator("td")
    expect(row.nth(1)).to_have_text("1,000")
    page.wait_for_load_state()
    # A pull to the right shows what was before, the wheel with Ctrl goes closer, to where each attempt is a box.
    drawing = page.locator("#timeline").bounding_box()
    assert drawing is not None
    x, y = drawing["x"] + drawing["width"] / 2, drawing["y"] + drawing["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=4)
    page.mouse.up()
    expect(page).to_have_url(re.compile("/timeline.from=.*to="))
    page.keyboard.down("Control")
    while not page.locator("#timeline a.run", has_text="old-").count():
        address = page.url
        page.mouse.wheel(0, -300)
        expect(page).not_to_have_url(address)
        expect(page.locator("#timeline")).not_to_have_attribute("aria-busy", "true")
    page.keyboard.up("Control")
    box = page.locator("#timeline a.run", has_text="old-").first
    expect(box).to_have_attribute("href", re.compile("/steps/0{32}-old-[0-9]+"))


async def keep(farm: Farm, timings: list[AttemptTiming]) -> None:
    store = TimingStore.open(f"sqlite+aiosqlite:///{farm.state}/timings.sqlite3")
    await store.prepare()
    await store.save(timings)
    await store.close()


def test_a_killed_worker_is_gone_its_attempt_lost_and_the_step_tried_again(
    window: Window, farm: Farm, spare: Future[Program], expression: Expression, gates: Path
) -> None:
    worker = spare.result()
    # The first attempt is there; where the second one will be takes no work yet.
    assert farm.drover("drain", "two").returncode == 0
    file = expression.write(
        'shot = shellFor "x86_64-linux" { name = "pages-shot"; requiredSystemFeatures = [ "spare" ]; } '
        f'"{waiting_for("pages-shot")}; echo > $out";'
    )
    assert farm.build(file, "-A", "shot", "--detach").returncode == 0
    submission = farm.api("submissions")[0]["id"]
    page = window.open("/workers")
    card = page.locator("section", has=page.get_by_role("heading", name="spare", exact=True))
    expect(card).to_contain_text("1 of 1 slots")
    switch_off(worker)
    expect(card.locator(".state")).to_have_text("gone")
    window.open("/").get_by_role("link", name="One worker is gone").click()
    expect(card.locator(".state")).to_have_text("gone")
    page = window.open(f"/submissions/{submission}")
    page.locator("#live-roots a", has_text="shot").click()
    attempts = page.locator("#live-attempts > ul > li")
    expect(attempts.locator("small").first).to_have_text(re.compile("^lost on spare, isolation [ABC]"))
    expect(attempts.first.locator("p.hint").first).to_contain_text("Ray reports that the")
    assert farm.drover("drain", "two", "--off").returncode == 0
    # The page follows the second attempt.
    (gates / "pages-shot").touch()
    expect(attempts.nth(0).locator("small").first).to_have_text(re.compile("^done on two, isolation"))
    expect(attempts.nth(1).locator("small").first).to_have_text(re.compile("^lost on spare"))
    expect(page.locator(".why")).to_contain_text("It was built here")
    page = window.open(f"/submissions/{submission}/timeline")
    expect(page.locator("#timeline a.run.is-lost", has_text="pages-shot")).to_have_count(1)
    expect(page.locator("#live-workers tr", has_text="spare").locator("td").nth(6)).to_have_text("1")


def test_what_of_an_environment_can_be_fetched_and_why_not_the_rest(window: Window, environment: str) -> None:
    page = window.open("/")
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Coverage").click()
    line = page.locator("section", has_text=environment).locator("li", has_text="riscv64-linux")
    expect(line).to_contain_text("1 missing")
    expect(line).to_contain_text("100 % built locally")
    page.get_by_role("main").get_by_role("link", name=environment).click()
    expect(page.locator("h1")).to_have_text(environment)
    linux = page.locator("section", has=page.get_by_role("heading", name="x86_64-linux"))
    expect(linux.locator("svg.bar")).to_have_attribute("aria-label", re.compile("% from here"))
    expect(linux.locator(".legend li", has_text="impossible")).to_contain_text("1")
    expect(linux.locator("svg.spark")).to_have_attribute("aria-label", re.compile("by week: from 25 % to "))
    gaps = page.locator("section", has=page.locator("#gaps")).locator("li")
    expect(gaps.filter(has_text="top")).to_contain_text("because pages-bad fails")
    expect(gaps.filter(has_text="waits")).to_contain_text("no worker builds for riscv64-linux")
    linux.get_by_role("link", name="Show them").click()
    expect(gaps.filter(has_text="waits")).to_have_count(0)
    expect(gaps.filter(has_text="top")).to_have_count(1)
    expect(page.locator("tbody tr")).to_contain_text("These are the roots of submission")


def test_pages_of_coverage_follow_what_comes_and_goes_without_being_loaded_again(
    window: Window, farm: Farm, submission: str, tmp_path: Path
) -> None:
    name = "pages-live"
    assert farm.drover("environments", "track", name).returncode == 0
    page = window.open("/coverage")
    beside = page.context.new_page()
    beside.goto(f"{farm.url}/coverage/{name}")
    for each in (page, beside):
        expect(each.locator("#link-state")).to_have_text("live")
        each.evaluate("window.mark = 'the same page'")
    expect(beside.locator("main")).to_contain_text("It has not been looked at yet.")
    listed = tmp_path / "one.list"
    listed.write_text(f"/nix/store/{farm.api('steps/pages-above')['key']}\n")
    done = farm.drover("environments", "push", name, str(listed), "--system", "x86_64-linux")
    assert done.returncode == 0, done.stderr
    card = page.locator("section", has_text=name)
    expect(card.locator("li", has_text="x86_64-linux")).to_contain_text("100 % from here")
    expect(card.locator("li", has_text="x86_64-linux")).to_contain_text("stable 1")
    linux = beside.locator("section", has=beside.get_by_role("heading", name="x86_64-linux"))
    expect(linux).to_contain_text("1 packages, stable is revision 1")
    expect(beside.locator("tbody tr")).to_have_count(1)
    assert farm.drover("environments", "forget", name).returncode == 0
    expect(card).to_have_count(0)
    expect(beside.locator("#link-state")).to_have_text("final")
    assert [each.evaluate("window.mark") for each in (page, beside)] == ["the same page"] * 2
    beside.close()


def test_coverage_is_read_without_a_script_and_with_the_keyboard(
    browser: Browser, farm: Farm, environment: str
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{farm.url}/coverage")
    page.get_by_label("API token").fill((farm.secrets / "api-token").read_text().strip())
    page.keyboard.press("Enter")
    link = page.get_by_role("main").get_by_role("link", name=environment)
    expect(link).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if link.evaluate("each => each === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#gaps")).to_be_visible()
    context.close()


def test_a_click_builds_again_what_failed(window: Window, submission: str) -> None:
    page = window.open(f"/submissions/{submission}")
    attempts = page.locator(".cause .row small")
    expect(attempts).to_contain_text("attempt 1")
    page.get_by_role("button", name="Build again what failed").click()
    expect(attempts).to_contain_text("attempt 2")


def test_a_log_is_followed_while_its_build_runs(
    window: Window, farm: Farm, expression: Expression, gates: Path
) -> None:
    ticks = "; ".join(f"echo tick {n}" for n in range(2, 7))
    slow = f'a = shell "pages-slow" "echo tick 1; {waiting_for("pages-slow")}; {ticks}; echo done > $out";'
    assert farm.build(expression.write(slow), "--detach").returncode == 0
    page = window.open("/steps?find=pages-slow")
    page.get_by_role("link", name="Log of attempt 1").click()
    page.evaluate("window.mark = 'the same page'")
    expect(page.locator("#lines li")).to_have_text([re.compile("1.*tick 1")])
    (gates / "pages-slow").touch()
    expect(page.locator("#lines li")).to_have_text([re.compile(f"{n}.*tick {n}") for n in range(1, 7)])
    expect(page.locator("#link-state")).to_have_text("ended")
    assert page.evaluate("window.mark") == "the same page"


def test_everything_is_reached_with_the_keyboard_alone(browser: Browser, farm: Farm, submission: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{farm.url}/submissions/{submission}")
    # The form has the focus, and leads back to the page that was asked for. A browser gives it after the page has
    # loaded, with the next frame that it draws: what a busy machine types before that goes nowhere.
    expect(page.get_by_label("API token")).to_be_focused()
    page.keyboard.type((farm.secrets / "api-token").read_text().strip())
    page.keyboard.press("Enter")
    expect(page.locator("#failures-title")).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent.trim()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
        if seen[-1] == "pages-bad":
            break
    assert {"Build again what failed", "Cancel", "pages-bad"} <= set(seen)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("pages-bad")
    context.close()


@pytest.fixture(scope="module")
def addresses(farm: Farm, submission: str, rebuilt: str, environment: str) -> list[str]:
    """An address of each page, and of one that is not there."""
    step = next(each["key"] for each in farm.api(f"submissions/{submission}/steps?state=failed"))
    found = [
        *("/", "/submissions", f"/submissions/{submission}", f"/submissions/{submission}/steps"),
        *(f"/steps/{step}", f"/steps/{step}/log?find=phase", "/workers"),
        *(f"/caches/default?path={step}", "/steps/nothing-of-the-sort"),
        *(f"/submissions/{submission}/timeline", "/timeline", "/packages/pages"),
        *("/coverage", f"/coverage/{environment}"),
    ]
    # Named by no address: the search leads to a step, the form for the token is shown to who is not logged in.
    for route in set(WEB_ROUTES) - {FIND_STEP, LOGIN_PAGE}:
        if route.answer is Content.PAGE and route.method == "GET":
            shape = re.compile(re.sub(r"{[a-z]+}", "[^/]+", route.path) + r"([?].*)?")
            assert any(map(shape.fullmatch, found)), f"no address of {route.path}"
    return [*found, f"/steps/{rebuilt}"]


#: What a farm is told by others gets a word that is longer than a phone is wide: not every run has such names and
#: reasons where each can be. Numbers, states, buttons and headings of tables are the farm's own.
LENGTHEN = """() => {
    const texts = "h1, h2, h3, p, dd, tbody th, td:not(.num), caption, code, pre, .name";
    const more = ".row > small, .hints li, .legend li, .tabs a";
    for (const each of document.querySelectorAll(`main :is(${texts}, ${more}):not(.figures *)`))
        each.append("x".repeat(150));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_fault_that_axe_finds_and_all_fit_a_phone(
    browser: Browser, farm: Farm, addresses: list[str], scheme: str
) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light", viewport=PHONE)
    window = Window(context.new_page(), farm)
    faults: list[tuple[str, str, str]] = []
    backgrounds = set()

    def judge(address: str) -> None:
        found = Axe().run(window.page).response["violations"]
        faults.extend((address, each["id"], str(each["nodes"][0]["html"])[:200]) for each in found)
        backgrounds.add(window.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for whose in ("too wide", "too wide when words are long"):
            width = window.page.evaluate("document.documentElement.scrollWidth")
            if width > PHONE["width"]:
                faults.append((address, whose, str(width)))
            window.page.evaluate(LENGTHEN)

    window.open("/login")
    judge("/login")
    window.log_in()
    for address in addresses:
        window.open(address)
        judge(address)
    assert "\n".join(map(str, faults)) == ""
    assert backgrounds == {"rgb(14, 17, 22)" if scheme == "dark" else "rgb(245, 246, 248)"}
    context.close()
