"""The coordinator as a whole: what is submitted over HTTP is built, published, counted and told."""

from __future__ import annotations

import asyncio
import gc
import io
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path

import aiohttp
import pytest

from coordinator.api.models import Counts, Ended, Snapshot, StepChanged, StepStatus, SubmissionState
from coordinator.api.requests import PinRequest, RootRequest, SubmitRequest
from coordinator.api.route import Right, Route
from coordinator.cli import exit_status
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError, UnreachableError
from coordinator.config import OwnerSettings, Settings
from coordinator.main import open_coordinator
from coordinator.state_lock import StateDirBusyError
from coordinator.stores.logs import LogStore
from tests.coordinator.conftest import PRELUDE, OpenedFarm, OpenFarm, nix_workers, waiting_for
from tests.coordinator.test_cli import drover
from tests.support.local_fleet import InProcessFleet
from tests.support.patience import PATIENCE_S
from workers.wire import polling
from workers.wire.fleet import Fleet, FleetEvent, Sink, WorkerConnected
from workers.wire.messages import FarmInfo

DIAMOND = """
rec {
  low = run "low" "echo low > $out";
  left = run "left" "read x < ${low}; echo left $x > $out";
  right = run "right" "read x < ${low}; echo right $x > $out";
  top = run "top" "read l < ${left}; read r < ${right}; echo $l and $r > $out; echo made top";
}
"""


async def test_what_stays_for_a_coordinators_life_is_kept_from_the_collector_once_it_serves(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm:
        app = farm.coordinator.app
        assert not any(each is app for each in gc.get_objects())


async def test_a_submitted_graph_is_built_in_order_and_every_output_can_be_fetched(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm, aiohttp.ClientSession() as web:
        submitted = await farm.submit(DIAMOND, "top", label="diamond")
        view = await farm.ended(submitted.id)
        assert (view.state, view.label) == (SubmissionState.SUCCEEDED, "diamond")
        assert view.counts == Counts(total=4, done=4)
        assert view.uploaded_bytes > 0
        root = view.roots[0]
        assert (root.attr, root.state) == ("top", StepStatus.DONE)

        steps = await farm.client.steps(view.id)
        assert {step.name for step in steps} == {"low", "left", "right", "top"}
        for step in steps:
            hash_part = step.outputs["out"].rpartition("/")[2][:32]
            async with web.get(f"{farm.coordinator.ready.cache_url}/{hash_part}.narinfo") as answer:
                assert answer.status == 200
                assert f"StorePath: {step.outputs['out']}\n" in await answer.text()
        log = b"".join([chunk async for chunk in farm.client.log(root.step)])
        assert log == b"made top\n"
        async with web.get(f"{farm.coordinator.ready.cache_url}/log/{root.drv.rpartition('/')[2]}") as answer:
            assert await answer.read() == log
        worker = (await farm.client.workers())[0]
        assert (worker.name, worker.state, worker.built, worker.leases) == ("one", "online", 4, ())


async def test_a_greeting_that_comes_after_that_of_the_next_life_does_no_lasting_harm(
    open_farm: OpenFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "GREET_AGAIN_S", 0.05)
    late = asyncio.Event()

    class Haunted(InProcessFleet):
        async def run(self, sink: Sink) -> None:
            async def haunted(event: FleetEvent) -> None:
                await sink(event)
                if isinstance(event, WorkerConnected) and not late.is_set():
                    late.set()
                    await sink(WorkerConnected(event.hello.model_copy(update={"incarnation": "an earlier life"})))

            await super().run(haunted)

    async with open_farm(fleet=nix_workers(tmp_path / "workers", ("one",), Haunted)) as farm:
        await late.wait()
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        assert view.state == SubmissionState.SUCCEEDED


async def test_the_same_graph_again_builds_nothing(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        first = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        again = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        assert first.counts.done == 4
        assert (again.state, again.counts.done) == (SubmissionState.SUCCEEDED, 0)
        assert again.counts.held == again.counts.total
        assert [view.id for view in await farm.client.submissions()] == [again.id, first.id]


async def test_two_submissions_share_work_and_each_sees_its_own_progress(open_farm: OpenFarm) -> None:
    # It ends once both have been submitted, whichever is slower.
    text = f"""
    rec {{
      shared = run "shared" "{waiting_for("shared")}; echo 1 > $out";
      one = run "one" "read x < ${{shared}}; echo one > $out";
      two = run "two" "read x < ${{shared}}; echo two > $out";
    }}
    """
    async with open_farm("one") as farm:
        one = await farm.submit(text, "one")
        two = await farm.submit(text, "two")
        assert (two.counts.total, two.counts.joined) == (2, 1)
        farm.open_gate("shared")
        ended = [await farm.ended(submission.id) for submission in (one, two)]
        assert [view.counts.done for view in ended] == [2, 2]
        assert sum(worker.built for worker in await farm.client.workers()) == 3


async def test_a_failing_step_dooms_its_dependents_and_http_names_the_root_cause(open_farm: OpenFarm) -> None:
    text = """
    rec {
      bad = run "bad" "echo first words; printf '\\\\033[31mred\\\\0'; echo; echo last words; exit 3";
      middle = run "middle" "read x < ${bad}; echo > $out";
      top = run "top" "read x < ${middle}; echo > $out";
      other = run "other" "echo fine > $out";
    }
    """
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(text, "top", "other")).id)
        assert (view.state, view.counts) == (SubmissionState.FAILED, Counts(total=4, done=1, failed=1, doomed=2))
        (bad,) = await farm.client.steps(view.id, [StepStatus.FAILED])
        assert bad.failure is not None
        assert (bad.failure.kind, bad.attempt) == ("permanent", 1)
        assert "3" in bad.failure.message
        assert bad.log_tail.split("\n")[-1] == "last words"
        assert "\x1b" not in bad.log_tail
        raw = b"".join([chunk async for chunk in farm.client.log(bad.key)])
        assert b"\x1b[31mred" in raw
        doomed = await farm.client.steps(view.id, [StepStatus.DOOMED])
        assert {step.cause for step in doomed} == {bad.key}


async def test_a_known_failure_is_reported_at_once_and_a_retry_builds_it_and_what_it_doomed_again(
    open_farm: OpenFarm,
) -> None:
    text = """
    rec {
      bad = run "bad" "echo no; exit 3";
      top = run "top" "read x < ${bad}; echo > $out";
      other = run "other" "echo fine > $out";
    }
    """
    async with open_farm("one") as farm:
        first = await farm.ended((await farm.submit(text, "top")).id)
        known = await farm.submit(text, "top", "other")
        assert (known.counts.failed, known.counts.doomed) == (1, 1)
        known = await farm.ended(known.id)
        assert (known.state, known.counts.done) == (SubmissionState.FAILED, 1)
        (bad,) = await farm.client.steps(known.id, [StepStatus.FAILED])
        assert bad.waiting is not None
        assert (bad.waiting.kind, bad.waiting.steps) == ("known_failure", (bad.key,))
        # One retry of the step lets both run again. (A busy worker may hand a lease back, so attempts only grow.)
        told = await farm.client.retry_step("bad")
        assert set(told.submissions) == {first.id, known.id}
        for submission in (first.id, known.id):
            assert (await farm.ended(submission)).state is SubmissionState.FAILED
        second = (await farm.client.step(bad.key)).attempt
        assert second > bad.attempt
        again = await farm.client.retry(first.id)
        assert again.state is SubmissionState.RUNNING
        assert (await farm.ended(first.id)).counts.failed == 1
        third = (await farm.client.step(bad.key)).attempt
        assert third > second
    async with open_farm("one") as farm:
        # The failure outlives the coordinator, and so does the way to retry it.
        view = await farm.client.retry(first.id)
        assert view.state is SubmissionState.RUNNING
        assert (await farm.ended(first.id)).counts.failed == 1
        assert (await farm.client.step(bad.key)).attempt > third
        healthy = await farm.client.retry((await farm.ended((await farm.submit(text, "other")).id)).id)
        assert healthy.state is SubmissionState.SUCCEEDED


async def test_an_owner_retries_a_step_for_its_own_submissions_alone(open_farm: OpenFarm, tmp_path: Path) -> None:
    token = tmp_path / "people"
    token.write_text("p" * 32)
    token.chmod(0o600)
    text = 'rec { bad = run "bad" "echo no; exit 3"; }'
    async with (
        open_farm("one", owners=(OwnerSettings(name="people", tokens=(str(token),)),)) as farm,
        ApiClient(farm.coordinator.ready.url, token.read_text()) as people,
    ):
        ours = await farm.ended((await farm.submit(text, "bad")).id)
        with pytest.raises(RefusedError, match="drover build --retry") as refused:
            await people.retry_step("bad")
        assert refused.value.reason == "forbidden"
        (root,) = ours.roots
        theirs = await people.submit(SubmitRequest(roots=(RootRequest(attr="bad", drv=root.drv),)))
        assert (await farm.ended(theirs.id)).state is SubmissionState.FAILED
        assert (await people.retry_step("bad")).submissions == (theirs.id,)
        await farm.ended(theirs.id)
        assert set((await farm.client.retry_step("bad")).submissions) == {ours.id, theirs.id}


async def test_a_watcher_sees_every_step_and_then_the_end(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        submitted = await farm.submit(DIAMOND, "top")
        events = await farm.watch(submitted.id)
        assert isinstance(events[0], Snapshot)
        assert isinstance(events[-1], Ended)
        seen = {event.step.name for event in events if isinstance(event, StepChanged)}
        seen |= {step.name for step in events[0].steps}
        assert seen >= {"left", "right", "top"}
        late = await farm.watch(submitted.id)
        assert [type(event) for event in late] == [Snapshot, Ended]


async def test_cancelling_stops_what_nobody_else_wants_and_may_be_repeated(open_farm: OpenFarm) -> None:
    text = 'rec { long = run "long" "echo started; while :; do :; done"; top = run "top" "echo ${long} > $out"; }'
    async with open_farm("one") as farm:
        submitted = await farm.submit(text, "top")
        await farm.until(lambda: farm.states(submitted.id)["long"] is StepStatus.RUNNING)
        worker = farm.coordinator.views.workforce.views
        await farm.until(lambda: any(stage == "building" for _, stage in worker()[0].leases))
        for _ in range(2):
            view = await farm.client.cancel(submitted.id)
            assert (view.state, view.counts.abandoned) == (SubmissionState.CANCELLED, 2)
        assert (await farm.ended(submitted.id)).state is SubmissionState.CANCELLED
        await farm.until(lambda: worker()[0].leases == ())
        assert (await farm.ended((await farm.submit(DIAMOND, "low")).id)).state is SubmissionState.SUCCEEDED


async def test_a_build_that_printed_nothing_has_an_empty_log(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit('rec { quiet = run "quiet" "echo > $out"; }', "quiet")).id)
        for follow in (False, True):
            assert [chunk async for chunk in farm.client.log(view.roots[0].step, follow=follow)] == []


async def test_an_answer_that_fails_half_way_is_cut_and_never_looks_whole(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> AsyncIterator[bytes]:
        yield b"one\n"
        raise OSError(5, "input/output error")

    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        monkeypatch.setattr(LogStore, "read", broken)
        with pytest.raises(UnreachableError):
            _ = [chunk async for chunk in farm.client.log(view.roots[0].step)]


async def test_a_log_can_be_followed_while_it_is_written(open_farm: OpenFarm) -> None:
    text = f'rec {{ slow = run "slow" "echo one; {waiting_for("slow")}; echo > $out; echo two"; }}'
    async with open_farm("one") as farm:
        submitted = await farm.submit(text, "slow")
        await farm.until(lambda: farm.states(submitted.id)["slow"] is not StepStatus.READY)
        log = b""
        async for chunk in farm.client.log(submitted.roots[0].step, follow=True):
            log += chunk
            farm.open_gate("slow")
        assert log == b"one\ntwo\n"


async def test_a_step_that_no_worker_can_take_waits_and_says_so(open_farm: OpenFarm) -> None:
    text = 'rec { mac = runOn "x86_64-darwin" {} "mac" "echo > $out"; top = run "top" "echo ${mac} > $out"; }'
    async with open_farm("one") as farm:
        await farm.until(lambda: bool(farm.coordinator.views.workforce.views()))
        submitted = await farm.submit(text, "top")
        view = await farm.client.submission(submitted.id)
        assert view.state is SubmissionState.RUNNING
        assert view.stuck == ("1 step waits: no worker offers the system x86_64-darwin",)
        waiting = {step.name: step.waiting_for for step in await farm.client.steps(view.id)}
        assert waiting["top"] == "waits for mac"
        said = re.fullmatch(
            r"no worker offers the system x86_64-darwin; it waits for one until (.+) UTC", waiting["mac"]
        )
        assert said is not None
        until = datetime.fromisoformat(f"{said[1]}+00:00").timestamp()
        assert 0 <= until - submitted.created_at - farm.settings.limits.give_up_s + 1 <= PATIENCE_S
        roots = await farm.evaluate(text, "top")
        await farm.client.submit(SubmitRequest(roots=roots, wait_s=0))
        waiting = {step.name: step.waiting_for for step in await farm.client.steps(view.id)}
        assert waiting["mac"] == "no worker offers the system x86_64-darwin; it waits for one for ever"


async def test_a_build_that_waits_for_no_worker_longer_than_was_said_ends_with_status_1_and_says_what_to_do(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    file = tmp_path / "mac.nix"
    file.write_text(PRELUDE + '{ mac = runOn "x86_64-darwin" {} "mac" "echo > $out"; }')
    async with open_farm() as farm:
        ready = farm.coordinator.ready
        words: list[str | Path] = ["build", file, "-A", "mac"]
        words += ["--wait", "1", "--option", "substituters", "", "--store", tmp_path / "n"]
        done = await asyncio.to_thread(drover, *words, "--coordinator", ready.url, "--token-file", ready.token_file)
        assert done.returncode == exit_status.BUILD_FAILED
        told = "no worker could take it for 1 s (no worker has joined): start a worker for x86_64-darwin"
        assert told in done.stdout
        # Running again is as patient as it was.
        [view] = await farm.client.submissions()
        await farm.client.retry(view.id)
        assert (await farm.ended(view.id)).state is SubmissionState.FAILED


async def test_after_a_restart_the_views_are_the_same_and_waiting_work_goes_on(open_farm: OpenFarm) -> None:
    bad = 'rec { bad = run "bad" "echo sorry; exit 1"; }'
    async with open_farm("one") as farm:
        await farm.ended((await farm.submit(DIAMOND, "left", label="done before")).id)
        await farm.ended((await farm.submit(bad, "bad")).id)
        ended = await farm.client.submissions()
        steps = [await farm.client.steps(view.id) for view in ended]
    async with open_farm() as farm:
        waiting = await farm.submit(DIAMOND, "top", label="waits")
        assert (waiting.counts.held, waiting.counts.ready, waiting.counts.waiting) == (2, 1, 1)
        again = await farm.client.submissions()
        assert again[1:] == ended
        assert [await farm.client.steps(view.id) for view in again[1:]] == steps
    async with open_farm("one") as farm:
        view = await farm.ended(waiting.id)
        assert (view.state, view.label) == (SubmissionState.SUCCEEDED, "waits")
        assert view.roots[0].attr == "top"


async def test_a_second_coordinator_on_the_same_state_directory_is_refused(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        with pytest.raises(StateDirBusyError, match="in use by another drover"):
            async with open_coordinator(farm.settings, nix_workers(farm.root, ())):
                pass


async def test_the_api_wants_the_token_and_the_cache_does_not(open_farm: OpenFarm, settings: Settings) -> None:
    async with open_farm() as farm, aiohttp.ClientSession() as web:
        url = farm.coordinator.ready.url
        assert farm.coordinator.ready.token_file.stat().st_mode & 0o777 == 0o600
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic wrong"}):
            async with web.get(f"{url}/api/v1/submissions", headers=headers) as answer:
                assert answer.status == 401
                assert (await answer.json())["error"]["code"] == "unauthorized"
        for path in ("/healthz", "/cache/nix-cache-info"):
            async with web.get(url + path) as answer:
                assert answer.status == 200


async def test_a_page_under_another_name_cannot_ask_a_coordinator_on_loopback(open_farm: OpenFarm) -> None:
    async with open_farm() as farm, aiohttp.ClientSession() as web:
        url = farm.coordinator.ready.url
        for host, status in (("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("[", 400), ("localhost", 200)):
            async with web.get(f"{url}/healthz", headers={"Host": host}) as answer:
                assert answer.status == status


async def test_lists_take_filters_and_a_word_that_a_filter_lacks_is_refused(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        client = farm.client
        view = await farm.ended((await farm.submit(DIAMOND, "left", "right")).id)
        assert {root.attr for root in await client.roots(view.id, [StepStatus.DONE])} == {"left", "right"}
        assert await client.roots(view.id, [StepStatus.FAILED, StepStatus.READY]) == []
        assert [worker.name for worker in await client.workers(["online"], "x86_64-linux")] == ["one"]
        assert await client.workers(["gone", "silent"]) == await client.workers(system="riscv64-linux") == []
        attempts = await client.submission_timeline(view.id, outcomes=["done"], worker="one")
        assert len(attempts) == view.counts.done
        assert await client.submission_timeline(view.id, outcomes=["lost"]) == []
        assert await client.submission_timeline(view.id, worker="two") == []
        output = view.roots[0].outputs["out"]
        await client.pin("default", "kept", PinRequest(paths=(output,)))
        assert [root.name for root in await client.cache_roots("default", "pin")] == ["kept"]
        assert await client.cache_roots("default", "push") == []
        for path in (f"submissions/{view.id}/roots?state=odd", "workers?state=done", "workers?colour=red"):
            with pytest.raises(RefusedError) as refused:
                await client.ask(
                    Route[None]("GET", f"/api/v1/{path.partition('?')[0]}", Right.API),
                    {},
                    params=dict([path.partition("?")[2].split("=")]),
                )
            assert refused.value.http_status == 400


async def test_metrics_show_steps_workers_and_the_cache(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm, aiohttp.ClientSession() as web:
        await farm.ended((await farm.submit(DIAMOND, "top")).id)
        async with web.get(f"{farm.coordinator.ready.url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = (await answer.text()).splitlines()
        assert 'drover_steps{state="done"} 4.0' in lines
        assert 'drover_workers{state="online"} 1.0' in lines
        assert 'drover_cache_dangling_references{cache="default"} 0.0' in lines
        published = next(line for line in lines if line.startswith("drover_cache_published_paths_total"))
        assert float(published.split()[1]) >= 4
        assert 'drover_cache_publish_seconds_count{cache="default"}' in "\n".join(lines)


async def test_an_absent_thing_is_404_with_a_sentence(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        waiting = await farm.submit(DIAMOND, "left", "right")
        asked = {
            "submissions/none": "there is no submission 'none'",
            "submissions/none/steps": "there is no submission",
            "submissions/none/events": "there is no submission",
            "steps/none": "there is no step 'none'",
            "steps/none/log": "there is no step",
            f"steps/{waiting.roots[0].step}/log": "has not been started yet",
            "elsewhere": "nothing at this address",
        }
        for path, sentence in asked.items():
            with pytest.raises(RefusedError, match=sentence) as refused:
                await farm.client.ask(Route[None]("GET", f"/api/v1/{path}", Right.API), {})
            assert (refused.value.http_status, refused.value.reason) == (404, "not_found")
        assert (await farm.client.step("-left.drv")).name == "left"
        with pytest.raises(RefusedError, match="3 steps match"):
            await farm.client.step(".drv")


async def test_malformed_requests_are_400_and_name_the_field(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        token = farm.coordinator.ready.token_file.read_text().strip()
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as web:
            url = f"{farm.coordinator.ready.url}/api/v1"
            for body in (b"", b"{", b"\xff", b'{"roots": 1}', b'{"roots": [{"attr": 1}]}', b"[" * 100_000):
                async with web.post(f"{url}/submissions", data=body) as answer:
                    assert answer.status == 400
                    assert (await answer.json())["error"]["message"].startswith("the request's ")
            async with web.post(f"{url}/submissions", data=b'{"roots": []}') as answer:
                assert answer.status == 422, "well formed, but there is nothing to build"
            async with web.get(f"{url}/submissions/x/steps?state=odd") as answer:
                assert answer.status == 400
            async with web.delete(f"{url}/submissions") as answer:
                assert answer.status == 405
            async with web.post(
                f"{url}/submissions", data=io.BytesIO(bytes(farm.settings.limits.request_bytes + 1))
            ) as answer:
                assert answer.status == 413


async def test_a_worker_that_does_not_see_the_object_store_needs_only_the_coordinator(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    def elsewhere(info: FarmInfo) -> AbstractAsyncContextManager[Fleet]:
        blind = info.model_copy(update={"object_store_url": (tmp_path / "not here").as_uri()})
        return nix_workers(tmp_path / "workers", ("far",))(blind)

    async with open_farm(fleet=elsewhere) as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        assert (view.state, view.counts.done) == (SubmissionState.SUCCEEDED, 4)
        assert (await farm.client.verify("default", full=True, repair=False)).broken == 0
        assert not (tmp_path / "not here").exists()


async def test_one_postgresql_database_holds_everything_and_a_restart_finds_it(
    tmp_path: Path, postgres_url: str
) -> None:
    settings = Settings(
        state_dir=tmp_path / "farm",
        port=0,
        journal_database_url=postgres_url,
        derivations_database_url=postgres_url,
        cache_database_url=postgres_url,
    )
    for built in (4, 0):
        async with (
            open_coordinator(settings, nix_workers(tmp_path / "workers", ("one",))) as coordinator,
            ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
        ):
            farm = OpenedFarm(coordinator, client, tmp_path, settings)
            view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
            assert (view.state, view.counts.done) == (SubmissionState.SUCCEEDED, built)
