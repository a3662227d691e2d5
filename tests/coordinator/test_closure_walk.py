"""What a client sends of a closure: what the farm lacks, found with few questions, and nothing of what it knows."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import field
from pathlib import Path

import pytest

from coordinator.api.models import SubmissionView
from coordinator.api.requests import GrowRequest, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.cli.sending import ClientStages, SentParts, send_closure, taken_after_sending
from coordinator.client import closure_walk
from coordinator.client.closure import LocalStore, read_closure
from coordinator.client.closure_walk import ClosureWalk
from coordinator.client.errors import RefusedError
from infra.nix import aterm
from infra.nix.drv_head import DrvHead, input_names, read_head
from infra.nix.errors import FormatError
from infra.nix.store_path import base_name_of
from infra.records import record
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.support.graphs import Made, Maker


@record(frozen=True, slots=True)
class WatchedStore(LocalStore):
    """A store that notes which .drv files are read."""

    files: list[str] = field(default_factory=list)

    def read(self, drv: str) -> bytes:
        self.files.append(drv)
        return LocalStore.read(self, drv)


READ_AHEAD = 16


@pytest.fixture(autouse=True)
def short_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closure_walk, "READ_AHEAD", READ_AHEAD)


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    (tmp_path / "client/nix/store").mkdir(parents=True)
    return WatchedStore(root=str(tmp_path / "client"))


def put(store: LocalStore, members: Iterable[Made]) -> None:
    for made in members:
        Path(store.physical(made.drv)).write_bytes(made.data)


def layers(make: Maker, depth: int, width: int, name: str, below: Sequence[Made] = ()) -> list[Made]:
    """`depth` layers of `width`, each standing on all of the layer before, inputs first."""
    everything: list[Made] = []
    for level in range(depth):
        layer = [make.plain(f"{name}-{level}-{place}", below) for place in range(width)]
        everything += layer
        below = layer
    return everything


def walked(store: LocalStore, roots: Sequence[Made], known: set[str]) -> tuple[tuple[str, ...], int]:
    """Derivations that a farm lacks which knows these, and the questions that this took."""
    walk = ClosureWalk(store, [root.drv for root in roots])
    questions = 0
    while walk.questions:
        questions += 1
        walk.learn([drv for drv in walk.questions if drv not in known])
    return walk.closure().derivations, questions


def test_a_closure_that_the_farm_knows_costs_one_question_and_no_file(store: WatchedStore, make: Maker) -> None:
    [root] = layers(make, 1, 1, "root")
    assert walked(store, [root], {root.drv}) == ((), 1)
    assert store.files == []


def test_a_new_closure_is_found_whole_and_inputs_first_with_few_questions(store: WatchedStore, make: Maker) -> None:
    everything = layers(make, 200, 1, "deep")
    put(store, everything)
    found, questions = walked(store, everything[-1:], set())
    assert found == read_closure(store, [everything[-1].drv]).derivations == tuple(made.drv for made in everything)
    assert questions < 10


def test_below_what_the_farm_knows_little_is_read(store: WatchedStore, make: Maker) -> None:
    old = layers(make, 20, 4, "old")
    new = layers(make, 3, 4, "new", old[-4:])
    put(store, [*old, *new])
    found, questions = walked(store, new[-4:], {made.drv for made in old})
    assert sorted(found) == sorted(made.drv for made in new)
    assert len(store.files) <= len(new) + READ_AHEAD < len(old)
    assert questions <= 3


def test_the_head_of_a_derivation_is_that_of_the_whole() -> None:
    data = (
        b'Derive([("dev","/d","",""),("out","/o","sha256","00")],[("/x.drv",["dev","out"]),("/y.drv",["out"])],'
        b'["/a","/b"],"s","b",["],["],[("k","(\\"/z.drv\\",[")])'
    )
    whole = aterm.parse(data)
    drvs = tuple(path for path, _ in whole.input_drvs)
    assert read_head(data) == DrvHead(("/d", "/o"), drvs, whole.input_srcs)
    assert input_names(data) == ["x.drv", "y.drv"]
    with pytest.raises(FormatError, match="an escape in a name"):
        read_head(data.replace(b"/d", b"/\\n"))


def test_names_of_inputs_are_found_without_reading_the_rest(make: Maker) -> None:
    for made in (*layers(make, 3, 4, "layer"), make.fixed("file", b"content")):
        assert input_names(made.data) == [base_name_of(path) for path in read_head(made.data).input_drvs]
    for broken in (
        b"",
        b"Derive([",
        b'Derive([("out","/o","","")],[("/x.drv"',
        b'Derive([("out","/o","","")],[("\xff",[")],[',
    ):
        assert input_names(broken) is None


async def sent(farm: OpenedFarm, store: LocalStore, *roots: Made, before: SentParts | None = None) -> SubmissionView:
    """Submit as a client does."""
    drvs = [root.drv for root in roots]

    async def send(whole: bool) -> tuple[str, ...]:
        return await send_closure(farm.client, store, drvs, None, ClientStages(), sent_before=before, whole=whole)

    async def take(makers: tuple[str, ...]) -> SubmissionView:
        wishes = tuple(RootRequest(attr=root.name, drv=root.drv) for root in roots)
        return await farm.client.submit(SubmitRequest(roots=wishes, makers=makers))

    return await taken_after_sending(send, take)


async def test_what_the_farm_knows_is_neither_read_nor_sent_again(
    open_farm: OpenFarm, store: WatchedStore, make: Maker
) -> None:
    async with open_farm() as farm:
        old = layers(make, 3, 3, "old")
        put(store, old)
        assert (await sent(farm, store, *old[-3:])).counts.total == 9
        shutil.rmtree(store.physical("/nix/store"))
        assert (await sent(farm, store, *old[-3:])).counts.total == 9
        os.mkdir(store.physical("/nix/store"))  # noqa: PTH102
        # A change: only what is new is sent, by a client that submits in batches too.
        before = SentParts()
        new = layers(make, 2, 1, "new", old[-3:])
        put(store, new)
        # What is read ahead may be known.
        put(store, old)
        assert (await sent(farm, store, new[0], before=before)).counts.total == 10
        store.files.clear()
        assert (await sent(farm, store, new[1], before=before)).counts.total == 11
        assert set(store.files) == {new[1].drv}


def added(store: LocalStore, file: Path) -> str:
    """Add a source to the client's store as Nix does."""
    command = ["nix-store", *store.flags, "--add", str(file)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


async def test_what_the_farm_has_lost_between_question_and_submission_is_sent_again(
    open_farm: OpenFarm, store: WatchedStore, make: Maker, tmp_path: Path
) -> None:
    file = tmp_path / "source.sh"
    file.write_text("echo source")
    source = await asyncio.to_thread(added, store, file)
    below = make.plain("below", sources=[source])
    above = make.plain("above", [below])
    put(store, [below, above])
    async with open_farm() as farm:
        first = await sent(farm, store, above)
        # The source is collected: the derivations are known, and only the submission finds that they lack it.
        narinfo = await farm.coordinator.cache.narinfo(source[11:43])
        assert narinfo is not None
        url = next(line for line in narinfo.decode().splitlines() if line.startswith("URL: "))[5:]
        object_file = farm.coordinator.cache.objects.local_path(url)
        assert object_file is not None
        object_file.unlink()
        again = await sent(farm, store, above)
        assert (again.counts.joined, again.id != first.id) == (2, True)
        assert object_file.exists()
    # The database of derivations is lost under a client that has asked already.
    forgetful = SentParts()
    async with open_farm() as farm:
        await sent(farm, store, above, before=forgetful)
    with closing(sqlite3.connect(tmp_path / "farm/derivations.sqlite3")) as database, database:
        database.execute("DELETE FROM derivations")
    async with open_farm() as farm:
        more = make.plain("more", [above])
        put(store, [more])
        assert (await sent(farm, store, more, before=forgetful)).counts.total == 3


async def test_a_closure_that_is_not_whole_is_not_taken_for_known(open_farm: OpenFarm, make: Maker) -> None:
    below = make.plain("below")
    above = make.plain("above", [below])
    root = RootRequest(attr="above", drv=above.drv)
    async with open_farm() as farm:
        stream = in_thread(encode_derivations([(above.name, above.data)]))
        with pytest.raises(RefusedError, match="every derivation must be sent after its inputs") as refused:
            await farm.client.send_derivations(stream)
        assert refused.value.reason == "missing_member"
        with pytest.raises(RefusedError, match="is not known here"):
            await farm.client.submit(SubmitRequest(roots=(root,)))
        opened = await farm.client.submit(SubmitRequest(roots=(), open=True))
        with pytest.raises(RefusedError, match="is not known here"):
            await farm.client.grow(opened.id, GrowRequest(roots=(root,)))
