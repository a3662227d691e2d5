"""Intake against a real cache and real databases: truth is stored and planned, a lie is one error and nothing more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coordinator.api.limits import MAX_ROOTS
from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import FramingError, SourceHeader, encode_derivations, encode_sources
from coordinator.api.streams import LARGE_BYTES
from coordinator.errors import IntakeError, MissingMemberError, UnavailableError
from coordinator.intake import intake, plan_memory
from coordinator.intake.errors import DerivationRefusedError, StoreDirError, TooLargeError
from coordinator.intake.graph import Planned
from coordinator.intake.intake import VERIFYING_COST, Intake
from coordinator.intake.limits import IntakeLimits
from coordinator.intake.sources import SourceRefusedError
from coordinator.stores import derivations
from coordinator.stores.derivations import DerivationStore
from infra.cache.cache import Cache
from infra.cache.pulls.closure_pulls import Pulled
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.narinfo import NarInfo
from infra.nix.narinfo import parse as parse_narinfo
from infra.nix.store_path import StoreDir
from scheduler.farm import Farm
from scheduler.model import Instant, Requirements, StepKey, SubmissionId
from tests.support.cache import open_cache, publish
from tests.support.graphs import Made, Maker, relocated

STORE = StoreDir("/nix/store")


class IntakeHarness:
    """Intake with everything below it."""

    def __init__(self, cache: Cache, derivations: DerivationStore, limits: IntakeLimits) -> None:
        self.cache = cache
        self.derivations = derivations
        self.intake = Intake(derivations, cache, cache.objects, STORE, limits, rest_after_s=0.0)

    async def send(self, members: Iterable[Made]) -> int:
        return await self.send_raw((made.name, made.data) for made in members)

    async def send_raw(self, members: Iterable[tuple[str, bytes]]) -> int:
        return await self.intake.add_derivations(stream(encode_derivations(members)))

    async def submit(self, *roots: Made, outputs: Sequence[str] = ()) -> Planned:
        wishes = tuple(RootRequest(attr=made.name, drv=made.drv, outputs=tuple(outputs)) for made in roots)
        return await self.intake.submit(SubmitRequest(roots=wishes))

    async def unknown(self, *members: Made) -> list[str]:
        return await self.derivations.unknown([made.name for made in members])


async def stream(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.fixture
def limits() -> IntakeLimits:
    return IntakeLimits()


@pytest.fixture
async def room(tmp_path: Path, limits: IntakeLimits) -> AsyncIterator[IntakeHarness]:
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
    await derivations.prepare()
    try:
        async with open_cache(tmp_path) as cache:
            yield IntakeHarness(cache, derivations, limits)
    finally:
        await derivations.close()


@pytest.fixture
def make() -> Maker:
    return Maker()


def needs(planned: Planned) -> dict[str, list[list[str]]]:
    """Step name -> for each recipe the names of the steps that it needs."""
    names = {info.key: info.name for info in planned.infos}
    return {
        names[spec.key]: [sorted(names[need] for need in recipe.needs) for recipe in spec.recipes]
        for spec in planned.steps
    }


async def test_a_diamond_becomes_steps_with_inputs_first_that_the_scheduler_accepts(
    room: IntakeHarness, make: Maker
) -> None:
    base = make.plain("base", outputs=("out", "dev"))
    left, right = make.plain("left", [(base, ("dev",))]), make.plain("right", [(base, ("out", "dev"))])
    top = make.plain("top", [left, right], requiredSystemFeatures="kvm big-parallel kvm")
    assert await room.send([base, left, right, top]) == 4
    planned = await room.submit(top)
    assert needs(planned) == {"base": [[]], "left": [["base"]], "right": [["base"]], "top": [["left", "right"]]}
    assert planned.derivations == 4
    assert planned.steps[-1].recipes[0].requirements == Requirements("x86_64-linux", ("big-parallel", "kvm"))
    assert {info.name: dict(info.outputs) for info in planned.infos}["base"] == base.outputs
    facts, _ = Farm().handle(planned.event(SubmissionId("s")), Instant(1.0))
    assert facts

    order = (await room.derivations.orders([(StepKey(right.step), 0), (StepKey("nosuch"), 0)]))[StepKey(right.step), 0]
    assert order.drv_path == right.drv
    assert order.derivation == right.data
    assert order.inputs == tuple(sorted(base.outputs.values()))


async def test_the_second_stream_needs_only_what_is_new(room: IntakeHarness, make: Maker) -> None:
    base = make.plain("base")
    middle = make.plain("middle", [base])
    await room.send([base, middle])
    top = make.plain("top", [middle, base])
    query = IntakeQuery(store_dir="/nix/store", derivations=(base.name, middle.name, top.name), sources=())
    assert (await room.intake.missing(query)).derivations == (top.name,)
    assert await room.send([top]) == 1
    assert len((await room.submit(top)).steps) == 3


async def test_the_graph_ends_where_the_cache_holds_a_step(room: IntakeHarness, make: Maker) -> None:
    below = make.plain("below")
    held = make.plain("held", [below], outputs=("out", "lib"))
    top = make.plain("top", [held])
    await room.send([below, held, top])
    await publish(room.cache, held.outputs["out"])
    assert not (await room.submit(top)).held, "one output of two is not enough"
    await publish(room.cache, held.outputs["lib"])
    planned = await room.submit(top)
    assert needs(planned) == {"top": [["held"]]}
    assert planned.held == (held.step,)
    assert planned.derivations == 2
    await publish(room.cache, top.outputs["out"])
    again = await room.submit(top)
    assert (again.steps, again.held) == ((), (top.step,))


async def test_two_ways_to_fetch_one_file_and_all_above_them_are_one_step_each(
    room: IntakeHarness, make: Maker
) -> None:
    curl = make.plain("curl")
    one = make.fixed("file", b"content", urls="https://one.example")
    two = make.fixed("file", b"content", [curl], urls="https://two.example")
    over_one, over_two = make.plain("user", [one]), make.plain("user", [two])
    assert one.drv != two.drv
    assert over_one.drv != over_two.drv
    assert over_one.outputs == over_two.outputs
    await room.send([curl, one, two, over_one, over_two])
    planned = await room.submit(over_one, over_two)
    assert needs(planned) == {"curl": [[]], "file": [[], ["curl"]], "user": [["file"]]}
    assert planned.derivations == 5
    orders = await room.derivations.orders([(StepKey(one.step), 0), (StepKey(one.step), 1)])
    assert [order.drv_path for order in orders.values()] == [one.drv, two.drv]


async def test_recipes_keep_their_places_when_another_submission_brings_more(room: IntakeHarness, make: Maker) -> None:
    first = make.fixed("file", b"content", urls="https://one.example")
    await room.send([first])
    await room.submit(first)
    curl = make.plain("curl")
    second = make.fixed("file", b"content", [curl], urls="https://two.example")
    await room.send([curl, second])
    assert needs(await room.submit(second)) == {"file": [[], ["curl"]], "curl": [[]]}
    assert needs(await room.submit(first)) == {"file": [[], ["curl"]], "curl": [[]]}
    info = (await room.derivations.steps([StepKey(first.step)]))[StepKey(first.step)]
    assert info.drv == first.drv


async def test_a_fetcher_that_stands_on_another_fetcher_of_the_same_file_is_no_recipe(
    room: IntakeHarness, make: Maker
) -> None:
    one = make.fixed("file", b"content")
    unpacked = make.plain("unpacked", [one])
    two = make.fixed("file", b"content", [unpacked], urls="https://two.example")
    top = make.plain("top", [two])
    await room.send([one, unpacked, two, top])
    planned = await room.submit(top)
    assert needs(planned) == {"file": [[]], "top": [["file"]]}
    Farm().handle(planned.event(SubmissionId("s")), Instant(1.0))


async def test_builtin_builders_run_on_any_system(room: IntakeHarness, make: Maker) -> None:
    made = make.plain("fetched", builder="builtin:buildenv")
    await room.send([made])
    assert (await room.submit(made)).steps[0].recipes[0].requirements.system == "builtin"


async def test_chosen_outputs_are_checked(room: IntakeHarness, make: Maker) -> None:
    made = make.plain("two", outputs=("out", "dev"))
    await room.send([made])
    assert (await room.submit(made, outputs=["dev"])).roots[0].outputs == (("dev", made.outputs["dev"]),)
    with pytest.raises(IntakeError, match="has no output doc; it has dev, out"):
        await room.submit(made, outputs=["doc"])


async def test_a_deep_graph_does_not_recurse(room: IntakeHarness, make: Maker) -> None:
    chain = [make.plain("link-0")]
    for number in range(1, 3000):
        chain.append(make.plain(f"link-{number}", [chain[-1]]))
    await room.send(chain)
    assert len((await room.submit(chain[-1])).steps) == 3000


# Lies. Each is told after honest members, of which nothing may remain either.


@pytest.fixture
def honest(make: Maker) -> list[Made]:
    return [make.plain(f"honest-{number}") for number in range(300)]


async def refused(room: IntakeHarness, honest: list[Made], *lies: Made, kind: type[IntakeError], naming: Made) -> str:
    with pytest.raises(kind) as caught:
        await room.send([*honest, *lies])
    assert len(await room.unknown(*honest, *lies)) == len(honest) + len(lies)
    assert naming.name in str(caught.value)
    return str(caught.value)


async def test_content_at_another_path_is_refused(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    lie = replace(make.plain("real"), data=make.plain("real", flag="1").data)
    await refused(room, honest, lie, kind=DerivationRefusedError, naming=lie)


async def test_an_output_path_of_another_derivation_is_refused(
    room: IntakeHarness, make: Maker, honest: list[Made]
) -> None:
    real, victim = make.plain("real"), make.plain("victim")
    stolen = real.data.replace(real.outputs["out"].encode(), victim.outputs["out"].encode())
    lie = relocated(STORE, real, stolen)
    assert "output" in await refused(room, honest, lie, kind=DerivationRefusedError, naming=lie)


async def test_a_missing_member_is_named(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    absent = make.plain("absent")
    top = make.plain("top", [absent])
    assert absent.name in await refused(room, honest, top, kind=MissingMemberError, naming=top)


async def test_a_member_before_its_input_is_named(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    below = make.plain("below")
    top = make.plain("top", [below])
    assert "after its inputs" in await refused(room, honest, top, below, kind=MissingMemberError, naming=top)


async def test_a_cycle_of_crafted_names_is_refused(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    placeholder = make.plain("zero")
    one = make.plain("one", [placeholder])
    two = make.plain("two", [one])
    lie = replace(one, data=one.data.replace(placeholder.drv.encode(), two.drv.encode()))
    await refused(room, honest, lie, two, kind=IntakeError, naming=lie)


async def test_a_name_that_leaves_the_store_is_refused(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    lie = replace(make.plain("real"), drv="/nix/store/..%2f..%2fetc.drv")
    await refused(room, honest, lie, kind=IntakeError, naming=lie)


async def test_bytes_that_are_no_derivation_are_refused(room: IntakeHarness, make: Maker, honest: list[Made]) -> None:
    lie = replace(make.plain("real"), data=b"Derive([")
    await refused(room, honest, lie, kind=DerivationRefusedError, naming=lie)


async def test_outputs_of_unknown_path_are_refused_for_now(
    room: IntakeHarness, make: Maker, honest: list[Made]
) -> None:
    floating = make.floating("floating")
    assert "not known before" in await refused(room, honest, floating, kind=DerivationRefusedError, naming=floating)


async def test_a_cut_stream_and_garbage_store_nothing(room: IntakeHarness, honest: list[Made]) -> None:
    data = b"".join(encode_derivations((made.name, made.data) for made in honest))
    for damaged in (data[: len(data) // 2], b"garbage", b""):
        with pytest.raises(FramingError):
            await room.intake.add_derivations(stream([damaged]))
    assert len(await room.unknown(*honest)) == len(honest)


async def test_a_derivation_that_was_never_sent_cannot_be_submitted(room: IntakeHarness, make: Maker) -> None:
    with pytest.raises(MissingMemberError, match="ghost"):
        await room.submit(make.plain("ghost"))


class TestLimits:
    @pytest.fixture
    def limits(self) -> IntakeLimits:
        return IntakeLimits(max_derivations=5, max_derivation_bytes=2000)

    async def test_too_many_derivations_name_the_limit_and_the_count(self, room: IntakeHarness, make: Maker) -> None:
        graph = [make.plain(f"n-{number}") for number in range(6)]
        with pytest.raises(FramingError, match="more than 5 derivations"):
            await room.send(graph)
        query = IntakeQuery(store_dir="/nix/store", derivations=tuple(made.name for made in graph), sources=())
        with pytest.raises(TooLargeError, match=r"6 derivations.* at most 5"):
            await room.intake.missing(query)
        await room.send(graph[:3])
        await room.send(graph[3:])
        with pytest.raises(TooLargeError, match=r"6 derivations.* at most 5"):
            await room.submit(*graph)

    async def test_a_derivation_that_is_too_large_is_named(self, room: IntakeHarness, make: Maker) -> None:
        large = make.plain("large", text="x" * 3000)
        with pytest.raises(FramingError, match=large.name):
            await room.send([large])


async def test_large_derivations_of_all_clients_share_one_budget(tmp_path: Path, make: Maker) -> None:
    limits = IntakeLimits(verifying_bytes=2 * LARGE_BYTES * VERIFYING_COST)
    graphs = [
        [make.plain(f"large-{each}-{number}", text="x" * (LARGE_BYTES + 1)) for number in range(3)] for each in "abc"
    ]
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
    await derivations.prepare()
    async with open_cache(tmp_path) as cache:
        room = IntakeHarness(cache, derivations, limits)
        assert await asyncio.gather(*(room.send(graph) for graph in graphs)) == [3, 3, 3]
        budget = room.intake.budget
        assert LARGE_BYTES < budget.peak <= budget.capacity
        assert budget.held == 0
        assert await room.unknown(*(made for graph in graphs for made in graph)) == []
    await derivations.close()


async def test_more_streams_than_the_limit_are_refused_with_the_limit(room: IntakeHarness, make: Maker) -> None:
    opened = [asyncio.Event() for _ in range(IntakeLimits().max_streams)]

    async def open_stream(event: asyncio.Event) -> AsyncIterator[bytes]:
        event.set()
        await asyncio.Event().wait()
        yield b""

    streams = [asyncio.ensure_future(room.intake.add_derivations(open_stream(event))) for event in opened]
    await asyncio.gather(*(event.wait() for event in opened))
    with pytest.raises(UnavailableError, match=f"{len(opened)} streams are being taken, the limit"):
        await room.send([make.plain("one")])
    for each in streams:
        each.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    assert await room.send([make.plain("one")]) == 1


@pytest.mark.parametrize(
    ("field", "wish"),
    [
        ("label", {"label": "\u00e9" * 600}),
        ("attr", {"attr": "a" * 1025}),
        ("drv", {"drv": "/nix/store/" + "a" * 1025}),
        ("roots", {"roots": MAX_ROOTS + 1}),
    ],
)
def test_texts_for_people_are_bounded_and_the_refusal_names_field_and_bound(field: str, wish: dict[str, Any]) -> None:
    root = {"attr": wish.get("attr", "a"), "drv": wish.get("drv", "/nix/store/x.drv")}
    body = {"label": wish.get("label", ""), "roots": [root] * wish.get("roots", 1)}
    with pytest.raises(ValidationError, match=rf"{field}[\s\S]*(1024|{MAX_ROOTS})"):
        SubmitRequest.model_validate_json(json.dumps(body))


async def test_another_store_directory_is_refused_with_both_names(room: IntakeHarness) -> None:
    with pytest.raises(StoreDirError, match=r"/gnu/store.*/nix/store"):
        await room.intake.missing(IntakeQuery(store_dir="/gnu/store", derivations=(), sources=()))
    with pytest.raises(StoreDirError, match="/gnu/store"):
        await room.intake.submit(SubmitRequest(roots=(RootRequest(attr="a", drv="/gnu/store/x.drv"),)))


# Sources.


def nar_of(content: bytes) -> bytes:
    return b"".join(write_events([NarFile(b"", executable=False, size=len(content)), NarData(content)]))


def text(name: str, content: bytes, *references: str) -> tuple[SourceHeader, bytes]:
    from hashlib import sha256  # noqa: PLC0415

    path = STORE.make_text_path(name, sha256(content).hexdigest(), references)
    nar = nar_of(content)
    names = tuple(reference.rpartition("/")[2] for reference in references)
    return SourceHeader(path=path.rpartition("/")[2], references=names, nar_hash="sha256:?", nar_size=len(nar)), nar


async def send_sources(room: IntakeHarness, *members: tuple[SourceHeader, bytes]) -> int:
    opened = [(header, lambda nar=nar: iter([nar])) for header, nar in members]
    return await room.intake.add_sources(stream(encode_sources(opened)))


async def test_sources_are_published_with_their_references_and_then_enough_for_a_submission(
    room: IntakeHarness, make: Maker
) -> None:
    below = text("below.sh", b"echo below")
    above = text("above.sh", b"source below", f"/nix/store/{below[0].path}")
    user = make.plain("user", sources=[f"/nix/store/{above[0].path}"])
    await room.send([user])
    with pytest.raises(MissingMemberError, match=r"above\.sh"):
        await room.submit(user)
    query = IntakeQuery(store_dir="/nix/store", derivations=(), sources=(below[0].path, above[0].path))
    assert (await room.intake.missing(query)).sources == query.sources
    assert await send_sources(room, below, above) == 2
    assert (await room.intake.missing(query)).sources == ()
    narinfo = await room.cache.narinfo(above[0].path[:32])
    assert narinfo is not None
    assert f"References: {below[0].path}" in narinfo.decode()
    assert "CA: text:sha256:" in narinfo.decode()
    assert len((await room.submit(user)).steps) == 1


async def test_a_built_path_among_the_sources_is_made_by_the_derivation_that_makes_it(
    room: IntakeHarness, make: Maker
) -> None:
    """Nothing can tell whether the bytes of such a path are true, so none are taken: it is built."""
    below = make.plain("below")
    maker = make.plain("maker", [below], outputs=("dev", "out"))
    path = maker.outputs["out"]
    user = make.plain("user", sources=[path])
    await room.send([below, maker, user])
    with pytest.raises(MissingMemberError, match="maker"):
        await room.submit(user)
    header, nar = text("maker", b"forged")
    forged = replace(header, path=path.rpartition("/")[2])
    with pytest.raises(SourceRefusedError, match="drover cache push"):
        await send_sources(room, (forged, nar))
    wish = SubmitRequest(roots=(RootRequest(attr="user", drv=user.drv),), makers=(maker.drv,))
    planned = await room.intake.submit(wish)
    assert needs(planned) == {"below": [[]], "maker": [["below"]], "user": [["maker"]]}
    order = (await room.derivations.orders([(StepKey(user.step), 0)]))[StepKey(user.step), 0]
    assert order.inputs == (path,)


@pytest.mark.parametrize("output", ["dev", "lib", "out"])
async def test_the_derivation_of_a_built_path_serves_the_next_submission_too(
    room: IntakeHarness, make: Maker, output: str
) -> None:
    maker = make.plain("maker", outputs=("dev", "lib", "out"))
    user = make.plain("user", sources=[maker.outputs[output]])
    await room.send([maker, user])
    await room.submit(maker)
    assert needs(await room.submit(user)) == {"maker": [[]], "user": [["maker"]]}
    await publish(room.cache, maker.outputs[output])
    assert needs(await room.submit(user)) == {"user": [[]]}


async def test_a_built_path_that_is_lost_while_a_submission_waits_is_built_again_or_waited_for(
    room: IntakeHarness, make: Maker
) -> None:
    maker, stranger = make.plain("maker", outputs=("dev", "lib", "out")), make.plain("stranger")
    on_maker = [make.plain(f"on-{name}", sources=[path]) for name, path in maker.outputs.items()]
    on_stranger = make.plain("on-stranger", sources=[stranger.outputs["out"]])
    for path in (*maker.outputs.values(), *stranger.outputs.values()):
        await publish(room.cache, path)
    await room.send([maker, *on_maker, on_stranger])
    await room.submit(maker)
    users = (*on_maker, on_stranger)
    waiting: dict[str, list[list[str]]] = {user.name[33:-4]: [[]] for user in users}
    assert needs(await room.submit(*users)) == waiting
    for path in (*maker.outputs.values(), *stranger.outputs.values()):
        file = room.cache.objects.local_path((await narinfo_of(room.cache, path)).stored.url)
        assert file is not None
        file.unlink()
    roots = tuple(RootRequest(attr=user.name, drv=user.drv) for user in users)
    planned = await room.intake.submit(SubmitRequest(roots=roots), sources_may_lack=True)
    made = {f"on-{name}": [["maker"]] for name in maker.outputs}
    assert needs(planned) == {**made, "maker": [[]], "on-stranger": [[]]}
    with pytest.raises(MissingMemberError, match="stranger"):
        await room.intake.submit(SubmitRequest(roots=roots))


async def test_a_graph_that_comes_again_is_planned_from_memory_and_never_differs_from_a_new_plan(
    room: IntakeHarness, make: Maker, tmp_path: Path
) -> None:
    source = text("source.sh", b"echo source")
    fetch = make.fixed("file.tar", b"content")
    below = make.plain("below", [fetch], sources=[f"/nix/store/{source[0].path}"])
    above = make.plain("above", [below, fetch])
    await room.send([fetch, below, above])
    await send_sources(room, source)
    whole = {"file.tar": [[]], "below": [["file.tar"]], "above": [["below", "file.tar"]]}

    async def planned() -> Planned:
        """Return the plan, which is what an intake without memory makes of the same."""
        again = await room.submit(above)
        new = await IntakeHarness(room.cache, room.derivations, IntakeLimits()).submit(above)
        assert (again.steps, again.held, again.infos, again.roots) == (new.steps, new.held, new.infos, new.roots)
        return again

    first = await planned()
    assert needs(first) == whole
    assert (await planned()).steps is first.steps
    # The lease of its paths has ended, as it does once the submission is a root.
    room.intake.leases.give_back(first.leases * 2)
    await room.intake.leases.end(())
    assert (await planned()).steps is first.steps
    # Something else was published.
    await publish(room.cache, make.plain("stranger").outputs["out"])
    assert (await planned()).steps is first.steps
    # A step of it was published, and its object is lost without a word.
    await publish(room.cache, below.outputs["out"])
    assert [(await planned()).held for _ in range(2)] == [(below.step,)] * 2
    file = room.cache.objects.local_path((await narinfo_of(room.cache, below.outputs["out"])).stored.url)
    assert file is not None
    file.unlink()
    assert needs(await planned()) == whole
    # The source is lost.
    file = room.cache.objects.local_path((await narinfo_of(room.cache, f"/nix/store/{source[0].path}")).stored.url)
    assert file is not None
    file.unlink()
    with pytest.raises(MissingMemberError, match=r"source\.sh"):
        await room.submit(above)
    await send_sources(room, source)
    assert needs(await planned()) == whole
    # A step of it gains a recipe by another submission.
    other = make.fixed("file.tar", b"content", urls="https://elsewhere.example/file.tar")
    await room.send([other])
    await room.submit(other)
    assert needs(await planned())["file.tar"] == [[], []]


async def test_at_rest_what_is_kept_for_speed_is_forgotten_and_the_next_plan_is_the_same(
    room: IntakeHarness, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_memory, "KEPT_AT_REST", 1)
    monkeypatch.setattr(derivations, "NODES_KEPT_AT_REST", 1)
    rested, loop = asyncio.Event(), asyncio.get_running_loop()
    monkeypatch.setattr(intake, "give_back_free_memory", lambda: loop.call_soon_threadsafe(rested.set))
    base = make.plain("base")
    top = make.plain("top", [base])
    await room.send([base, top])
    planned = await room.submit(top)
    resting = asyncio.create_task(room.intake.run())
    assert room.derivations.walk([top.name], {}, []) == []
    await rested.wait()
    resting.cancel()
    assert room.derivations.walk([top.name], {}, []) == [top.name]
    assert (await room.submit(top)).steps == planned.steps


async def test_a_plan_that_was_under_way_while_a_step_gained_a_recipe_has_it_the_next_time(
    room: IntakeHarness, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = make.fixed("file.tar", b"content")
    other = make.fixed("file.tar", b"content", urls="https://elsewhere.example/file.tar")
    above = make.plain("above", [fetch])
    await room.send([fetch, other, above])
    pull = room.intake.pulls.pull

    async def pull_after_another(paths: Collection[str]) -> Pulled:
        monkeypatch.setattr(room.intake.pulls, "pull", pull)
        await room.submit(other)
        return await pull(paths)

    monkeypatch.setattr(room.intake.pulls, "pull", pull_after_another)
    assert needs(await room.submit(above))["file.tar"] == [[]]
    assert needs(await room.submit(above))["file.tar"] == [[], []]


async def narinfo_of(cache: Cache, path: str) -> NarInfo:
    text = await cache.narinfo(path.rpartition("/")[2][:32])
    assert text is not None
    return parse_narinfo(text, STORE)


async def test_a_source_of_other_content_is_refused_with_its_name(room: IntakeHarness) -> None:
    header, _ = text("real.sh", b"content")
    nar = nar_of(b"CONTENT")
    with pytest.raises(SourceRefusedError, match=r"real\.sh is not addressed by its content"):
        await send_sources(room, (header, nar))
    assert await room.cache.missing([f"/nix/store/{header.path}"])


async def test_a_source_that_is_no_archive_is_refused_with_its_name(room: IntakeHarness) -> None:
    header, nar = text("real.sh", b"content")
    with pytest.raises(SourceRefusedError, match=r"real\.sh"):
        await send_sources(room, (header, b"x" * len(nar)))


async def test_a_source_whose_reference_is_not_there_is_refused_with_its_name(room: IntakeHarness) -> None:
    below = text("below.sh", b"echo below")
    above = text("above.sh", b"source below", f"/nix/store/{below[0].path}")
    with pytest.raises(SourceRefusedError, match=r"above\.sh was refused.*below\.sh"):
        await send_sources(room, above)


async def test_sources_before_a_fault_stay(room: IntakeHarness) -> None:
    good, bad = text("good.sh", b"good"), text("bad.sh", b"bad")
    with pytest.raises(SourceRefusedError, match=r"bad\.sh"):
        await send_sources(room, good, (bad[0], nar_of(b"BAD")))
    assert not await room.cache.missing([f"/nix/store/{good[0].path}"])
