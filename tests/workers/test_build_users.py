"""Ranges of ids for builders: whose they are, and when they are given back."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.agent.build_users import HIGH_IDS, NOBODY, NoBuildUsersError, claim, own_ids
from workers.agent.sandbox_files import GROUP, HOST, copy_shell, cover_etc

POOL = [range(1000, 1100)]


def store(root: Path, name: str) -> Path:
    made = root / name
    made.mkdir()
    return made


def test_a_store_keeps_its_range_and_shares_it_with_no_other(tmp_path: Path) -> None:
    one, two = store(tmp_path, "one"), store(tmp_path, "two")
    mine = claim(tmp_path / "ids", POOL, [], one, 10)
    other = claim(tmp_path / "ids", POOL, [], two, 10)
    assert not set(mine.ids) & set(other.ids)
    assert claim(tmp_path / "ids", POOL, [], one, 10) == mine
    assert claim(tmp_path / "ids", POOL, [], one, 4) == mine


def test_claims_at_one_moment_do_not_meet(tmp_path: Path) -> None:
    stores = [store(tmp_path, f"store-{number}") for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda each: claim(tmp_path / "ids", POOL, [], each, 10), stores))
    assert sorted(number for each in found for number in each.ids) == list(POOL[0])


def test_a_range_that_became_too_small_is_exchanged(tmp_path: Path) -> None:
    one = store(tmp_path, "one")
    claim(tmp_path / "ids", POOL, [], one, 60)
    assert claim(tmp_path / "ids", POOL, [range(1040, 1100)], one, 10).count == 60
    with pytest.raises(NoBuildUsersError):
        claim(tmp_path / "ids", POOL, [], one, 61)
    small = claim(tmp_path / "other", POOL, [], one, 10)
    large = claim(tmp_path / "other", POOL, [], one, 20)
    assert not set(small.ids) & set(large.ids)
    assert [entry.name for entry in (tmp_path / "other").iterdir() if entry.name != "lock"] == [str(large.first)]


def test_ids_of_accounts_are_not_given_out(tmp_path: Path) -> None:
    found = claim(tmp_path / "ids", POOL, [range(1095, 1096), range(1050, 1080)], store(tmp_path, "one"), 10)
    assert list(found.ids) == list(range(1085, 1095))


def test_the_range_of_a_store_that_is_gone_is_free_again(tmp_path: Path) -> None:
    one = store(tmp_path, "one")
    mine = claim(tmp_path / "ids", [range(1000, 1010)], [], one, 10)
    two = store(tmp_path, "two")
    with pytest.raises(NoBuildUsersError):
        claim(tmp_path / "ids", [range(1000, 1010)], [], two, 10)
    one.rmdir()
    assert claim(tmp_path / "ids", [range(1000, 1010)], [], two, 10) == mine


def test_a_range_is_not_free_while_something_runs_under_it(tmp_path: Path) -> None:
    one, two = store(tmp_path, "one"), store(tmp_path, "two")
    high = [range(HIGH_IDS.stop - 10, HIGH_IDS.stop)]
    mine = claim(tmp_path / "ids", high, [], one, 10)
    one.rmdir()
    with subprocess.Popen(["/bin/busybox", "cat"], stdin=subprocess.PIPE, user=mine.first, group=mine.first) as left:
        with pytest.raises(NoBuildUsersError):
            claim(tmp_path / "ids", high, [], two, 10)
        assert left.stdin is not None
        left.stdin.close()
    assert claim(tmp_path / "ids", high, [], two, 10) == mine


def test_the_ids_that_root_gives_out_are_high_and_never_nobody() -> None:
    found = own_ids()
    assert found[0] == HIGH_IDS
    assert not any(NOBODY in ids or 0 in ids or os.getuid() in ids for ids in found)


def test_the_cover_of_etc_has_the_build_users_and_all_else_that_the_host_has(tmp_path: Path) -> None:
    host = {entry.name for entry in Path("/etc").iterdir()}
    binds = cover_etc(tmp_path, [2001, 2002], 2001, "10.0.2.3")
    etc = tmp_path / "etc"
    assert binds[:2] == (("/etc", str(etc / HOST)), (str(etc), "/etc"))
    assert host <= {entry.name for entry in etc.iterdir()}
    users = [line for line in (etc / "passwd").read_text().splitlines() if line.startswith(GROUP)]
    assert [line.split(":")[2:4] for line in users] == [["2001", "2001"], ["2002", "2001"]]
    assert (etc / "group").read_text().splitlines()[-1] == f"{GROUP}:x:2001:{GROUP}-1,{GROUP}-2"
    assert (etc / "passwd").read_text().startswith(Path("/etc/passwd").read_text())
    assert "nameserver 10.0.2.3\n" in (etc / "resolv.conf").read_text()


def test_the_shell_is_a_copy_that_nobody_may_write(tmp_path: Path) -> None:
    copy = Path(copy_shell("/bin/busybox", tmp_path))
    assert copy.read_bytes() == Path("/bin/busybox").read_bytes()
    assert copy.stat().st_mode & 0o7777 == 0o555
    assert copy.stat().st_ino != Path("/bin/busybox").stat().st_ino
