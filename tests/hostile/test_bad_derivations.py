"""Derivations that Nix itself refuses cost their own submission its builds, and nobody else anything."""

from __future__ import annotations

import json
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from tests.e2e.conftest import Expression
from tests.support.farm import Farm
from workers.agent.refusals import recognise

pytestmark = pytest.mark.e2e

#: One stranger's submission: so many derivations that no worker may build.
UNSANDBOXED = 20
#: One derivation for each way in which Nix refuses: name, attributes, script, outputs, and words of Nix's own sentence.
REFUSED: tuple[tuple[str, str, str, str], ...] = (
    ("fifo", "", "mkfifo $out", "unsupported type"),
    ("impure", '__impureHostDeps = [ "/etc/passwd" ];', ": > $out", "impure path"),
    ("odd-graph", 'exportReferencesGraph = [ "graph" ];', ": > $out", "odd number of tokens"),
    (
        "strange-graph",
        'exportReferencesGraph = [ "graph" "/nix/store/00000000000000000000000000000000-unknown" ];',
        ": > $out",
        "/nix/store/00000000000000000000000000000000-unknown",
    ),
    ("named-seven", '__json = builtins.toJSON { name = 7; builder = "/bin/sh"; };', ": > $out", "name"),
    ("circle", 'outputs = [ "out" "dev" ];', "echo $dev > $out; echo $out > $dev", "cycle detected"),
    (
        "phase",
        "",
        r"""echo '@nix {\"action\":\"setPhase\",\"phase\":7}' >&2; sleep 1; exit 1""",
        "the builder printed an @nix line that Nix cannot read",
    ),
)
#: A sentence that stands in no table: only a second worker that says the same tells whose fault it is.
UNKNOWN = """
    unknown = derivation {
      name = "unknown"; system = "x86_64-linux"; builder = "/bin/sh"; __structuredAttrs = true;
      args = [ "-c" ": > ${placeholder "out"}" ]; outputChecks.out.allowedReferences = [ 7 ]; salt = "SALT";
    };
"""
UNKNOWN_WORDS = "must be a list of strings"


class WorkerWatch:
    """Watch over `drover workers`, from beginning to end: every state and trouble that the farm ever showed."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.seen: set[tuple[str, str, str]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.seen.update((row["name"], row["state"], row["reason"]) for row in self._farm.api("workers"))
            if self._over.wait(0.1):
                return


def submitted(farm: Farm, file: Path, attribute: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = farm.build(file, "-A", attribute, "--json")
    assert done.stdout, done.stderr
    return done, {root["attr"]: root for root in json.loads(done.stdout.splitlines()[-1])["roots"]}


def test_what_nix_refuses_ends_its_own_submission_and_no_worker_is_quarantined(pair_farm: Farm, tmp_path: Path) -> None:
    refused = "".join(
        f'"{name}" = shellFor "x86_64-linux" {{ name = "{name}"; {attributes} }} "{script}";\n'
        for name, attributes, script, _ in REFUSED
    )
    file = Expression(tmp_path).write(
        f"""
        many = {{ recurseForDerivations = true; }} // builtins.listToAttrs (builtins.genList (number: {{
          name = "bad-${{toString number}}";
          value = shellFor "x86_64-linux" {{ name = "bad-${{toString number}}"; __noChroot = true; }} ": > $out";
        }}) {UNSANDBOXED});
        odd = {{ recurseForDerivations = true; {refused} {UNKNOWN.replace("SALT", str(tmp_path))} }};
        good = shell "good" "echo good > $out";
        """
    )
    with WorkerWatch(pair_farm) as watch, ThreadPoolExecutor(3) as users:
        many, odd, good = (users.submit(submitted, pair_farm, file, name) for name in ("many", "odd", "good"))
        done, _ = good.result()
        assert done.returncode == 0, done.stderr
        said = {**many.result()[1], **odd.result()[1]}
    assert {(state, reason) for _, state, reason in watch.seen} == {("online", "")}

    steps = {attribute.rpartition(".")[2]: pair_farm.api(f"steps/{root['step']}") for attribute, root in said.items()}
    words = {f"bad-{number}": "__noChroot" for number in range(UNSANDBOXED)}
    words |= {name: sentence for name, _, _, sentence in REFUSED} | {"unknown": UNKNOWN_WORDS}
    assert steps.keys() == words.keys()
    begun = {name: len(pair_farm.begun(step["key"])) for name, step in steps.items()}
    wrong = {
        name: (step["state"], begun[name], step["failure"])
        for name, step in steps.items()
        if step["state"] != "failed"
        or step["failure"]["kind"] not in ("permanent", "output_rejected")
        or words[name] not in step["failure"]["message"]
        or begun[name] != (2 if name == "unknown" else 1)
    }
    assert not wrong
    assert recognise(UNKNOWN_WORDS) is None, "the unknown refusal must be one that stands in no table"
