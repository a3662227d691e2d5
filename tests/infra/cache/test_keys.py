"""Key files: made once, for their owner alone, never quoted."""

from __future__ import annotations

import stat
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.cache.errors import KeyFileError
from infra.cache.publishing.keys import forget_keys, load_key, load_or_create_key, read_keys
from tests.support.cache import secret_key


def test_a_key_is_made_on_the_first_start_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing"
    first = load_or_create_key(path, "drover-host-1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.name == "drover-host-1"
    assert load_or_create_key(path, "another name").reveal() == first.reveal() == load_key(path).reveal()
    assert [entry.name for entry in path.parent.iterdir()] == ["signing"]


def test_processes_that_make_the_key_at_once_use_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_create_key(tmp_path / "k", "drover-host-1").reveal(), range(32)))
    assert len(set(keys)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o660])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "k"
    load_or_create_key(path, "drover-host-1")
    path.chmod(mode)
    for load in (load_key, lambda file: load_or_create_key(file, "drover-host-1")):
        with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
            load(path)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.swapcase(), lambda text: "x" + text * 3])
def test_no_message_or_traceback_quotes_a_key(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    path = tmp_path / "k"
    secret = load_or_create_key(path, "drover-host-1").reveal()
    path.write_text(damage(secret))
    with pytest.raises(KeyFileError) as caught:
        load_key(path)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(secret_key())
    assert secret.partition(":")[2][:12].lower() not in shown.lower()


def test_a_malformed_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    (tmp_path / "latin").chmod(0o600)
    for name in ("none", ".", "latin"):
        with pytest.raises(KeyFileError):
            load_key(tmp_path / name)
    with pytest.raises(KeyFileError, match="cannot name"):
        load_or_create_key(tmp_path / "k", "a:colon")
    assert not (tmp_path / "k").exists()


def test_several_keys_need_several_names_whatever_their_sources(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        load_or_create_key(tmp_path / name, "one" if name == "c" else f"{name}-one")
    files = {name: str(tmp_path / name) for name in ("a", "b", "c")}
    environment = {"KEY": (tmp_path / "b").read_text(), "OTHER": "kept"}
    keys = read_keys([files["a"], "env:KEY", files["c"]], environment)
    assert [key.name for key in keys] == ["a-one", "b-one", "one"]
    for again in (files["a"], "env:KEY"):
        with pytest.raises(KeyFileError, match="give each its own name"):
            read_keys([files["a"], files["b"], again], environment)
    forget_keys([files["a"], "env:KEY"], environment)
    assert environment == {"OTHER": "kept"}
    with pytest.raises(KeyFileError, match="KEY, which should hold a signing key, is not set"):
        read_keys(["env:KEY"], environment)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.swapcase(), lambda text: "x" + text * 3])
def test_no_message_or_traceback_quotes_a_key_of_the_environment(damage: Callable[[str], str]) -> None:
    secret = secret_key().reveal()
    with pytest.raises(KeyFileError, match="variable KEY holds no signing key") as caught:
        read_keys(["env:KEY"], {"KEY": damage(secret)})
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert secret.partition(":")[2][:12].lower() not in shown.lower()
