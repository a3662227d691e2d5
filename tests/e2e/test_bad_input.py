"""Bad input gives one clear sentence and the right exit status, and loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Expression, waiting_for
from tests.support.farm import BIN, Farm
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def no_traceback(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    return text


def test_an_unknown_attribute_is_an_evaluation_error(farm: Farm, expression: Expression) -> None:
    done = farm.build(expression.write('a = shell "a" "";'), "-A", "nosuch")
    assert done.returncode == 3
    assert "nosuch" in no_traceback(done)


def test_an_evaluation_error_shows_what_nix_says(farm: Farm, expression: Expression) -> None:
    done = farm.build(expression.write('a = throw "the moon is wrong";'), "-A", "a")
    assert done.returncode == 3
    assert "the moon is wrong" in no_traceback(done)


def test_a_missing_file_is_named(farm: Farm, tmp_path: Path) -> None:
    done = farm.build(tmp_path / "nowhere.nix", "-A", "a")
    assert done.returncode in {2, 3}
    assert "nowhere.nix" in no_traceback(done)


def test_a_coordinator_that_is_down_is_infrastructure(farm: Farm, expression: Expression) -> None:
    file = expression.write('a = shell "a" "";')
    done = subprocess.run(
        farm.build_command(file, "-A", "a"),
        env={**farm.environment, "DROVER_URL": f"http://127.0.0.1:{free_port()}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 4
    assert "drover up" in no_traceback(done)


def test_a_failing_builder_fails_its_dependents_and_nothing_else(farm: Farm, expression: Expression) -> None:
    file = expression.directory / "default.nix"
    file.write_text(
        f"""
        let make = name: script: derivation {{
              inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ];
              salt = "{expression.directory}"; }};
            broken = make "broken" "echo about to fail; exit 7";
        in {{
          top = make "on-top" "echo ${{broken}} > $out";
          fine = make "independent" "sleep 1; echo fine > $out";
        }}
        """
    )
    done = farm.build(file, "-A", "top", "-A", "fine", "--json")
    assert done.returncode == 1
    result = last_json(done)
    assert result["counts"] | {"done": 1, "failed": 1, "doomed": 1} == result["counts"]
    steps = {step["name"]: step for step in farm.api(f"submissions/{result['id']}/steps")}
    assert steps["on-top"]["state"] == "doomed"
    assert steps["on-top"]["cause"] == steps["broken"]["key"]
    assert "about to fail" in no_traceback(done)
    assert "about to fail" in farm.drover("log", steps["broken"]["key"]).stdout


def test_a_system_that_no_worker_offers_waits_and_says_so(farm: Farm, expression: Expression) -> None:
    file = expression.write('a = shellFor "riscv64-linux" { name = "far-away"; } "echo x > $out";')
    done = farm.build(file, "-A", "a", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    submission = last_json(done)["id"]
    status = farm.drover("status", submission)
    assert "riscv64-linux" in status.stdout
    assert "no worker" in status.stdout
    cancelled = farm.drover("cancel", submission)
    assert cancelled.returncode == 0, cancelled.stderr
    assert farm.api(f"submissions/{submission}")["state"] == "cancelled"


def test_binary_output_of_a_builder_is_kept_as_it_is(farm: Farm, expression: Expression) -> None:
    file = expression.write(r"""a = shell "binary-log" "printf '\\001\\377\\000\\033[31mred\\r\\n'; echo x > $out";""")
    done = farm.build(file, "-A", "a", "--json")
    assert done.returncode == 0, done.stderr
    key = last_json(done)["roots"][0]["step"]
    log = subprocess.run(
        farm.command("log", key), env=farm.environment, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert b"\x01\xff\x00\x1b[31mred" in log.stdout


def test_fifty_megabytes_of_log_are_kept(farm: Farm, expression: Expression) -> None:
    line = "x" * 1023
    file = expression.write(
        f'a = shell "loud" "i=0; while [ $i -lt 1000 ]; do echo {line}; i=$((i+1)); done > /tmp/k;'
        ' i=0; while [ $i -lt 50 ]; do cat /tmp/k; i=$((i+1)); done; echo x > $out";'
    )
    done = farm.build(file, "-A", "a", "--json")
    assert done.returncode == 0, done.stderr
    key = last_json(done)["roots"][0]["step"]
    log = subprocess.run(
        farm.command("log", key), env=farm.environment, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert len(log.stdout) == 50 * 1000 * 1024


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("empty-file", "true > $out"),
        ("empty-directory", "mkdir $out"),
        ("many-files", "mkdir $out; i=0; while [ $i -lt 5000 ]; do : > $out/f$i; i=$((i+1)); done"),
        ("c++-1.0_x.y?z=1", "echo odd name > $out"),
    ],
)
def test_unusual_outputs_travel(farm: Farm, expression: Expression, tmp_path: Path, name: str, script: str) -> None:
    done = farm.build(expression.write(f'a = shell "{name}" "{script}";'), "-A", "a", "--json")
    assert done.returncode == 0, done.stderr
    path = last_json(done)["roots"][0]["outputs"]["out"]
    fetched = farm.fetch(tmp_path / "plain", path)
    assert fetched.returncode == 0, fetched.stderr
    if name == "many-files":
        assert len(list((tmp_path / "plain" / path.lstrip("/")).iterdir())) == 5000


def test_interrupting_the_client_leaves_the_build_running(farm: Farm, expression: Expression, gates: Path) -> None:
    file = expression.write(f'a = shell "patient" "{waiting_for("patient")}; echo x > $out";')
    client = subprocess.Popen(
        # Programs that a shell starts in the background ignore this signal, and so may these tests.
        ["env", "--default-signal=INT", *farm.build_command(file, "-A", "a")],
        env=farm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (
        running := [
            s
            for s in farm.api("submissions")
            # Not open: the client has sent all, so an interruption takes nothing from the submission.
            if any(r["attr"] == "a" for r in s["roots"]) and s["counts"]["running"] and not s["open"]
        ]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    client.send_signal(signal.SIGINT)
    output, _ = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 130
    (gates / "patient").touch()
    assert f"drover cancel {running[0]['id']}" in output
    assert farm.drover("watch", running[0]["id"]).returncode == 0
    assert farm.api(f"submissions/{running[0]['id']}")["state"] == "succeeded"


def test_a_second_coordinator_on_one_state_directory_is_refused(farm: Farm) -> None:
    done = subprocess.run(
        [BIN / "drover", "up", "--state-dir", farm.state, "--listen", f"127.0.0.1:{free_port()}"],
        env=farm.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 4
    assert "in use by another drover" in no_traceback(done)
