"""Key files: made once, for their owner alone, never quoted."""

from __future__ import annotations

import stat
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.cache.errors import KeyFileError
from infra.cache.keys import load_key, load_keys, load_or_create_key
from tests.support.cache import secret_key


def test_a_key_is_made_on_the_first_start_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing"
    first = load_or_create_key(path, "drover-host-1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.name == "drover-host-1"
    assert load_or_create_key(path, "another name").reveal() == first.reveal() == load_key(path).reveal()
    assert [entry.name for entry in path.parent.iterdir()] == ["signing"]


def test_all_who_make_it_at_once_use_one_key(tmp_path: Path) -> None:
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


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    (tmp_path / "latin").chmod(0o600)
    for name in ("none", ".", "latin"):
        with pytest.raises(KeyFileError):
            load_key(tmp_path / name)
    with pytest.raises(KeyFileError, match="cannot name"):
        load_or_create_key(tmp_path / "k", "a:colon")
    assert not (tmp_path / "k").exists()


def test_several_keys_need_several_names(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        load_or_create_key(tmp_path / name, "one" if name == "c" else f"{name}-one")
    assert [key.name for key in load_keys([tmp_path / "a", tmp_path / "c"])] == ["a-one", "one"]
    with pytest.raises(KeyFileError, match="a-one"):
        load_keys([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
