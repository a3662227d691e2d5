"""Imports from derivations in an evaluation, built by a real farm and fetched from its cache."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from coordinator.cli.fetching import realise
from coordinator.cli.import_builds import FarmImports
from coordinator.cli.screen import Screen
from coordinator.client.closure import LocalStore
from coordinator.client.errors import ClientError
from coordinator.evaluation.import_store import ImportDoor, open_store
from coordinator.evaluation.inputs import Inputs, evaluation_of, findings_asked
from coordinator.evaluation.model import Evaluation
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source import NixValue
from coordinator.evaluation.source_plan import EvaluationMeans
from infra.daemon import DaemonGone, open_socket
from infra.daemon.channel import Channel
from infra.daemon.wire import CLIENT_MAGIC, SERVER_MAGIC, Encoder, Inbox, Last, Message, Refusal
from tests.coordinator.conftest import PRELUDE, OpenedFarm, OpenFarm
from tests.support.patience import PATIENCE_S

FILE = (
    PRELUDE
    + """
rec {
  plain = run "plain" "echo plain > $out";
  name = run "name" "echo '\\"imported\\"' > $out";
  one = run (import name) "echo one > $out";
  two = run "two-${import name}" "echo two > $out";
  broken = run "broken" "echo first; echo the moon is wrong >&2; exit 3";
  bad = run (import broken) "echo > $out";
  worse = run "worse-${import broken}" "echo > $out";
  chain = run (import (run "next-${import name}" "echo '\\"chained\\"' > $out")) "echo > $out";
  far = run (import (runOn "riscv64-linux" {} "far" "echo '\\"far\\"' > $out")) "echo > $out";
  slow = run (import (run "slow" "read -t 9 < /dev/zero; echo '\\"slow\\"' > $out")) "echo > $out";
  chosen = run (import (builtins.toFile "plain.nix" "\\"text\\"")) "echo > $out";
}
"""
)


class ImportingClient:
    """A client with a store of its own whose evaluations import by way of the farm."""

    def __init__(self, farm: OpenedFarm) -> None:
        self.farm = farm
        self.file = farm.root / "imports.nix"
        self.file.write_text(FILE)
        self.flags = ("--option", "substituters", "", "--store", str(farm.root / "client"))
        self.lines: list[str] = []

    @asynccontextmanager
    async def imports(self) -> AsyncGenerator[FarmImports]:
        screen = Screen.choose(as_json=True)
        settings = ("--option", "sandbox", "false")
        store = str(self.farm.root / "client")
        async with FarmImports(
            self.farm.client, await self.farm.client.farm(), screen, settings, store, wait_s=1
        ) as imports:
            yield imports

    async def evaluate(
        self, *attrs: str, more: tuple[str, ...] = (), timeout_s: float = PATIENCE_S, evaluators: int = 2
    ) -> Evaluation:
        inputs = Inputs((str(self.file),), attrs=attrs, flags=(*self.flags, *more))
        async with self.imports() as imports:
            limits = PoolLimits(evaluators, 2 << 30, timeout_s)
            return await evaluation_of(inputs, limits, env=os.environ, on_messages=self.lines.append, imports=imports)


def names(evaluation: Evaluation) -> dict[str, str]:
    return {each.attr: each.drv.partition("-")[2] for each in evaluation.wanted}


async def test_what_an_evaluation_imports_is_built_by_the_farm(open_farm: OpenFarm) -> None:
    async with open_farm("w") as farm:
        client = ImportingClient(farm)
        # Each evaluator is slower than its deadline while the farm builds; that time is not its own.
        found = await client.evaluate(
            "plain", "one", "two", "chain", "bad", "worse", "far", "slow", "chosen", timeout_s=8
        )
        assert names(found) == {
            "plain": "plain.drv",
            "one": "imported.drv",
            "two": "two-imported.drv",
            "chain": "chained.drv",
            "slow": "slow.drv",
            "chosen": "text.drv",
        }
        failed = {each.attr: each for each in found.failed}
        for attr in ("bad", "worse"):
            assert failed[attr].error.startswith("the farm could not build broken, which the evaluation imports: ")
            assert "> the moon is wrong" in failed[attr].text
        assert re.search(r"far, which the evaluation imports: .*riscv64-linux", failed["far"].error), failed["far"]
        # One submission for each derivation, and nothing was built here.
        steps = sorted(row.key[33:] for row in farm.coordinator.views.rows())
        assert steps == ["broken", "far", "name", "next-imported", "slow"]
        labels = {view.label for view in await farm.client.submissions()}
        assert "imported by the evaluation of slow" in labels
        assert len(labels) == 5
        # What is in the client's store is not asked of the farm again.
        before = len(await farm.client.submissions())
        assert names(await client.evaluate("one")) == {"one": "imported.drv"}
        assert len(await farm.client.submissions()) == before


async def test_an_evaluation_that_may_not_import_says_so(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        client = ImportingClient(farm)
        more = ("--option", "allow-import-from-derivation", "false")
        found = await client.evaluate("plain", "one", more=more)
        assert list(names(found)) == ["plain"]
        assert [each.attr for each in found.failed] == ["one"]
        assert "'allow-import-from-derivation' is disabled" in found.failed[0].error
        assert await farm.client.submissions() == []


async def test_neither_imports_nor_what_does_not_import_waits_for_the_other(open_farm: OpenFarm) -> None:
    async with open_farm("w") as farm:
        client = ImportingClient(farm)
        pipe = farm.root / "pipe"
        os.mkfifo(pipe)
        file = farm.root / "reads.nix"
        file.write_text(
            f"let all = import {client.file}; in {{ inherit (all) one chain plain; reads = import {pipe}; }}"
        )
        async with client.imports() as imports:
            means = EvaluationMeans(PoolLimits(1, 2 << 30), os.environ, client.lines.append, imports=imports)
            asked = Inputs((str(file),), flags=client.flags)
            found = []
            async with asyncio.timeout(PATIENCE_S), aclosing(findings_asked(asked, means)) as findings:
                async for _, finding in findings:
                    found.append(finding.attr)
                    if finding.attr == "chain":
                        # The only evaluator of what does not import reads the pipe still.
                        await asyncio.to_thread(pipe.write_text, f"(import {client.file}).plain")
        assert sorted(found) == ["chain", "one", "plain", "reads"]


async def test_a_fetch_that_fails_in_nix_s_own_database_of_caches_is_made_again(
    open_farm: OpenFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, tries = tmp_path / "nix-store", tmp_path / "tries"
    program.write_text(
        f"""#!/bin/sh
        echo >> {tries}
        [ $(wc -l < {tries}) -gt 2 ] && exit
        echo "error: executing SQLite statement 'insert or replace': FOREIGN KEY constraint failed" >&2
        exit 1
        """
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with open_farm() as farm:
        view = await farm.client.farm()
        await realise(view, ["/nix/store/x"], LocalStore(), ())
        assert tries.read_text() == "\n" * 3
        program.write_text(f"#!/bin/sh\necho >> {tries}; echo 'error: no signature' >&2; exit 1\n")
        with pytest.raises(ClientError, match="could not be fetched from"):
            await realise(view, ["/nix/store/x"], LocalStore(), ())
        assert tries.read_text() == "\n" * 4


class RefusingBuilds:
    """A maker that makes nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    async def are_there(self, paths: Sequence[str]) -> bool:
        return not paths

    async def build(self, paths: Sequence[str], attr: str) -> str | None:
        self.asked.append(tuple(paths))
        return f"nothing is built for {attr}"


async def test_a_door_passes_on_everything_but_builds(tmp_path: Path) -> None:
    builds = RefusingBuilds()
    source = NixValue("x", "1", flags=("--store", str(tmp_path / "store")))

    async def socket(door: ImportDoor) -> str:
        through = door.source(source)
        return through.flags[through.flags.index("--store") + 1].removeprefix("unix://").partition("?")[0]

    async with open_store(builds, os.environ) as store:
        door = await store.door(source)
        path = await socket(door)
        assert Path(path).parent.stat().st_mode & 0o777 == 0o700
        drv = f"/nix/store/{'0' * 32}-x.drv"
        async with await open_socket(path) as connection:
            assert connection.version <= (1, 37)
            assert await connection.query_path_info(drv) is None
        client = await raw_client(path)
        ask = Encoder().integer(9).strings([f"{drv}!out"]).integer(0).getvalue()
        # The evaluator goes on with other attributes, and asks again when the build has ended.
        for _ in range(2):
            await client.send(ask)
            refusal = await answer(client)
            assert isinstance(refusal, Refusal)
            assert store.awaited(f"error: {refusal.message.decode()}\n") == 0
        assert builds.asked == []
        builds_of = [store.build(0, attr) for attr in ("an attribute", "another attribute")]
        assert await builds_of[0] == "nothing is built for an attribute"
        assert builds_of[0] is builds_of[1]
        await client.send(ask)
        assert await answer(client) == Refusal(0, b"nothing is built for an attribute")
        assert store.awaited("error: waits for build 0") is None
        # The connection goes on, as with a daemon whose build failed.
        await client.send(Encoder().integer(1).string(drv).getvalue())
        assert await answer(client) == Last()
        assert await client.decode(Inbox.read_bool) is False
        await client.send(Encoder().integer(36).getvalue())
        assert b"takes no request of kind 36" in str(await answer(client)).encode()
        await client.close()
        assert builds.asked == [(f"{drv}!out",)]
        stranger = await Channel.to_socket(path)
        await stranger.send(Encoder().integer(CLIENT_MAGIC + 1).getvalue())
        with pytest.raises(DaemonGone):
            await stranger.fill(1)
        await stranger.close()
    assert not Path(path).parent.exists()


async def raw_client(path: str) -> Channel:
    """A connection that has shaken hands, for requests that no client of ours makes."""
    channel = await Channel.to_socket(path)
    await channel.send(Encoder().integer(CLIENT_MAGIC).integer(0x120).integer(0).integer(0).getvalue())
    assert await channel.decode(Inbox.read_int) == SERVER_MAGIC
    assert await channel.decode(Inbox.read_int) <= 0x125
    assert await answer(channel) == Last()
    return channel


async def answer(channel: Channel) -> Message:
    """The end of the messages that precede a reply."""
    while not isinstance(message := await channel.decode(Inbox.read_message), Last | Refusal):
        pass
    return message


async def test_many_imports_are_built_at_one_time_and_given_up_where_the_evaluation_is_interrupted(
    open_farm: OpenFarm,
) -> None:
    # No worker: nothing is ever built.
    async with open_farm() as farm:
        client = ImportingClient(farm)
        attrs = ("one", "bad", "far", "slow", "chain", "plain", "chosen")
        task = asyncio.create_task(client.evaluate(*attrs, evaluators=1))
        await farm.until(lambda: len(list(farm.coordinator.views.rows())) == 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        views = await farm.client.submissions()
        assert [view.state for view in views] == ["cancelled"] * 4
