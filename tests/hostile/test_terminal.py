"""A build's log in a real terminal: what it prints is shown, and the terminal is as it was before."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.attack import FarmUnderAttack
from tests.support.loop import LoopStalls
from tests.support.patience import PATIENCE_S
from tests.support.peak import peak_bytes, with_peak
from tests.support.processes import processes_with
from tests.support.pseudo_terminal import on_terminal
from tests.support.screens import Terminal
from tests.support.tmux import tmux

pytestmark = pytest.mark.e2e

#: What a stranger prints, as `printf` takes it: titles (OSC, screen's ESC k), the other screen, no cursor, mouse, a
#: clear screen, a palette, each without an end where it may have one.
HOSTILE = (
    r"BEFORE\n\033]0;STOLEN\007\033]2;STOLEN\033\\\033kSTOLEN\033\\\302\2350;STOLEN\302\234",
    r"\033[?1049h\033[?25l\033[?1003h\033[2J\033[31mRED\nPLAIN\n",
    r"\033P1;2q no end\nAFTER-DCS\n\033]0;no end\nAFTER-OSC\n\033_no end\n\033[8mAFTER-ALL\n",
)


def test_a_log_shows_all_its_text_and_leaves_the_terminal_alone(readme_farm: FarmUnderAttack, tmp_path: Path) -> None:
    script = "; ".join(f"printf '{each}'" for each in HOSTILE) + "; exit 1"
    done = readme_farm.build_text(f"shell \"hostile\" ''{script}''")
    assert done.returncode == 1, done.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)
    found = re.search(r"drover log (\S+)", done.stdout)
    assert found is not None, done.stdout

    log = shlex.join(readme_farm.command("log", found[1]))
    say = f"tmux -S {tmp_path / 'tmux'} wait-for"
    script = f"{say} -S ready; {say} begin; {log}; {say} -S done; cat"
    state = "#{pane_title}|#{window_name}|#{alternate_on}|#{cursor_flag}|#{mouse_any_flag}"
    with tmux(tmp_path, script, 200, 50, **readme_farm.environment) as server:
        server.run("set", "-g", "allow-rename", "on", ";", "set", "-g", "automatic-rename", "off")
        server.wait("ready")
        before = server.run("display-message", "-p", state)
        server.send("begin")
        server.wait("done")
        after = server.run("display-message", "-p", state)
        plain = server.run("capture-pane", "-p")
        coloured = server.run("capture-pane", "-p", "-e")
    assert after == before
    assert plain.split() == ["BEFORE", "RED", "PLAIN", "AFTER-DCS", "AFTER-OSC", "AFTER-ALL"]
    assert "STOLEN" not in plain
    assert "\x1b[31mRED" in coloured
    assert "\x1b[31mPLAIN" not in coloured


def test_a_build_on_a_terminal_shows_what_runs_and_leaves_what_it_said_and_the_terminal(
    readme_farm: FarmUnderAttack,
) -> None:
    lies, mark = "; ".join(f"printf '{each}'" for each in HOSTILE), f"below-{readme_farm.port}"
    endless = f"/bin/sh -c 'while :; do sleep 0.1; done # {mark}'"
    # The one between may have its lease already, to follow: then it is shown neither as running nor as waiting.
    file = readme_farm.expression(f"""let
      below = shell "below" "{endless}; echo > $out";
      between = shell "between" "echo ${{below}} > $out";
    in {{
      good = shell "good" "echo ${{between}} ${{below}} > $out";
      bad = shell "bad" ''echo ${{shell "under" "sleep 1; echo > $out"}}; {lies}; exit 1'';
    }}""")
    terminal = Terminal(80, 24)
    with on_terminal(readme_farm.build_command(file), terminal, readme_farm.environment) as watched:
        shown = False
        for frame in watched.frames():
            text = "\n".join(frame)
            if not shown and "\u23f5 below" in text and re.search("\u23f8 good +waits for [12]", text):
                shown = True
                end_second(mark)
    assert shown
    left = terminal.scrolled() + terminal.shown()
    assert sum("bad failed on" in line for line in left) == 1
    assert sum(line.endswith("AFTER-ALL") for line in left) == 1
    assert not any("waits for" in line or "\u23f5" in line for line in left)
    assert any(line.startswith("failed: submission") for line in left)
    assert not terminal.emulated.cursor.hidden
    assert terminal.emulated.title == ""


def end_second(mark: str) -> None:
    """Kill the second process whose command has a mark: the shell that the builder waits for."""
    deadline = time.monotonic() + PATIENCE_S
    while len(found := processes_with(mark)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(found[1], signal.SIGKILL)


#: Length of one line of a build's log.
LINE_BYTES = 10_000_000
#: What no terminal and no runner may get but for drover's own: colours, GitLab's sections, frames of the live region.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
OWN_CONTROLS = re.compile(
    "\x1b\\[0Ksection_(?:start|end):[0-9]+:[A-Za-z0-9_]+\r\x1b\\[0K|\x1b\\[[0-9;]*m|"
    "\x1b\\[\\?(?:2026|25|7)[hl]|\x1b\\[[KJ]|\r(?:\x1b\\[[0-9]+A)?"
)
COMMANDS = re.compile(r"^\s*::(?!error title=|group::|endgroup::$).*|##(?:\[|vso\[).*", re.MULTILINE)
#: More memory than that is not bounded: a whole line, as text and decoded, would be.
CLIENT_BYTES = 110_000_000
MORE_OF_COORDINATOR_BYTES = 60_000_000
#: An attribute as Nix writes it. Its name may be what a derivation's may not.
ATTRIBUTE = '"a&<b>\'c;::error::x"'
WORST = rf"""
  printf '\377\376invalid\303\050\nNUL\000<script>alert(1)</script>&amp;\n'
  printf '::endgroup::\n  ::error::forged\n##vso[task.complete result=Succeeded;]\n##[endgroup]\n'
  printf '\033]8;;http://evil\007link\033]8;;\007\033[2J\033[1;1H\033]0;STOLEN\007\n'
  echo '@nix {{"action":"setPhase","phase":"p\u001b]0;STOLEN\u0007<b>\n::error::phase"}}' >&2
  head -c {LINE_BYTES} /dev/zero | tr '\0' x; printf 'LINE-END\n'
  sleep 3
  {"; ".join(f"printf '{each}'" for each in HOSTILE)}
  printf 'yyy\rsection_end:1:drover\r\033[0K\n::stop-commands::x\nvery last\n'
  exit 1
"""


#: Clients whose output no runner reads.
ON_TERMINAL = {"terminal", "followed", "build"}


class Recorder(Terminal):
    """A terminal that keeps what is written and shows nothing, for texts that would take an emulator long."""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)


class Ended:
    """A client that has ended: its status, what it wrote, and the most memory that it had."""

    def __init__(self, process: subprocess.Popen[bytes], text: str, peak: Path) -> None:
        self.status = process.wait()
        self.text = text
        self.peak_bytes = peak_bytes(peak)


def on_recorder(farm: FarmUnderAttack, *arguments: str) -> Ended:
    """Run a command on a terminal that records."""
    recorder = Recorder(80, 24)
    with TemporaryDirectory() as directory:
        peak = Path(directory, "peak")
        with on_terminal(with_peak(farm.command(*arguments), peak), recorder, farm.environment) as watched:
            for _ in watched.frames():
                pass
            return Ended(watched.process, recorder.written, peak)


def piped(farm: FarmUnderAttack, *arguments: str, **environment: str) -> Ended:
    """Run a command whose output is a pipe."""
    with TemporaryDirectory() as directory:
        peak = Path(directory, "peak")
        process = subprocess.Popen(
            with_peak(farm.command(*arguments), peak),
            env={**farm.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        with process.stdout as output:
            return Ended(process, output.read().decode(), peak)


def test_the_worst_log_costs_little_and_commands_neither_a_terminal_nor_a_runner(readme_farm: FarmUnderAttack) -> None:
    farm = readme_farm
    file = farm.expression(f"""{{ {ATTRIBUTE} = shell "worst_?=+-1.0" ''{WORST}''; }}""")
    before = farm.process.rss_bytes
    farm.process.reset_peak()
    with LoopStalls(farm.url) as stalls, ThreadPoolExecutor() as clients:
        label = "l&<b>\"'\x1b]0;STOLEN\x07\n::error::label"
        asked = ("-A", ATTRIBUTE, "--label", label, "--detach", "--json")
        submission = json.loads(farm.build(file, *asked).stdout.splitlines()[-1])["id"]
        watching = {
            "github": clients.submit(piped, farm, "watch", submission, GITHUB_ACTIONS="true"),
            "gitlab": clients.submit(piped, farm, "watch", submission, GITLAB_CI="true"),
            "terminal": clients.submit(on_recorder, farm, "watch", submission),
            "followed": clients.submit(on_recorder, farm, "log", "-f", ATTRIBUTE),
        }
        ended = {name: client.result() for name, client in watching.items()}
        # What is known to fail fails at once, and is said as before.
        build = farm.build_command(file, "-A", ATTRIBUTE)[1:]
        ended["build"] = on_recorder(farm, *build)
        ended["log for a runner"] = piped(farm, "log", ATTRIBUTE, GITHUB_ACTIONS="true")
        ended["search"] = piped(farm, "log", ATTRIBUTE, "--search", "cut here", GITHUB_ACTIONS="true")
        raw = subprocess.run(farm.command("log", ATTRIBUTE), env=farm.environment, capture_output=True, check=True)
        for answer in ("status", "why", "story"):
            ended[answer] = piped(farm, answer, "worst_?=+-1.0", GITHUB_ACTIONS="true")
    assert {name: each.status for name, each in ended.items() if each.status} == dict.fromkeys(
        ("github", "gitlab", "terminal", "build"), 1
    )
    for name, each in ended.items():
        assert not CONTROLS.search(OWN_CONTROLS.sub("", each.text)), name
        if name not in ON_TERMINAL:
            assert not COMMANDS.findall(each.text), name
        assert each.peak_bytes < CLIENT_BYTES, (name, each.peak_bytes)
    # Nothing is lost but the middle of the long line: bytes go to a pipe as they are, and text to a person as text.
    assert b"\xff\xfeinvalid\xc3(\nNUL\0<script>" in raw.stdout
    assert len(raw.stdout) < LINE_BYTES // 4
    assert f"cut here, {LINE_BYTES + len('LINE-END')} bytes in all" in raw.stdout.decode(errors="replace")
    for name in ("github", "gitlab", "terminal", "build"):
        # The phase is the one that the builder announced last, in one line.
        assert re.search(r"worst_\?=\+-1\.0 failed on \S+ after \d+s in p<b> ", ended[name].text), name
        assert ended[name].text.count("very last") == 1
        assert ATTRIBUTE in ended[name].text
    assert "<script>alert(1)</script>&amp;" in ended["followed"].text
    assert re.fullmatch(r"\d+: \u2026x+ \[drover: cut here, \d+ bytes in all\]\n", ended["search"].text)
    assert stalls.over(0.1) == 0
    assert farm.process.peak_rss_bytes - before < MORE_OF_COORDINATOR_BYTES
