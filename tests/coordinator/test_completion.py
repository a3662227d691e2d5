"""Completion in the real shells, on a pseudo-terminal, against a farm that runs and one that is away."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.coordinator.conftest import OpenFarm
from tests.support.farm import BIN
from tests.support.ports import free_port
from tests.support.pseudo_terminal import PseudoTerminal, on_terminal
from tests.support.screens import Terminal

#: Shell -> how it starts without a person's settings, and what it runs to have completion, as the help says.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(drover completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -D -u; eval "$(drover completion zsh)"'),
    "fish": (
        ["fish", "-i"],
        "mkdir -p ~/.config/fish/completions; cd ~/.config/fish/completions; drover completion fish > drover.fish",
    ),
}
#: Erases the line in every shell.
ERASE = "\x15"
TAB = "\t"
#: How often keys are typed on a busy machine, and seconds that each time has.
TRIES, LOOK_S = 20, 10.0
#: A label that would be three completions for zsh, and two for fish.
LABEL = "my label\nplain\nINJECTED\n_\nplain,INJECTED"


@contextmanager
def shell(name: str, home: Path, url: str, token: Path) -> Iterator[PseudoTerminal]:
    """Start a shell that completes `drover`."""
    command, prepare = SHELLS[name]
    # Without it fish begins by reading every manual page of the machine, beside all other tests.
    (home / ".local/share/fish/generated_completions").mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PS1": "$ ",
        "DROVER_URL": url,
        "DROVER_TOKEN_FILE": str(token),
    }
    with on_terminal(command, Terminal(100, 24), environment) as terminal:
        # The shell calculates it, so it is not what was typed.
        terminal.type(f"{prepare}; expr 4321 + 1234\r")
        terminal.until(lambda: "5555" in terminal.all())
        yield terminal


def line_is(terminal: PseudoTerminal, typed: str) -> bool:
    """Return true if the line that the cursor is in ends so."""
    screen = terminal.terminal.emulated
    return screen.display[screen.cursor.y].rstrip().endswith(typed)


def complete_with(terminal: PseudoTerminal, keys: str, holds: Callable[[], bool]) -> None:
    """Type keys until they complete what they should: a farm that has not answered in a second completes nothing."""
    for _ in range(TRIES):
        terminal.type(keys)
        with suppress(AssertionError):
            terminal.until(holds, LOOK_S)
            return
    assert holds(), terminal.all()


@pytest.mark.parametrize("name", SHELLS)
async def test_a_shell_completes_commands_and_names_of_the_farm(open_farm: OpenFarm, tmp_path: Path, name: str) -> None:
    async with open_farm("the-worker") as farm:
        text = '{ it = run "sturdy-tool-1.0" "echo > $out"; no = run "broken-thing" "exit 1"; }'
        submission = (await farm.submit(text, "it", "no", label=LABEL)).id
        await farm.ended(submission)
        key = farm.key_of("sturdy-tool-1.0")

        def complete() -> None:
            with shell(name, tmp_path, farm.coordinator.ready.url, farm.coordinator.ready.token_file) as terminal:
                for typed, completed in (
                    ("drover sto", "drover story"),
                    ("drover log st", "drover log sturdy-tool-1.0"),
                    (f"drover why {key[:9]}", f"drover why {key}"),
                    (f"drover watch {submission[:3]}", f"drover watch {submission}"),
                    ("drover drain the", "drover drain the-worker"),
                    ("drover build --det", "drover build --detach"),
                ):
                    complete_with(terminal, ERASE + typed + TAB, partial(line_is, terminal, completed))
                # Of no beginning: what failed lately, and the submissions.
                complete_with(
                    terminal,
                    ERASE + "drover status " + TAB + TAB,
                    lambda: all(word in terminal.all() for word in ("broken-thing", submission)),
                )
                # The label is shown within one line, as a help.
                assert not re.search("(?<![a-z] )(?<!,)INJECTED", terminal.all())

        await asyncio.to_thread(complete)


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_completes_nothing_and_goes_on_where_the_farm_does_not_answer(tmp_path: Path, name: str) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Accepts and never answers; nothing listens; there is no token.
        cases = (
            (f"http://127.0.0.1:{silent.getsockname()[1]}", token),
            (f"http://127.0.0.1:{free_port()}", token),
            (f"http://127.0.0.1:{free_port()}", tmp_path / "no-token"),
        )
        for url, file in cases:
            with shell(name, tmp_path, url, file) as terminal:
                before = terminal.all()
                begun = time.monotonic()
                terminal.type("drover log abc" + TAB + " && expr 10000 + 2345")
                terminal.type(ERASE + "expr 10000 + 2345\r")
                terminal.until(lambda: "12345" in terminal.all())
                # Other commands wait for an answer, or for a farm that comes back, for five times as long and more.
                assert time.monotonic() - begun < 60
                said = terminal.all().removeprefix(before)
                assert "rror" not in said
                assert "drover:" not in said
