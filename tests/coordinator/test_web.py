"""The pages: who sees them, what a browser is allowed, and that names of strangers stay text."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path

import aiohttp
import orjson

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.api.requests import SubmitRequest
from coordinator.api.web_routes import WEB_ROUTES
from coordinator.config import LimitSettings, Settings
from coordinator.http.web.attempts import FETCHES_SHOWN, attempt_lines
from coordinator.http.web.guards import HEADERS
from coordinator.http.web.live import PAUSE_S, REST_MOST_S, rest_s
from coordinator.http.web.texts import age_text, bytes_text, date_text, end_text
from coordinator.main import open_coordinator
from coordinator.security.sessions import SESSION_S, Sessions
from coordinator.stores.timings import AttemptTiming, Measured
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port
from tests.support.routes import PARTS

TEMPLATES = Path(__file__).parents[2] / "coordinator" / "http" / "web" / "templates"
UPLOAD_SECRET, API_TOKEN = "u" * 32, "a" * 32
CSRF = re.compile(r'name="csrf" value="([^"]+)"')
#: A name of a package that would be markup, if it could be; a store takes no such name, a label does.
NASTY = "a&b <script>alert(1)</script> \"c\" 'd'"
WAITS = '{ a = runOn "riscv64-linux" {} "waits" "echo > $out"; }'


class Browser:
    """A client that keeps cookies, as a browser does."""

    def __init__(self, farm: OpenedFarm, session: aiohttp.ClientSession) -> None:
        self.url = farm.coordinator.ready.url
        self.token = farm.coordinator.ready.token_file.read_text().strip()
        self.session = session
        #: As browsers send with every form.
        self.origin = {"Origin": self.url}

    async def get(self, address: str, **headers: str) -> tuple[int, str]:
        async with self.session.get(self.url + address, headers=headers) as answer:
            return answer.status, await answer.text()

    async def post(self, address: str, form: dict[str, str], headers: dict[str, str] | None = None) -> int:
        told = self.origin if headers is None else headers
        async with self.session.post(self.url + address, data=form, headers=told, allow_redirects=False) as answer:
            await answer.read()
            return answer.status

    async def log_in(self) -> None:
        assert await self.post("/login", {"token": self.token, "next": "/"}) == 303

    async def csrf(self) -> str:
        found = CSRF.search((await self.get("/"))[1])
        assert found is not None
        return found[1]


@asynccontextmanager
async def browser_of(farm: OpenedFarm) -> AsyncIterator[Browser]:
    # The farm listens at an address, whose cookies aiohttp keeps only when told to.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield Browser(farm, session)


def test_a_cookie_opens_the_pages_of_its_own_farm_until_it_expires() -> None:
    sessions = Sessions(UPLOAD_SECRET, API_TOKEN)
    cookie = sessions.begin(1000.0)
    session = sessions.check(cookie, 1000.0 + SESSION_S - 1)
    assert session is not None
    assert sessions.check(cookie, 1000.0 + SESSION_S) is None
    assert Sessions(UPLOAD_SECRET, "b" * 32).check(cookie, 1000.0) is None
    assert Sessions("v" * 32, API_TOKEN).check(cookie, 1000.0) is None
    version, expiry, nonce, mac = cookie.split(".")
    for forged in (
        f"{version}.{int(expiry) + 1}.{nonce}.{mac}",
        f"{version}.{expiry}.{nonce}x.{mac}",
        f"{version}.{expiry}.{nonce}.",
        f"{version}.{expiry}.{nonce}",
        "",
        "ü",
        "x" * 100_000,
    ):
        assert sessions.check(forged, 1000.0) is None
    other = sessions.check(sessions.begin(1000.0), 1000.0)
    assert other is not None
    assert sessions.is_csrf_token(session, sessions.csrf_token(session))
    assert not sessions.is_csrf_token(session, sessions.csrf_token(other))
    assert not sessions.is_csrf_token(session, "ü")


def test_a_watched_page_that_is_costly_is_rendered_less_often_and_not_too_seldom() -> None:
    assert [rest_s(took_s) for took_s in (0.001, 0.03, 2.0)] == [PAUSE_S / 2, 3.0, REST_MOST_S]


def test_every_state_has_a_sign_of_its_own_on_the_pages() -> None:
    """A page with one that has none was answered with status 500."""
    signs = re.search(r"set glyphs = \{(.*?)\}", (TEMPLATES / "parts.html").read_text(), re.DOTALL)
    assert signs is not None
    assert {*StepStatus, *SubmissionState} <= set(re.findall(r'"(\w+)": "\S"', signs[1]))


async def test_a_submission_that_was_superseded_and_one_that_expired_are_shown_as_that(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        await browser.log_in()
        roots = await farm.evaluate(WAITS, "a")
        old = await farm.client.submit(SubmitRequest(roots=roots, branch="main"))
        new = await farm.client.submit(SubmitRequest(roots=roots, branch="main", supersede=True, deadline_s=1))
        assert (await farm.ended(old.id)).state is SubmissionState.SUPERSEDED
        assert (await farm.ended(new.id)).state is SubmissionState.EXPIRED
        for address in ("/", "/submissions", f"/submissions/{old.id}", f"/submissions/{new.id}"):
            status, page = await browser.get(address)
            assert status == 200, address
            assert "superseded" in page or "expired" in page


async def test_a_page_is_shown_to_a_session_and_to_the_token_and_everybody_else_gets_the_login_form(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        version = farm.coordinator.ready.public_keys[0]
        status, page = await browser.get("/")
        assert status == 401
        assert 'name="token"' in page
        assert version not in page
        assert await browser.post("/login", {"token": "x" * 43, "next": "/"}) == 403
        assert (await browser.get("/"))[0] == 401
        await browser.log_in()
        status, page = await browser.get("/")
        assert status == 200
        assert version in page


async def test_the_cookie_is_kept_from_scripts_and_other_sites_and_opens_no_other_address(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        form = {"token": browser.token, "next": "//evil.example/"}
        async with browser.session.post(
            f"{browser.url}/login", data=form, headers=browser.origin, allow_redirects=False
        ) as answer:
            assert answer.headers["Location"] == "/"
            (told,) = answer.headers.getall("Set-Cookie")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(told.split("; "))
        assert (await browser.get("/"))[0] == 200
        assert (await browser.get("/api/v1/farm"))[0] == 401
        async with browser.session.post(f"{browser.url}/api/v1/submissions", json={}) as answer:
            assert answer.status == 401


async def test_the_cookie_of_a_farm_behind_tls_is_sent_over_tls_alone(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(state_dir=tmp_path / "farm", port=port, public_url="https://farm.example.org")
    async with open_coordinator(settings, no_workers) as coordinator, aiohttp.ClientSession() as session:
        form = {"token": coordinator.ready.token_file.read_text().strip()}
        headers = {"Origin": "https://farm.example.org"}
        async with session.post(
            f"http://127.0.0.1:{port}/login", data=form, headers=headers, allow_redirects=False
        ) as answer:
            assert answer.status == 303
            assert "Secure" in answer.headers["Set-Cookie"].split("; ")


async def test_a_change_needs_the_session_the_origin_and_the_form_of_a_page(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser, browser_of(farm) as other:
        for forged in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {}):
            assert await browser.post("/login", {"token": browser.token}, forged) == 403
        assert await browser.post("/logout", {"csrf": "x"}) == 401
        await browser.log_in()
        await other.log_in()
        good = {"csrf": await browser.csrf()}
        assert await browser.post("/logout", {}) == 403
        assert await browser.post("/logout", {"csrf": await other.csrf()}) == 403
        for forged in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {}):
            assert await browser.post("/logout", good, forged) == 403
        async with browser.session.post(f"{browser.url}/logout", json=good, headers=browser.origin) as answer:
            assert answer.status == 400
        too_many = {f"field-{number}": "" for number in range(17)}
        assert await browser.post("/logout", {**good, **too_many}) == 400
        assert await browser.post("/logout", {**good, "more": "x" * 20_000}) == 413
        assert (await browser.get("/"))[0] == 200
        assert await browser.post("/logout", good) == 303
        assert (await browser.get("/"))[0] == 401


async def test_every_answer_says_what_a_browser_may_load_and_holds_no_script_of_its_own(open_farm: OpenFarm) -> None:
    inline = re.compile(
        r"<script(?![^>]*src=)|\sstyle=|\son[a-z]+=|<style|(?:src|href|action)=\"(?!/[^/]|#|[?])", re.IGNORECASE
    )
    async with open_farm() as farm, browser_of(farm) as browser:
        await browser.log_in()
        await farm.submit(WAITS, label=NASTY)
        pages = 0
        for route in WEB_ROUTES:
            if route.method != "GET":
                continue
            async with browser.session.get(browser.url + route.address(**PARTS)) as answer:
                # The database of timings is made while pages are served already.
                assert answer.status in {200, 400, 404, 503}, route.path
                assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, route.path
                if answer.content_type == "text/html":
                    pages += 1
                    assert answer.headers["Cache-Control"] == "no-store"
                    assert inline.findall(await answer.text()) == [], route.path
        assert pages > len(WEB_ROUTES) // 4
        page = (await browser.get("/"))[1]
        for address in re.findall(r'(?:src|href)="(/static/[^"]+)"', page):
            async with browser.session.get(browser.url + address) as answer:
                assert answer.status == 200
                assert "immutable" in answer.headers["Cache-Control"]


async def test_names_of_strangers_stay_text(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        await browser.log_in()
        await farm.submit(WAITS, label=NASTY)
        page = (await browser.get("/"))[1]
        assert "<script>alert" not in page
        assert NASTY in unescape(page)


async def next_parts(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """Read a stream up to its next parts."""
    event = b""
    while True:
        line = (await answer.content.readline()).rstrip(b"\n")
        if line.startswith(b"event: "):
            event = line[7:]
        elif line.startswith(b"data: ") and event == b"parts":
            parts: dict[str, str] = orjson.loads(line[6:])
            return parts


async def test_a_page_is_kept_up_to_date_by_the_parts_that_changed(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        await browser.log_in()
        async with browser.session.get(f"{browser.url}/live/farm") as answer:
            first = await next_parts(answer)
            page = (await browser.get("/"))[1]
            assert all(f'id="live-{name}"' in page for name in first)
            assert len(first) == page.count('id="live-')
            await farm.submit(WAITS, label=NASTY)
            changed: dict[str, str] = {}
            while not {"summary", "queue", "submissions"} <= changed.keys():
                changed |= await next_parts(answer)
            # Throughput goes by the clock; nothing of the others has changed.
            assert changed.keys() <= {"summary", "queue", "submissions", "throughput"}
            assert "no worker has joined" in changed["queue"]


async def test_streams_are_bounded_and_one_that_is_not_read_holds_up_no_other(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "farm", port=0, limits=LimitSettings(watchers=2))
    async with open_coordinator(settings, no_workers) as coordinator, aiohttp.ClientSession() as session:
        url = f"{coordinator.ready.url}/live/farm"
        headers = {"Authorization": f"Bearer {coordinator.ready.token_file.read_text().strip()}"}
        async with session.get(url, headers=headers), session.get(url, headers=headers) as reader:
            assert "workers" in await next_parts(reader)
            async with session.get(url, headers=headers) as refused:
                assert refused.status == 503
                assert "Too many browsers" in await refused.text()
        # Streams that were left are given back once the coordinator has something to send, or notices it.
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with session.get(url, headers=headers) as answer:
                    if answer.status == 200:
                        break


MISSING = (
    *("/submissions/none", "/submissions/none/steps", "/live/submissions/none", "/submissions?after=none"),
    *("/steps/none", "/steps/none/log", "/live/steps/none", "/live/steps/none/log", "/steps?find=none"),
    *("/caches/none", "/static/none.css", "/submissions/none/timeline"),
)
NONSENSE = (
    *("/steps?find=", "/caches/default?after=-1", "/caches/default?path=nonsense", "/caches/default?path=%00%ff"),
    *("/submissions?after=" + "x" * 5000, "/submissions/%3Cscript%3E/steps?state=%22"),
)


async def test_what_is_not_there_and_nonsense_get_a_page_that_says_so(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, browser_of(farm) as browser:
        await browser.log_in()
        wrong = []
        for address in (*MISSING, *NONSENSE):
            status, page = await browser.get(address)
            expected = {404} if address in MISSING else {400, 404}
            if status not in expected or "<h1>" not in page or 'href="/"' not in page or "<script>" in page:
                wrong.append((address, status))
        assert wrong == []


DIAMOND = """
let
  bad = run "bad" ''
    echo 'Running phase: buildPhase'
    printf '\\033]0;title\\007<b>&\\033[1;31mred\\033[0m \\377\\000end\\n'
    exit 3
  '';
  left = run "left" "cat ${bad} > $out";
  right = run "right" "cat ${bad} > $out";
  top = run "top" "cat ${left} ${right} > $out";
  fine = run "fine" "echo fine > $out";
  phase = name: "echo '@nix {\\\"action\\\":\\\"setPhase\\\",\\\"phase\\\":\\\"${name}\\\"}' >&2";
  apart = run "apart" "echo one; ${phase "ripen<b>"}; echo two; read x < ${fine}; echo $x > $out";
in { inherit top fine apart; waits = runOn "riscv64-linux" {} "waits" "echo > $out"; }
"""


async def test_the_questions_have_their_answers_on_the_pages_of_submission_step_and_log(open_farm: OpenFarm) -> None:
    async with open_farm("w") as farm, browser_of(farm) as browser:
        await browser.log_in()
        sub = await farm.submit(DIAMOND, "top", "fine", "apart", "waits", label=NASTY)
        ended = {StepStatus.FAILED: 1, StepStatus.DOOMED: 3, StepStatus.DONE: 2, StepStatus.READY: 1}
        await farm.until(lambda: Counter(farm.states(sub.id).values()) == ended)

        page = (await browser.get(f"/submissions/{sub.id}"))[1]
        assert "One failure, 3 steps cannot run because of it" in page
        # The root cause and the end of its log are there once.
        assert page.count('class="cause"') == 1
        assert page.count("&lt;b&gt;&amp;red") == 1
        assert "no worker offers the system riscv64-linux" in page
        assert "drover log " in page
        assert NASTY in unescape(page)

        listed = (await browser.get(f"/submissions/{sub.id}/steps?state=doomed"))[1]
        assert all(f">{name}</a>" in listed for name in ("left", "right", "top"))
        assert ">fine</a>" not in listed

        async with browser.session.get(f"{browser.url}/steps?find=-bad") as found:
            assert found.url.path.endswith("-bad")
            page = await found.text()
        assert "It failed by itself." in page
        # Two levels up, drawn, and each a link.
        assert [name for name in ("left", "right", "top") if f"<title>{name}, doomed</title>" in page] == [
            "left", "right", "top",
        ]  # fmt: skip
        assert page.count('class="edge"') == 4
        apart = (await browser.get("/steps/" + farm.key_of("apart")))[1]
        assert "closure" in apart
        assert "refers to" in apart
        assert "<title>fine, done</title>" in apart
        assert (
            "no worker offers the system riscv64-linux"
            in (await browser.get("/steps/" + farm.key_of("waits")))[1].lower()
        )

        # Where its time went; how it was with the package before.
        async with asyncio.timeout(PATIENCE_S):
            # The writer of timings takes what changed twice a second.
            while not {'class="span-build"', 'class="span-publish"'} <= set(re.findall('class="span-[a-z]+"', apart)):
                apart = (await browser.get("/steps/" + farm.key_of("apart")))[1]
        assert re.search(r"done on w, isolation [ABC], \d{4}-", apart)
        history = (await browser.get("/packages/bad"))[1]
        assert (await browser.get("/packages/none"))[0] == 404
        assert "0 of 1 recipes" in history
        assert "failed (permanent) on w" in history
        timeline = (await browser.get(f"/submissions/{sub.id}/timeline"))[1]
        # One of them followed what failed.
        assert timeline.count('class="run is-') == 4
        assert "4 attempts ran." in timeline
        assert (await browser.get(f"/submissions/{sub.id}/timeline?from=nan"))[0] == 400
        # Without a script each window is a link away, also the farm's own.
        closer = unescape(re.findall(r'href="([?]from=[^"]*)" data-key="closer"', timeline)[0])
        status, closer_page = await browser.get(f"/submissions/{sub.id}/timeline{closer}")
        assert status == 200
        assert 'data-key="wider"' in closer_page
        whole_farm = (await browser.get("/timeline"))[1]
        assert whole_farm.count('class="run is-') == 4
        assert 'href="/timeline"' in (await browser.get("/"))[1]

        page = (await browser.get("/steps/" + farm.key_of("bad") + "/log?find=RED"))[1]
        assert '&lt;b&gt;&amp;<span class="bold colour-31">red</span> \ufffd' in page
        assert "title" not in page.partition('id="lines"')[2]
        assert "One line with “RED”" in page
        # A builder of nixpkgs says where a phase begins; what another one announces, its worker has counted.
        assert ">buildPhase</a>" in page
        # That one never began, and leads to the log that says why.
        (followed,) = [name for name in ("left", "right") if farm.coordinator.views.step(name).life.attempt]
        page = (await browser.get("/steps/" + farm.key_of(followed) + "/log"))[1]
        assert re.search(r'It never began, because .*<a href="/steps/[^"]*-bad[^"]*/log">the log of bad</a>', page)
        page = (await browser.get("/steps/" + farm.key_of("apart") + "/log"))[1]
        assert 'line=2#L2">ripen&lt;b&gt;</a>' in page
        assert not {chr(code) for code in range(32) if chr(code) not in "\n\t"} & set(page)


async def test_pages_change_what_the_api_changes(open_farm: OpenFarm) -> None:
    async with open_farm("w") as farm, browser_of(farm) as browser:
        await browser.log_in()
        form = {"csrf": await browser.csrf()}
        failing = await farm.submit('{ a = run "failing" "exit 1"; }')
        await farm.ended(failing.id)
        assert await browser.post(f"/submissions/{failing.id}/retry", form) == 303
        assert (await farm.ended(failing.id)).counts.failed == 1
        assert farm.coordinator.views.step("failing").life.attempt == 2
        assert await browser.post(f"/steps/{farm.key_of('failing')}/retry", form) == 303
        await farm.ended(failing.id)
        assert farm.coordinator.views.step("failing").life.attempt == 3

        waiting = await farm.submit(WAITS)
        assert await browser.post(f"/submissions/{waiting.id}/cancel", form) == 303
        assert farm.coordinator.views.submission(waiting.id).withdrawn

        stopped = await farm.submit('{ a = run "stopped" "while :; do read -t 1 x < /dev/zero; done"; }')
        await farm.until(lambda: farm.coordinator.views.step("stopped").state is StepStatus.RUNNING)
        assert "<dt>since</dt>" in (await browser.get(f"/steps/{farm.key_of('stopped')}"))[1]
        assert await browser.post(f"/submissions/{stopped.id}/cancel", form) == 303
        assert "<dt>since</dt>" not in (await browser.get(f"/steps/{farm.key_of('stopped')}"))[1], "nothing runs"

        def state() -> str:
            return farm.coordinator.views.workforce.views()[0].state

        assert await browser.post("/workers/w/drain", {**form, "on": "yes"}) == 303
        await farm.until(lambda: state() == "draining")
        assert "Stop draining" in (await browser.get("/workers"))[1]
        assert await browser.post("/workers/w/drain", {**form, "on": "no"}) == 303
        await farm.until(lambda: state() == "online")
        assert await browser.post("/workers/nobody/drain", form) == 404

        fine = await farm.submit('{ a = run "kept" "echo kept > $out"; }')
        await farm.ended(fine.id)
        path = "/nix/store/" + farm.key_of("kept")
        assert await browser.post("/caches/default/pin", {**form, "name": "mine", "path": path}) == 303
        page = (await browser.get("/caches/default?path=" + path))[1]
        assert "<h3>pin mine <small>for ever" in page
        assert await browser.post("/caches/default/pin", {**form, "name": "no name", "path": path}) == 400
        assert await browser.post("/caches/default/unpin", {**form, "name": "mine"}) == 303
        assert "pin mine" not in (await browser.get("/caches/default?path=" + path))[1]
        assert await browser.post("/caches/default/unpin", {**form, "name": "mine"}) == 404


def test_an_attempt_names_what_it_used_and_its_largest_inputs_and_nothing_that_is_not_known() -> None:
    fetches = [(f"/nix/store/{size}", "cache", size, 1.0, 0.5, False) for size in range(100)]
    timing = AttemptTiming(
        "s", 1, read_bytes=0, peak_memory_bytes=2048, measured=Measured(fetches=fetches, more_fetches=7)
    )
    [line, bare] = attempt_lines([1, 2], [timing])
    assert line.used == "at most 2.05 KB of memory, 0 B read from disks"
    assert (line.fetched, len(line.fetches), line.fetches[0].path) == (107, FETCHES_SHOWN, "/nix/store/99")
    assert (bare.used, bare.fetches) == ("", ())


def test_spans_sizes_and_dates_read_as_people_say_them() -> None:
    ends = [end_text(*each) for each in ((720, 1080), (700, 720), (-5, 60), (-90, -62))]
    assert ends == [
        "in 12 m 00 s to 18 m 00 s", "in about 12 m 00 s", "within 1 m 00 s", "later than foreseen",
    ]  # fmt: skip
    assert [age_text(s) for s in (-5, 0, 59.9, 187, 3600, 90_061)] == [
        "0 s", "0 s", "59 s", "3 m 07 s", "1 h 00 m", "1 d 1 h",
    ]  # fmt: skip
    assert [bytes_text(s) for s in (0, 999, 1500, 999_499, 12_000_000, 1.5e9, 3e15)] == [
        "0 B", "999 B", "1.5 KB", "999 KB", "12 MB", "1.5 GB", "3,000.0 TB",
    ]  # fmt: skip
    assert date_text(0) == "1970-01-01 00:00:00 UTC"
    assert date_text(1e300).startswith("9999-12-31")
