"""From a graph to a plain Nix client, through real Nix, real Ray nodes and real HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path

import pytest

from tests.e2e.conftest import Expression
from tests.support.farm import Farm, nix_store

pytestmark = pytest.mark.e2e

GRAPH = Path(__file__).parent.parent / "demo" / "graph.nix"


def test_a_graph_of_two_systems_is_built_once_and_fetched_by_a_plain_nix_client(farm: Farm, tmp_path: Path) -> None:
    first = farm.build(GRAPH, "-A", "linux", "-A", "darwin", "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    counts = result["counts"]
    # 40 derivations: four ways to one tarball and two pairs of equal consumers collapse to 35 steps.
    assert counts["total"] == 35
    assert counts["done"] == 35
    paths = [path for root in result["roots"] for path in root["outputs"].values()]

    fetched = farm.fetch(tmp_path / "plain", *paths)
    assert fetched.returncode == 0, fetched.stderr
    assert nix_store(tmp_path / "plain", "--verify", "--check-contents").returncode == 0
    closure = nix_store(tmp_path / "plain", "-qR", *paths).stdout.split()
    assert any("openssl-3.3-doc" in path for path in closure)

    again = farm.build(GRAPH, "-A", "linux", "-A", "darwin", "--json")
    assert again.returncode == 0, again.stderr
    repeat = json.loads(again.stdout.splitlines()[-1])["counts"]
    assert repeat["done"] == 0
    assert repeat["held"] == repeat["total"]


def test_a_client_that_trusts_another_key_gets_nothing(farm: Farm, expression: Expression, tmp_path: Path) -> None:
    file = expression.write('a = shell "signed" "echo x > $out";')
    built = farm.build(file, "-A", "a", "--json")
    path = json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    other = "cache.example-1:" + "A" * 43 + "="
    assert farm.fetch(tmp_path / "plain", path, keys=other).returncode != 0


def test_two_submissions_that_share_steps_share_the_work(farm: Farm, expression: Expression) -> None:
    one = expression.directory / "one.nix"
    two = expression.directory / "two.nix"
    for file, name in ((one, "one"), (two, "two")):
        file.write_text(
            f"""
            let
              make = name: script: derivation {{
                inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ];
                salt = "{expression.directory}";
              }};
              base = make "shared-base" "sleep 2; echo $salt > $out";
            in {{ top = make "top-{name}" "echo ${{base}} > $out"; }}
            """
        )
    results: dict[str, subprocess.CompletedProcess[str]] = {}

    def submit(file: Path) -> None:
        results[file.name] = farm.build(file, "-A", "top", "--json")

    threads = [threading.Thread(target=submit, args=(file,)) for file in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    views = [json.loads(result.stdout.splitlines()[-1]) for result in results.values()]
    assert all(result.returncode == 0 for result in results.values()), [r.stderr for r in results.values()]
    base = {view["counts"]["joined"] + view["counts"]["held"] for view in views}
    # One of them brought the base, the other joined it or came late enough to find it in the cache.
    assert base == {0, 1}
    step = farm.api(f"submissions/{views[0]['id']}/steps")
    assert len(farm.begun(next(s["key"] for s in step if s["name"] == "shared-base"))) == 1


def test_fetch_realises_the_outputs_locally(farm: Farm, expression: Expression, tmp_path: Path) -> None:
    file = expression.write('a = shell "fetched-here" "echo fetched > $out";')
    done = farm.build(file, "-A", "a", "--fetch", "--json")
    assert done.returncode == 0, done.stderr
    path = json.loads(done.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    assert (farm.eval_store / path.lstrip("/")).read_text() == "fetched\n"


def test_the_watcher_prints_plain_lines_when_it_is_not_a_terminal(farm: Farm, expression: Expression) -> None:
    file = expression.write('a = shell "plain-lines" "sleep 0.3; echo x > $out";')
    done = farm.build(file, "-A", "a")
    assert done.returncode == 0, done.stderr
    assert "plain-lines" in done.stdout + done.stderr
    assert not re.search(r"\x1b\[", done.stdout + done.stderr)


def test_the_emulated_worker_says_so(farm: Farm) -> None:
    shown = farm.drover("workers")
    assert shown.returncode == 0, shown.stderr
    row = next(line for line in shown.stdout.splitlines() if "mac" in line)
    assert "aarch64-darwin" in row
    assert "emulated" in shown.stdout


def test_a_build_cannot_read_the_farm_s_secrets(farm: Farm, expression: Expression) -> None:
    file = expression.write(
        f'a = shell "spy" "for f in {farm.state}/* /root/.ray/auth_token; do cat $f && echo LEAK; done 2>/dev/null;'
        " cat /proc/*/environ 2>/dev/null | tr '\\\\000' '\\\\n' > $out; exit 0\";"
    )
    done = farm.build(file, "-A", "a", "--fetch", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    log = farm.drover("log", result["roots"][0]["step"]).stdout
    seen = (farm.eval_store / result["roots"][0]["outputs"]["out"].lstrip("/")).read_text(errors="replace")
    assert "LEAK" not in log
    assert "RAY_" not in seen
    assert "DROVER_" not in seen
