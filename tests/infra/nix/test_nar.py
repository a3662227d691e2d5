"""NAR: reader and writer are inverse and strict, whatever the pieces; unpacking stays inside, memory flat."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import nar_files
from infra.nix import nar
from infra.nix.errors import FormatError
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, NarReader, NarSymlink, NarWriter

NAMES = st.binary(min_size=1, max_size=6).filter(lambda name: nar.name_fault(name) is None)
Tree = bytes | tuple[bytes] | dict[bytes, "Tree"]


def trees() -> st.SearchStrategy[Tree]:
    """Files are bytes (executable if they begin with `#!`), symlinks one-tuples, directories dicts."""
    leaves: st.SearchStrategy[Tree] = st.one_of(
        st.binary(max_size=40), st.binary().map(lambda data: b"#!" + data), st.sampled_from([(b"t",), (b"/x/../y",)])
    )
    return st.recursive(leaves, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=8)


def events(tree: Tree, name: bytes = b"") -> Iterator[NarEvent]:
    match tree:
        case bytes():
            yield NarFile(name, tree.startswith(b"#!"), len(tree))
            if tree:
                yield NarData(tree)
        case (target,):
            yield NarSymlink(name, target)
        case dict():
            yield NarDirectory(name)
            for entry in sorted(tree):
                yield from events(tree[entry], entry)
            yield NarDirectoryEnd()


def pack(tree: Tree) -> bytes:
    return b"".join(nar.write_events(events(tree)))


def merged(found: list[NarEvent]) -> list[NarEvent]:
    """Data events of one file joined."""
    result: list[NarEvent] = []
    for event in found:
        if isinstance(event, NarData) and result and isinstance(result[-1], NarData):
            result[-1] = NarData(result[-1].data + event.data)
        else:
            result.append(event)
    return result


def read(archive: bytes, cuts: list[int]) -> list[NarEvent]:
    reader = NarReader()
    found: list[NarEvent] = []
    bounds = [0, *sorted(cuts), len(archive)]
    for start, end in pairwise(bounds):
        complete = reader.complete
        # Bytes after the end are refused here.
        found += reader.feed(archive[start:end])
        assert not complete or start == len(archive)
    reader.close()
    return merged(found)


@given(trees(), st.data())
def test_reading_inverts_writing_however_the_bytes_are_cut(tree: Tree, data: st.DataObject) -> None:
    archive = pack(tree)
    assert len(archive) % 8 == 0
    cuts = data.draw(st.lists(st.integers(0, len(archive)), max_size=6))
    assert read(archive, cuts) == list(events(tree))
    assert read(archive, list(range(len(archive)))) == list(events(tree))


@given(trees(), st.data())
def test_any_bytes_either_are_an_archive_or_are_refused_at_the_same_place(tree: Tree, data: st.DataObject) -> None:
    archive = pack(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(archive)))
        archive = (
            archive[:at] + data.draw(st.binary(max_size=8)) + archive[at + data.draw(st.sampled_from([0, 1, 8])) :]
        )
    outcomes: list[object] = []
    for cuts in ([], list(range(len(archive)))):
        try:
            found = read(archive, cuts)
        except FormatError as refusal:
            outcomes.append(refusal.message if 0 <= refusal.offset <= len(archive) else refusal)
        else:
            assert b"".join(nar.write_events(found)) == archive
            outcomes.append(found)
    assert outcomes[0] == outcomes[1]


FILE = pack(b"x")
DIRECTORY = pack({b"a": b"", b"b": b""})


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        (b"", "cut short"),
        (FILE[:-1], "cut short"),
        (FILE + b"\0", "bytes after the end"),
        (FILE.replace(b"x\0", b"x\1"), "padding"),
        (FILE.replace(b"archive-1\0\0", b"archive-1\0\1"), "due"),
        (FILE.replace(b"regular", b"regulas"), "due"),
        (DIRECTORY.replace(b"\0a\0", b"\0c\0"), "above"),
        (DIRECTORY.replace(b"\0a\0", b"\0b\0"), "above"),
        (DIRECTORY.replace(b"\0a\0", b"\0.\0"), r"\. or \.\."),
        (DIRECTORY.replace(b"\0a\0", b"\0/\0"), "slash"),
        (DIRECTORY.replace(b"\1\0\0\0\0\0\0\0a\0", b"\0\0\0\0\0\0\0\0a\0"), "empty"),
        (DIRECTORY.replace(b"\1\0\0\0\0\0\0\0a\0", b"\0\1\0\0\0\0\0\0a\0"), "longer than 255"),
        (FILE.replace(b"\1\0\0\0\0\0\0\0x\0", b"\0\0\0\0\0\0\0\x80x\0"), "larger"),
    ],
)
def test_a_broken_archive_is_refused(archive: bytes, fault: str) -> None:
    assert archive not in {FILE, DIRECTORY}
    with pytest.raises(FormatError, match=fault):
        read(archive, [])


def nested(depth: int) -> list[NarEvent]:
    return [*(NarDirectory(b"d" if level else b"") for level in range(depth)), *[NarDirectoryEnd()] * depth]


def tokens(*texts: bytes) -> bytes:
    """Strings as a NAR has them: length, bytes, zeros up to a multiple of eight."""
    return b"".join(len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8) for text in texts)


def test_directories_nest_as_deep_as_paths_go_and_no_deeper_on_either_side() -> None:
    deepest = nar.MAX_DEPTH
    deep = b"".join(nar.write_events(nested(deepest)))
    assert read(deep, []) == nested(deepest)
    with pytest.raises(FormatError, match="deeper"):
        list(nar.write_events(nested(deepest + 1)))
    start = deep.index(tokens(b"entry", b"(", b"name"))
    entry = tokens(b"entry", b"(", b"name", b"d", b"node", b"(", b"type", b"directory")
    with pytest.raises(FormatError, match="deeper") as refusal:
        NarReader().feed(deep[:start] + entry * 1_000_000)
    assert refusal.value.offset < start + (deepest + 1) * len(entry)


@pytest.mark.parametrize(
    "wrong",
    [
        [NarDirectoryEnd()],
        [NarData(b"x")],
        [NarFile(b"", False, 1), NarData(b"xy")],
        [NarFile(b"", False, 2), NarData(b"x")],
        [NarFile(b"", False, -1)],
        [NarFile(b"named", False, 0)],
        [NarSymlink(b"", b"")],
        [NarSymlink(b"", b"a\0b")],
        [NarDirectory(b"")],
        [NarDirectory(b""), NarSymlink(b"b", b"t"), NarSymlink(b"a", b"t")],
        [NarSymlink(b"", b"t"), NarSymlink(b"", b"t")],
        [],
    ],
)
def test_events_that_are_no_tree_are_not_written(wrong: list[NarEvent]) -> None:
    with pytest.raises(FormatError):
        list(nar.write_events(wrong))


def test_a_reader_that_refused_goes_on_refusing() -> None:
    reader = NarReader()
    for piece in (b"x" * 8, FILE):
        with pytest.raises(FormatError):
            reader.feed(piece)
    with pytest.raises(FormatError):
        reader.close()


TREE: Tree = {
    b"bin": {b"run": b"#!/bin/sh\n", b"\xff\xfe": b"not UTF-8"},
    b"empty": {},
    b"link": (b"../../../outside",),
    b"nothing": b"",
}


def test_files_pack_and_unpack_to_the_same_archive(tmp_path: Path) -> None:
    nar_files.restore([pack(TREE)], tmp_path / "tree")
    assert b"".join(nar_files.dump(tmp_path / "tree")) == pack(TREE)
    assert os.access(tmp_path / "tree/bin/run", os.X_OK)
    assert (tmp_path / "tree/link").readlink() == Path("../../../outside")


@pytest.mark.parametrize(("mode", "executable"), [(0o611, False), (0o744, True), (0o100, True), (0o655, False)])
def test_only_the_owner_bit_makes_a_file_executable(tmp_path: Path, mode: int, executable: bool) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"")
    path.chmod(mode)
    assert next(nar_files.events_of(path)) == NarFile(b"", executable, 0)


def test_unpacking_never_writes_through_what_is_already_there(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "dest").symlink_to(outside)
    trees: tuple[Tree, ...] = (b"data", {b"f": b"data"}, (b"target",))
    for tree in trees:
        with pytest.raises(FileExistsError):
            nar_files.restore([pack(tree)], tmp_path / "dest")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "dest").is_symlink()


@pytest.mark.parametrize("tree", [b"#!" + b"x" * 5000, {b"a": b"x", b"b": {b"c": b"y" * 5000}}])
def test_a_failed_unpacking_leaves_nothing(tmp_path: Path, tree: Tree) -> None:
    archive = pack(tree)
    for cut in (len(archive) - 8, len(archive) - 4000):
        with pytest.raises(FormatError, match="cut short"):
            nar_files.restore([archive[:cut]], tmp_path / "dest")
        assert list(tmp_path.iterdir()) == []


def test_the_case_hack_keeps_colliding_names_and_the_hash(tmp_path: Path) -> None:
    tree: Tree = {b"A": b"1", b"B": b"", b"a": {b"x": b""}, b"b": b"2"}
    nar_files.restore([pack(tree)], tmp_path / "tree", case_hack=True)
    assert sorted(path.name for path in (tmp_path / "tree").iterdir()) == [
        "A",
        "B",
        "a~nix~case~hack~1",
        "b~nix~case~hack~1",
    ]
    assert b"".join(nar_files.dump(tmp_path / "tree", case_hack=True)) == pack(tree)
    with pytest.raises(FormatError):
        nar_files.restore([pack({b"a~nix~case~hack~1": b""})], tmp_path / "other", case_hack=True)


def test_a_file_of_another_kind_than_file_directory_or_link_is_not_packed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(nar_files.NarFilesError):
        list(nar_files.dump(tmp_path))


def test_large_trees_stream_with_flat_memory_and_bounded_pieces(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(500):
        (tree / f"file-{number}").write_bytes(b"x" * 10)
    size = 48 << 20
    with (tree / "large").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    sizes: list[int] = []

    def pieces() -> Iterator[bytes]:
        for piece in nar_files.dump(tree):
            sizes.append(len(piece))
            yield piece

    nar_files.restore(pieces(), tmp_path / "copy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) <= nar_files.CHUNK_SIZE
    assert len(sizes) < size // nar_files.CHUNK_SIZE + 12
    assert peak < 16 << 20
    assert (tmp_path / "copy/large").stat().st_size == size
    assert len(list((tmp_path / "copy").iterdir())) == 501


def test_a_writer_can_be_closed_only_when_the_tree_is_whole() -> None:
    writer = NarWriter()
    writer.write(NarDirectory(b""))
    with pytest.raises(FormatError):
        writer.close()


def test_a_tree_is_packed_as_deep_as_the_kernel_takes_paths_and_cleared_again(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    levels = (4000 - len(str(tree))) // 2
    place = tree
    for _ in range(levels):
        place.mkdir()
        place /= "d"
    archive = b"".join(nar_files.dump(tree))
    assert read(archive, []) == nested(levels)
    nar_files.remove_tree(tree)
    assert not tree.exists()
