"""Settings come from arguments, environment and file, in that order, and what is wrong is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import ConfigError, Settings, WorkerConfig, load_settings
from coordinator.defaults import default_state_dir
from coordinator.fleet.ray_cluster import write_worker_settings
from coordinator.security.tokens import TokenError, load_token
from workers.agent.settings import load_settings as load_worker_settings


def test_arguments_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "drover.toml"
    file.write_text('port = 1\nhost = "10.0.0.1"\nkey_name = "from-file"\n[limits]\ngraph_size = 5\n')
    monkeypatch.setenv("DROVER_HOST", "10.0.0.2")
    monkeypatch.setenv("DROVER_KEY_NAME", "from-environment")
    settings = load_settings(file, key_name="from-argument", port=None)
    assert (settings.port, settings.host, settings.key_name) == (1, "10.0.0.2", "from-argument")
    assert settings.limits.graph_size == 5


def test_a_setting_of_a_section_in_the_environment_leaves_the_others_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "drover.toml"
    file.write_text("[limits]\ngraph_size = 5\nhistory_days = 3\n")
    monkeypatch.setenv("DROVER_LIMITS__GRAPH_SIZE", "7")
    limits = load_settings(file).limits
    assert (limits.graph_size, limits.history_days) == (7, 3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prt = 1", "setting prt"),
        ("port = 70000", "setting port"),
        ("[[workers]]\nname = 'a'\n[[workers]]\nname = 'a'", "two workers are called a"),
        ("[[workers]]\nname = '../a'", "setting workers.0.name"),
        ("[[workers]]\nname = 'a'\nslts = 1", "setting workers.0.slts"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "drover.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_settings(file)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "none.toml")


def test_everything_lies_below_the_state_directory_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = Settings()
    assert settings.state_dir == default_state_dir() == tmp_path / "drover"
    assert settings.objects_url == f"file://{tmp_path}/drover/objects"
    assert settings.database_url("journal") == f"sqlite+aiosqlite:///{tmp_path}/drover/journal.sqlite3"


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback_is_recognised(host: str, loopback: bool) -> None:
    assert Settings(host=host).loopback is loopback


def test_a_token_is_made_once_and_never_readable_by_others(tmp_path: Path) -> None:
    token = load_token(tmp_path / "token")
    assert len(token) >= 40
    assert load_token(tmp_path / "token") == token
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(TokenError, match="others can read") as refused:
        load_token(tmp_path / "token")
    assert token not in str(refused.value)
    (tmp_path / "empty").touch(0o600)
    with pytest.raises(TokenError, match="holds no token"):
        load_token(tmp_path / "empty")


def test_a_workers_settings_are_written_for_its_agent_alone(tmp_path: Path) -> None:
    worker = WorkerConfig(name="mac", emulate=("aarch64-darwin",), nix_options={"sandbox": "relaxed"})
    settings = Settings(state_dir=tmp_path, nix_options={"cores": "1", "sandbox": "true"}, workers=(worker,))
    file = write_worker_settings(settings, worker)
    assert file.stat().st_mode & 0o777 == 0o600
    read = load_worker_settings(file)
    assert (read.name, read.emulate) == ("mac", ("aarch64-darwin",))
    assert read.nix_options == {"cores": "1", "sandbox": "relaxed"}
    assert Path(read.store).is_relative_to(tmp_path / "workers" / "mac")


def test_a_nix_option_that_the_farm_decides_is_refused(tmp_path: Path) -> None:
    worker = WorkerConfig(name="a", nix_options={"substituters": "https://elsewhere"})
    with pytest.raises(ConfigError, match="worker a: the Nix option substituters is decided by the farm"):
        write_worker_settings(Settings(state_dir=tmp_path), worker)


@pytest.mark.parametrize("address", ["collector:4318", "http://", "ftp://x", "http://x:99999", "http://x\n"])
def test_a_collector_without_an_address_of_http_is_refused_with_an_example(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .* is no address of a collector; one is http://"):
        load_settings(otlp_endpoint=address, state_dir=tmp_path)
    assert load_settings(otlp_endpoint="https://x:4318/base", state_dir=tmp_path).otlp_endpoint
