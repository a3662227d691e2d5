"""A build's log in a real terminal: what it prints is shown, and the terminal is as it was before."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.attack import FarmUnderAttack
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
    lies = "; ".join(f"printf '{each}'" for each in HOSTILE)
    file = readme_farm.expression(f"""{{
      good = shell "good" "echo ${{shell "below" "sleep 1; echo > $out"}} > $out";
      bad = shell "bad" ''echo ${{shell "under" "sleep 1; echo > $out"}}; {lies}; exit 1'';
    }}""")
    terminal = Terminal(80, 24)
    with on_terminal(readme_farm.build_command(file), terminal, readme_farm.environment) as watched:
        frames = list(watched.frames())
    assert any(any("\u23f5 below" in line for line in frame) and "waits for 1" in "".join(frame) for frame in frames)
    left = terminal.scrolled() + terminal.shown()
    assert sum("bad failed on" in line for line in left) == 1
    assert sum(line.endswith("AFTER-ALL") for line in left) == 1
    assert not any("waits for" in line or "\u23f5" in line for line in left)
    assert any(line.startswith("failed: submission") for line in left)
    assert not terminal.emulated.cursor.hidden
    assert terminal.emulated.title == ""
