"""Losses of the cache: a worker uploads again, a step is built again, or a client sends again; no builder is blamed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import BUSYBOX, Expression
from tests.support.farm import Farm
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

#: `FIRST` is in the cache before. Everything else waits for `gate`, and meanwhile the cache loses what it loses.
GRAPH = """
    gate = shell "gate" "while [ ! -e /gate/open ]; do /bin/busybox sleep 0.1; done; echo open > $out";
    kept = on-first "kept" { } "echo kept > $out";
    object = on-first "object" { } "echo object > $out";
    row = on-first "row" { } "echo row > $out";
    below = on-first "below" { } "echo below > $out";
    above = on-first "above" { inherit below; } "echo $below > $out";
    on-first = name: extra: shellFor "x86_64-linux" ({ inherit name; requiredSystemFeatures = [ "first" ]; } // extra);
    source = builtins.toFile "source" "a source of ${baseNameOf (toString ./.)}";
    unwatched = builtins.toFile "unwatched" "another source of ${baseNameOf (toString ./.)}";
    waits = name: input: shellFor "x86_64-linux" {
      inherit name gate input; requiredSystemFeatures = [ "second" ];
    } "read line < $input; echo $line > $out";
    on-kept = waits "on-kept" kept;
    on-object = waits "on-object" object;
    on-row = waits "on-row" row;
    on-above = waits "on-above" above;
    on-source = waits "on-source" source;
    on-unwatched = waits "on-unwatched" unwatched;
"""
FIRST = ("kept", "object", "row", "above")
SECOND = ("on-kept", "on-object", "on-row", "on-above", "on-source")
#: Submitted by a client that does not watch.
UNWATCHED = "on-unwatched"


class Lossy:
    """A farm whose cache loses things, and the outputs that were built on it."""

    def __init__(self, farm: Farm, file: Path) -> None:
        self.farm = farm
        self.file = file
        self.gate = farm.root / "gate"
        self._of_others = {each["id"] for each in farm.api("submissions")}
        self.database = sqlite3.connect(farm.state / "cache.sqlite3", timeout=PATIENCE_S, isolation_level=None)

    def close(self) -> None:
        self.database.close()

    def submissions(self) -> list[dict[str, Any]]:
        return [each for each in self.farm.api("submissions") if each["id"] not in self._of_others]

    def command(self, *attributes: str) -> list[str]:
        asked = [word for attribute in attributes for word in ("-A", attribute)]
        return self.farm.build_command(self.file, *asked, "--json")

    def build(self, *attributes: str) -> dict[str, str]:
        """Build, and return the output of each attribute."""
        done = subprocess.run(
            self.command(*attributes),
            env=self.farm.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr + self.farm.log_path.read_text()[-3000:]
        roots = json.loads(done.stdout.splitlines()[-1])["roots"]
        return {root["attr"]: root["outputs"]["out"] for root in roots}

    def start(self, *attributes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*attributes),
            env=self.farm.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def detach(self, attribute: str) -> None:
        """Submit, and do not watch."""
        command = [*self.command(attribute), "--detach"]
        subprocess.run(command, env=self.farm.environment, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)

    def push(self, *attributes: str) -> dict[str, str]:
        """Build where no worker sees it, and push what comes of it: no worker can help with it."""
        store = self.farm.root / "elsewhere"
        options = {
            "sandbox": "true",
            "system-features": "first",
            "build-users-group": "",
            "substituters": "",
            **BUSYBOX,
        }
        flags = [word for name, value in options.items() for word in ("--option", name, value)]
        outputs = {}
        for attribute in attributes:
            built = subprocess.run(
                ["nix-build", "--store", store, self.file, "-A", attribute, "--no-out-link", *flags],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert built.returncode == 0, built.stderr
            outputs[attribute] = built.stdout.strip()
        pushed = self.farm.drover("cache", "push", "--store", store, *outputs.values())
        assert pushed.returncode == 0, pushed.stderr
        return outputs

    def lose(self, path: str, *, row: bool = False) -> None:
        """Delete the object of a path, and perhaps its row."""
        hash_part = path.rpartition("/")[2][:32]
        [(serial, url)] = self.database.execute("select serial, url from paths where hash_part = ?", [hash_part])
        (self.farm.state / "objects" / url).unlink()
        if row:
            self.database.execute("delete from refs where referrer = ?", [serial])
            self.database.execute("delete from paths where serial = ?", [serial])

    def path_of(self, name: str) -> str:
        [(path,)] = self.database.execute("select store_path from paths where store_path like ?", [f"%-{name}"])
        return str(path)

    def step(self, name: str) -> dict[str, Any]:
        """A step of the submission that runs and has it."""
        for submission in self.submissions():
            if submission["state"] == "running":
                for step in self.farm.api(f"submissions/{submission['id']}/steps"):
                    if step["name"] == name:
                        return dict(step)
        raise AssertionError(name)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, self.farm.log_path.read_text()[-3000:]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def lossy(pair_farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lossy]:
    # One worker can build what is lost, the other what stands on it and has nothing in its store.
    names = " ".join((*FIRST, *SECOND, UNWATCHED))
    file = Expression(tmp_path_factory.mktemp("losses")).write(f"inherit (rec {{ {GRAPH} }}) {names};")
    made = Lossy(pair_farm, file)
    yield made
    made.close()


def test_what_is_lost_while_steps_wait_for_it_comes_back_and_nobody_is_blamed(lossy: Lossy) -> None:
    outputs = lossy.build("kept") | lossy.push("object", "row", "above")
    lossy.detach(UNWATCHED)
    client = lossy.start(*SECOND)
    lossy.until(lambda: len([s for s in lossy.submissions() if s["state"] == "running" and not s["open"]]) == 2)
    lossy.lose(outputs["kept"])
    lossy.lose(outputs["object"])
    lossy.lose(outputs["row"], row=True)
    lossy.lose(lossy.path_of("below"))
    lossy.lose(lossy.path_of("source"), row=True)
    lossy.lose(lossy.path_of("unwatched"), row=True)
    (lossy.gate / "open").touch()

    # The client that watches sends its source again by itself.
    assert client.wait(PATIENCE_S) == 0
    # The other source is not to be had anywhere: its step waits and says for what.
    lossy.until(lambda: lossy.step(UNWATCHED)["lost_input"])
    waiting = lossy.step(UNWATCHED)
    assert waiting["state"] == "ready"
    assert "-unwatched is gone from the farm's cache" in waiting["waiting_for"]
    assert "`drover build` sends it again" in waiting["waiting_for"]

    # Submitting again sends it, and both submissions end.
    lossy.build(UNWATCHED)
    lossy.until(lambda: all(s["state"] == "succeeded" for s in lossy.submissions()))
    assert [worker["state"] for worker in lossy.farm.api("workers")] == ["online", "online"]
    verified = lossy.farm.drover("cache", "verify")
    assert verified.returncode == 0, verified.stdout
    assert "0 broken" in verified.stdout


def test_submitting_again_after_a_loss_builds_what_is_gone(lossy: Lossy) -> None:
    outputs = lossy.build(*FIRST)
    for name in ("object", "row"):
        lossy.lose(outputs[name], row=name == "row")
    assert lossy.build(*FIRST) == outputs
    assert "0 broken" in lossy.farm.drover("cache", "verify").stdout
