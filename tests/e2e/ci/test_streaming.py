"""Evaluation that streams: what is found first is built while the rest is looked for, and the end is exact.

An attribute is held by a fifo that its evaluation reads: it ends when the test opens the other side.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import exit_status
from tests.e2e.faults.conftest import PATIENCE_S, FarmUnderFault

pytestmark = pytest.mark.e2e


class Held:
    """A build whose attribute `late` is not evaluated before `release`; `url` is the farm's own where it is empty."""

    def __init__(
        self, one: FarmUnderFault, directory: Path, more: str = "", *, attrs: tuple[str, ...], url: str = ""
    ) -> None:
        self.one = one
        self.fifo = directory / "gate"
        os.mkfifo(self.fifo)
        name = directory.name
        file = one.graph(
            f"""
            early = step "early-{name}" [ ] ":";
            late = builtins.seq (builtins.readFile "{self.fifo}") (step "late-{name}" [ early ] ":");
            {more}
            """
        )
        words = [word for attr in attrs for word in ("-A", attr)]
        command = one.farm.build_command(file, *words, "--eval-workers", "2", "--no-eval-cache", "--json")
        self.known = {view["id"] for view in one.farm.api("submissions")}
        self.client = subprocess.Popen(
            command,
            env=one.farm.environment | ({"DROVER_URL": url} if url else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def release(self) -> None:
        """Let the evaluation go on; returns once it reads."""
        with self.fifo.open("w"):
            pass

    def opened(self) -> list[dict[str, Any]]:
        return [view for view in self.one.farm.api("submissions") if view["id"] not in self.known]

    def built_early(self) -> str:
        """Wait until the first root is built; return the submission's id."""
        self.one.until(lambda: any(view["counts"]["done"] for view in self.opened()))
        [view] = self.opened()
        return str(view["id"])

    def ended(self) -> tuple[int, dict[str, Any], str]:
        out, err = self.client.communicate(timeout=PATIENCE_S)
        return self.client.returncode, json.loads(out) if out.strip() else {}, err


def test_the_first_build_is_done_before_evaluation_ends_and_errors_stay_with_their_attribute(
    one: FarmUnderFault, tmp_path: Path
) -> None:
    held = Held(one, tmp_path, 'bad = throw "no such thing";', attrs=("early", "bad", "late"))
    name = held.built_early()
    view = one.view(name)
    assert (view["open"], view["state"], view["counts"]["total"], view["root_count"]) == (True, "running", 1, 1)
    assert "its client still looks for more to build" in one.farm.drover("status", name).stdout
    assert f"{name}  evaluating" in one.farm.drover("status").stdout
    held.release()
    status, document, err = held.ended()
    assert status == exit_status.EVALUATION_FAILED, err
    assert document["moments"]["first_step"] < document["moments"]["evaluated"]
    view = one.view(name)
    assert (view["open"], view["state"], view["incomplete"]) == (False, "succeeded", "")
    assert (view["counts"]["total"], view["counts"]["done"]) == (2, 2)
    assert [root["attr"] for root in document["roots"]] == ["early", "late"]
    assert (view["unevaluated"], [each["attr"] for each in view["not_evaluated"]]) == (1, ["bad"])
    assert "no such thing" in view["not_evaluated"][0]["message"]
    assert "not evaluated bad" in one.farm.drover("status", name).stdout
    one.can_be_fetched(view)


def test_a_coordinator_that_is_killed_while_a_submission_is_open_loses_nothing_of_it(
    one: FarmUnderFault, tmp_path: Path
) -> None:
    held = Held(one, tmp_path, attrs=("early", "late"))
    name = held.built_early()
    one.farm.kill()
    one.farm.start()
    assert one.view(name)["open"]
    held.release()
    status, document, err = held.ended()
    assert status == exit_status.OK, err
    assert [(root["attr"], root["state"]) for root in document["roots"]] == [("early", "done"), ("late", "done")]
    view = one.view(name)
    assert (view["counts"]["total"], view["counts"]["done"], view["root_count"]) == (2, 2, 2)
    assert one.runs(f"early-{tmp_path.name}") == {f"early-{tmp_path.name}": 1}


def test_a_client_interrupted_while_it_evaluates_leaves_what_it_found(one: FarmUnderFault, tmp_path: Path) -> None:
    held = Held(one, tmp_path, attrs=("early", "late"))
    name = held.built_early()
    held.client.send_signal(signal.SIGINT)
    status, _, err = held.ended()
    assert status == exit_status.INTERRUPTED
    assert f"interrupted; what was evaluated so far is built. Watch it again: drover watch {name}" in err
    view = one.ended(name)
    assert (view["open"], view["state"], view["root_count"]) == (False, "succeeded", 1)
    assert view["incomplete"] == "its client was interrupted before all was evaluated"
    watched = one.farm.drover("watch", name)
    assert watched.returncode == exit_status.EVALUATION_FAILED
    assert "incomplete" in watched.stdout


@contextmanager
def keeping_the_first_seal(port: int) -> Iterator[tuple[str, threading.Event]]:
    """Relay in front of a coordinator that keeps the first request to seal: its address, and a sign that it has it."""
    kept = threading.Event()
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *arguments: Any) -> None:
        threads.append(threading.Thread(target=work, args=arguments))
        threads[-1].start()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if b"/seal HTTP/" in data and not kept.is_set():
                    kept.set()
                else:
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, far = sockets.enter_context(listener.accept()[0]), socket.create_connection(("127.0.0.1", port))
                sockets.enter_context(far)
                start(pump, near, far)
                start(pump, far, near)

    with ExitStack() as sockets, socket.create_server(("127.0.0.1", 0)) as listener:
        start(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", kept
        # A listener that is only closed leaves the thread that accepts waiting.
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def test_a_client_interrupted_once_all_is_sent_leaves_a_whole_submission(one: FarmUnderFault, tmp_path: Path) -> None:
    with keeping_the_first_seal(one.farm.port) as (url, kept):
        held = Held(one, tmp_path, attrs=("early",), url=url)
        assert kept.wait(PATIENCE_S)
        held.client.send_signal(signal.SIGINT)
        status, _, err = held.ended()
    [opened] = held.opened()
    assert status == exit_status.INTERRUPTED
    assert f"interrupted; the build goes on. Watch it again: drover watch {opened['id']}" in err
    view = one.ended(opened["id"])
    assert (view["open"], view["state"], view["incomplete"]) == (False, "succeeded", "")
    assert one.farm.drover("watch", opened["id"]).returncode == exit_status.OK


def test_a_client_interrupted_before_it_found_anything_leaves_nothing(one: FarmUnderFault, tmp_path: Path) -> None:
    held = Held(one, tmp_path, attrs=("late",))
    # It reads: the evaluation runs.
    with held.fifo.open("w"):
        held.client.send_signal(signal.SIGINT)
        status, _, _ = held.ended()
    assert status == exit_status.INTERRUPTED
    assert held.opened() == []


def test_lines_of_nix_eval_jobs_are_built_as_they_come(one: FarmUnderFault, tmp_path: Path) -> None:
    name = tmp_path.name
    file = one.graph(f'a = step "a-{name}" [ ] ":"; b = step "b-{name}" [ a ] ":";')
    done = one.farm.build(file, "-A", "a", "-A", "b", "--detach", "--json")
    drvs = {root["attr"]: root["drv"] for root in json.loads(done.stdout.splitlines()[-1])["roots"]}
    known = {view["id"] for view in one.farm.api("submissions")}
    command = one.farm.command("build", "-", "--store", one.farm.eval_store, "--json")
    with subprocess.Popen(
        command, env=one.farm.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdin is not None

        def opened() -> list[dict[str, Any]]:
            return [view for view in one.farm.api("submissions") if view["id"] not in known]

        client.stdin.write(json.dumps({"attr": "a", "drvPath": drvs["a"]}) + "\n")
        client.stdin.flush()
        one.until(lambda: [view["root_count"] for view in opened()] == [1])
        line = json.dumps({"attr": "broken", "error": "error: undefined variable 'x'"})
        client.stdin.write(f"{json.dumps({'attr': 'b', 'drvPath': drvs['b']})}\n{line}\n")
        out, _ = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == exit_status.EVALUATION_FAILED
    view = json.loads(out)
    assert [(root["attr"], root["state"]) for root in view["roots"]] == [("a", "done"), ("b", "done")]
    assert [each["attr"] for each in opened()[0]["not_evaluated"]] == ["broken"]
