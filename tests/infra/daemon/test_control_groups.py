"""Control groups measure what a build used, as the kernel counts it; where they cannot be had, a build is not hurt."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from infra.daemon.control_groups import ControlGroups, GroupAccount, _place, cpu_seconds, disk_bytes
from infra.daemon.usage import BuildersUse, used_by_group

CPU_STAT = "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnice_usec 0\nnr_periods 0\n"
#: As Linux 6.1 writes it: a disk, a mapping over it, and a loop device that nothing came to yet.
IO_STAT = (
    "7:0 \n"
    "254:0 rbytes=8192 wbytes=4096 rios=2 wios=1 dbytes=0 dios=0\n"
    "8:0 rbytes=8192 wbytes=4096 rios=2 wios=1 dbytes=0 dios=0\n"
    "259:1 rbytes=100 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n"
)
MOUNTS = (
    "31 24 0:27 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 - cgroup2 cgroup2 rw\n"
)


def test_the_kernels_texts_are_read_as_they_are() -> None:
    assert cpu_seconds(CPU_STAT) == 1.234567
    assert cpu_seconds("user_usec 5\n") is None
    assert disk_bytes(IO_STAT, lambda device: device == "254:0") == (8292, 4096)
    assert disk_bytes("") == (0, 0)


@pytest.mark.parametrize(
    ("mounts", "own", "place"),
    [
        (MOUNTS, "5:memory:/x\n0::/a.slice/b.service\n", ("/sys/fs/cgroup/unified", "a.slice/b.service")),
        (MOUNTS, "0::/\n", ("/sys/fs/cgroup/unified", "")),
        (MOUNTS, "0::/../other\n", None),
        (MOUNTS, "5:memory:/x\n", None),
        (MOUNTS.replace("0:38 /", "0:38 /docker/x"), "0::/\n", None),
        ("", "0::/\n", None),
    ],
)
def test_the_own_group_is_found_or_nothing_is_said(mounts: str, own: str, place: tuple[str, str] | None) -> None:
    assert _place(mounts, own) == (None if place is None else (Path(place[0]), Path(*place)))


def test_what_a_group_does_not_count_is_taken_from_proc_or_absent_and_never_0() -> None:
    proc = BuildersUse(cpu_s=1.0, read_bytes=5, written_bytes=None)
    seconds = GroupAccount(1.0, None, None), GroupAccount(4.0, None, None)
    assert used_by_group(*seconds, 0.5, proc) == BuildersUse(cpu_s=2.5, read_bytes=5, written_bytes=None)
    assert used_by_group(*seconds, 0.5, None) == BuildersUse(cpu_s=2.5, read_bytes=None, written_bytes=None)
    disks = GroupAccount(1.0, 10, 20), GroupAccount(4.0, 11, 25)
    assert used_by_group(*disks, 0.0, proc) == BuildersUse(cpu_s=3.0, read_bytes=1, written_bytes=5)
    nothing = GroupAccount(None, None, None)
    assert used_by_group(nothing, nothing, 0.0, proc) == proc
    assert used_by_group(nothing, nothing, 0.0, None) is None


def test_a_group_counts_what_ran_in_it_and_its_user_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    found = ControlGroups.found("this test")
    # Where the machine gives no group away there is nothing to count; the rest holds for directories too.
    parent = tmp_path if found is None else found.parent
    groups, others = ControlGroups(parent, "one"), ControlGroups(parent, "two")
    made, theirs = groups.make(), others.make()
    assert made is not None
    assert theirs is not None
    burn = "read -r go; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo done; read -r go"
    with subprocess.Popen(["/bin/sh", "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        made.take(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        used = made.account().cpu_s
        assert used is not None, "also while it runs"
        assert used > 0.01
        # A group with a process in it stays, whoever would remove it.
        made.remove()
        assert groups.sweep() == 0
    # As a killed worker leaves it: the next of the same user removes it, another's stays.
    assert ControlGroups(parent, "one").sweep() == 1
    assert (groups.groups(), len(others.groups())) == ([], 1)
    theirs.remove()
    assert others.groups() == []


def test_a_peak_is_that_since_the_reset_or_none(tmp_path: Path) -> None:
    """Over plain files, since no kernel here counts memory in groups of version 2."""
    made = ControlGroups(tmp_path, "one").make()
    assert made is not None
    [group] = tmp_path.iterdir()
    made.begin_peak()
    assert made.peak() is None, "the kernel counts no memory"
    (group / "memory.peak").write_text("1000\n")
    made.begin_peak()
    (group / "memory.peak").write_text("2000\n")
    assert made.peak() == 2000
    # An old kernel takes no reset, as this device takes nothing.
    (group / "memory.peak").unlink()
    (group / "memory.peak").symlink_to("/dev/full")
    made.begin_peak()
    assert made.peak() is None
    made.remove()


def test_a_refusal_of_the_kernel_costs_the_measure_only(tmp_path: Path) -> None:
    assert ControlGroups(tmp_path / "absent", "one").make() is None
    assert ControlGroups(tmp_path / "absent", "one").sweep() == 0
