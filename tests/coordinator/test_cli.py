"""The `drover` command as a program: exit statuses and sentences where no farm is needed."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import re
import shlex
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

import coordinator
from coordinator.cli import commands as cli
from coordinator.cli import exit_status
from coordinator.cli.sections import EXAMPLES, SECTIONS
from coordinator.client.errors import RefusedError
from coordinator.errors import CoordinatorError
from infra.cache.uploads.errors import UploadError
from tests.support.patience import PATIENCE_S


def drover(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process (a child costs a second of imports); one test below runs the real program."""
    raw_out, raw_err = io.BytesIO(), io.BytesIO()
    out, err = io.TextIOWrapper(raw_out, write_through=True), io.TextIOWrapper(raw_err, write_through=True)
    words = [str(argument) for argument in arguments]
    with patch.dict(os.environ, env or {}), redirect_stdout(out), redirect_stderr(err):
        status = cli.run(words)
    return subprocess.CompletedProcess(words, status, raw_out.getvalue().decode(), raw_err.getvalue().decode())


STATUS_NAMES = ("OK", "BUILD_FAILED", "USAGE", "EVALUATION_FAILED", "INFRASTRUCTURE", "INTERRUPTED")


@pytest.fixture
def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build"], "name one file, flake output or .drv path, or an expression with -E"),
        (["build", "a.nix", "-E", "1"], "or an expression with -E"),
        (["build", "a.nix", "--systems", "macos"], "'macos' is no system"),
        (["build", ".#checks", "-A", "x"], "name a flake's output after its #"),
        (["build", ".#checks", "--argstr", "a", "b"], "a flake takes no arguments"),
        (["build", "-", "-A", "x"], "lines on standard input name derivations"),
        (["build", "a.nix", "--flake", "."], "name a file, an expression or a --flake; one of them"),
        (["build", "--flake", ".", "-A", "x"], "name a flake's output after its #"),
        (["build", "a.nix", "b.nix"], "choose several things to build with -A"),
        (["build", "a.nix", f"/nix/store/{'0' * 32}-b.drv"], "not both"),
        (["build", f"/nix/store/{'0' * 32}-b.drv", "-A", "x"], "a .drv path is one derivation"),
        (["build", "a.nix", "--detach", "--fetch"], "choose one"),
        (["build", "a.nix", "--wait", "soon"], "say seconds (90), 15m, 36h, 7d or forever"),
        (["build", "a.nix", "--wait", "0"], "no time to wait"),
        (["build", "a.nix", "--wait", "99999d"], "no time to wait"),
        (["nosuch"], "No such command"),
        (["up", "--listen", "7878"], "HOST:PORT"),
        (["up", "--no-workers", "--slots", "3"], "--no-workers"),
        (["watch"], "Missing argument"),
        (["log", ""], "the name is empty"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: list[str], sentence: str) -> None:
    done = drover(*arguments)
    assert (done.returncode, done.stdout) == (exit_status.USAGE, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["status"], ["workers"], ["log", "x"], ["cancel", "x"], ["watch", "x"]])
def test_a_coordinator_that_is_down_ends_with_4_and_says_how_to_start_one(command: list[str], nobody: str) -> None:
    done = drover(*command, "--coordinator", nobody)
    assert done.returncode == exit_status.INFRASTRUCTURE
    assert done.stderr == (
        f"drover: cannot reach the coordinator at {nobody} (connection refused); start one with `drover up` or set "
        "DROVER_URL\n"
    )


def test_the_program_ends_with_the_status_and_one_sentence(nobody: str) -> None:
    program = [sys.executable, "-W", "error", "-c", "from coordinator.cli import main; main()", "workers"]
    env = {**os.environ, "DROVER_URL": nobody}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (exit_status.INFRASTRUCTURE, "")
    assert len(done.stderr.splitlines()) == 1


def test_the_address_and_the_token_come_from_the_environment_too(nobody: str, tmp_path: Path) -> None:
    done = drover("build", "default.nix", env={"DROVER_URL": nobody})
    assert (done.returncode, nobody in done.stderr) == (exit_status.INFRASTRUCTURE, True)
    done = drover("status", env={"DROVER_URL": nobody, "DROVER_TOKEN_FILE": str(tmp_path / "none")})
    assert done.returncode == exit_status.USAGE
    assert f"cannot read the token file {tmp_path / 'none'}: No such file" in done.stderr
    done = drover("status", env={"DROVER_URL": "not an address"})
    assert (done.returncode, "not an address" in done.stderr) == (exit_status.USAGE, True)


def test_settings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = tmp_path / "farm.toml"
    file.write_text("colour = 1\n")
    done = drover("up", "--config", file, "--state-dir", tmp_path)
    assert done.returncode == exit_status.USAGE
    assert "colour" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_there_for_every_command_without_importing_what_is_slow() -> None:
    program = (
        "import sys; from coordinator.cli import commands as cli\n"
        "words = [[], *([name] for name in cli.cli.commands)]\n"
        "words += [['cache', name] for name in cli.cli.commands['cache'].commands]\n"
        "for each in words: assert cli.run([*each, '--help']) == 0, each\n"
        "slow = {'ray', 'aiohttp', 'sqlalchemy', 'rich', 'pydantic'} & set(sys.modules); assert not slow, slow\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"up", "worker", "build", "watch", "status", "cancel", "log", "workers", "cache"} <= set(cli.cli.commands)


def test_the_help_lists_each_command_once_with_its_whole_sentence_and_fits_a_small_window() -> None:
    text = drover("--help", env={"COLUMNS": "80"}).stdout
    assert "..." not in text.partition("Options:")[2]
    assert max(map(len, text.splitlines())) <= 80
    assert set(EXAMPLES) | {"cache", "completion"} >= set(SECTIONS["Build"] + SECTIONS["Run a farm"])
    for name, command in cli.cli.commands.items():
        assert len(re.findall(rf"^  {name} +[A-Z].*[.]$", text, re.MULTILINE)) == 1, name
        assert command.help is not None
    for status in STATUS_NAMES:
        assert re.search(rf"^ +{getattr(exit_status, status)}  ", text, re.MULTILINE), status


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_example_of_a_help_is_a_command_that_is_understood(name: str) -> None:
    text = drover(name, "--help").stdout
    for line in EXAMPLES[name]:
        drover_, command, *words = shlex.split(line)
        assert (drover_, command) == ("drover", name)
        # Raises where an option or an argument is not the command's.
        cli.cli.commands[name].make_context(name, words).close()
        assert f"  {line}\n" in text


def test_an_unforeseen_error_gives_one_sentence_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> int:
        raise ZeroDivisionError("secret of the universe")

    monkeypatch.setattr(cli.cli, "main", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run([]) == exit_status.INFRASTRUCTURE
    (details,) = tmp_path.glob("drover-error-*.txt")
    assert "ZeroDivisionError" in details.read_text()


def test_every_kind_of_error_has_its_exit_status_in_the_table() -> None:
    for module in pkgutil.walk_packages(coordinator.__path__, "coordinator."):
        importlib.import_module(module.name)
    classes: list[type[CoordinatorError | UploadError]] = [CoordinatorError, UploadError]
    for each in classes:  # grows while it is walked
        classes += each.__subclasses__()
    codes = {each.code for each in classes if each.__module__.partition(".")[0] in {"coordinator", "infra"}}
    # Answers that no class stands for.
    codes |= {"http", "method_not_allowed", "standby", "store_full"}
    assert codes == set(exit_status.STATUSES)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), exit_status.INTERRUPTED),
        (CoordinatorError("no"), exit_status.INFRASTRUCTURE),
        (RefusedError(400, "bad_request", "no"), exit_status.USAGE),
        (RefusedError(400, "bad_derivation", "no"), exit_status.EVALUATION_FAILED),
        (RefusedError(418, "of a newer coordinator", "no"), exit_status.INFRASTRUCTURE),
        (BrokenPipeError(), cli.READER_GONE),
    ],
)
def test_every_end_has_its_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end(*_: object, **__: object) -> int:
        raise error

    saved = os.dup(1)
    try:
        monkeypatch.setattr(cli.cli, "main", end)
        assert cli.run([]) == status
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert "Traceback" not in capfd.readouterr().err
