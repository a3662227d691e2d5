"""The client against peers that a test scripts: newer daemons than the one at hand, old ones, and nonsense."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.daemon import (
    BasicDerivation,
    BasicOutput,
    BuildStatus,
    DaemonConnection,
    DaemonGone,
    DaemonOperationError,
    DaemonProtocolError,
    DaemonUnsupportedError,
    PrintedLines,
    Upload,
    open_socket,
)
from infra.daemon.connection import QUESTIONS, ROOTS_AT_ONCE
from infra.daemon.wire import SERVER_MAGIC, TAG_ERROR, TAG_LAST, TAG_RESULT, TAG_START_ACTIVITY, Encoder
from infra.nix.hashing import sha256_text
from infra.nix.path_info import PathInfo
from tests.infra.daemon.conftest import pieces

Script = Callable[["Peer"], Awaitable[None]]
PATH = "/nix/store/00000000000000000000000000000000-x"


class Peer:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def expect(self, request: Encoder) -> None:
        wanted = request.getvalue()
        assert await self.reader.readexactly(len(wanted)) == wanted

    async def say(self, answer: Encoder) -> None:
        self.writer.write(answer.getvalue())
        await self.writer.drain()

    async def shake_hands(self, minor: int, *, trust: int = 1) -> None:
        await self.expect(Encoder().integer(0x6E697863).integer(0x126))
        await self.say(Encoder().integer(SERVER_MAGIC).integer(0x100 | minor))
        if minor >= 38:
            await self.expect(Encoder().strings(()))
            await self.say(Encoder().strings(["some-feature", "another"]))
        await self.expect(Encoder().integer(0).integer(0))
        answer = Encoder()
        if minor >= 33:
            answer.string("2.99")
        if minor >= 35:
            answer.integer(trust)
        await self.say(answer.integer(TAG_LAST))

    async def fail(self, text: str) -> None:
        error = Encoder().integer(TAG_ERROR).string("Error").integer(0).string("Error").string(text)
        await self.say(error.integer(0).integer(0))


@asynccontextmanager
async def serving(directory: Path, script: Script) -> AsyncIterator[str]:
    """Serve connections by a script; what goes wrong in it fails the test."""
    failures: list[BaseException] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(Peer(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client hung up, as most of these stories want
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)
        finally:
            writer.close()

    path = str(directory / "socket")
    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield path
    assert failures == []


@asynccontextmanager
async def connected(directory: Path, script: Script) -> AsyncIterator[DaemonConnection]:
    async with serving(directory, script) as path, await open_socket(path) as connection:
        yield connection


@pytest.mark.parametrize(("minor", "spoken"), [(32, 32), (33, 33), (34, 34), (35, 35), (37, 37), (38, 38), (39, 38)])
async def test_every_version_from_1_32_on_is_understood(socket_dir: Path, minor: int, spoken: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(minor)
        await peer.expect(Encoder().integer(31).strings([PATH]).integer(0))
        await peer.say(Encoder().integer(TAG_LAST).strings([PATH]))
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        assert connection.version == (1, spoken)
        assert connection.nix_version == ("2.99" if minor >= 33 else "")
        assert await connection.query_valid_paths([PATH]) == {PATH}


@pytest.mark.parametrize("version", [0x115, 0x11F, 0x226])
async def test_other_versions_are_refused_by_name(socket_dir: Path, version: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(Encoder().integer(SERVER_MAGIC).integer(version))
        await peer.reader.read()

    async with serving(socket_dir, script) as path:
        with pytest.raises(DaemonUnsupportedError, match=rf"{version >> 8}\.{version & 255}"):
            await open_socket(path)


async def test_a_root_that_an_ending_collector_refuses_is_requested_again(socket_dir: Path) -> None:
    root = Encoder().integer(11).string(PATH)

    async def script(peer: Peer) -> None:
        await peer.shake_hands(34)
        for _ in range(2):
            await peer.expect(root)
            await peer.fail("cannot connect to socket at '/nix/var/nix/gc-socket/socket'")
        await peer.expect(root)
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.expect(root)
        await peer.fail("the disk is full")

    async with connected(socket_dir, script) as connection:
        await connection.add_temp_roots([PATH])
        with pytest.raises(DaemonOperationError, match="the disk is full"):
            await connection.add_temp_roots([PATH])


async def test_roots_are_requested_together_and_the_refused_ones_again(socket_dir: Path) -> None:
    paths = [f"{PATH}-{number}" for number in range(ROOTS_AT_ONCE + 1)]
    refused = paths[1::100]

    async def script(peer: Peer) -> None:
        await peer.shake_hands(34)
        for together, refusing in ((paths[:-1], True), (paths[-1:], True), (refused, False)):
            for path in together:
                await peer.expect(Encoder().integer(11).string(path))
            for path in together:
                if refusing and path in refused:
                    await peer.fail("cannot connect to socket at '/nix/var/nix/gc-socket/socket'")
                else:
                    await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.expect(Encoder().integer(11).string(paths[0]))
        await peer.expect(Encoder().integer(11).string(paths[1]))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))

    async with connected(socket_dir, script) as connection:
        await connection.add_temp_roots(paths)
        with pytest.raises(DaemonGone) as gone:
            await connection.add_temp_roots(paths[:2])
        assert gone.value.unanswered, "the first was answered, and then nothing"
        assert connection.unusable_reason


async def test_validity_is_asked_together_with_roots_and_anew_of_those_that_were_refused(socket_dir: Path) -> None:
    kept, refused, absent = paths = [f"{PATH}-{number}" for number in range(3)]

    async def script(peer: Peer) -> None:
        await peer.shake_hands(34)
        for path in paths:
            await peer.expect(Encoder().integer(11).string(path))
        await peer.expect(Encoder().integer(31).strings(paths).integer(0))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.fail("cannot connect to socket at '/nix/var/nix/gc-socket/socket'")
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.say(Encoder().integer(TAG_LAST).strings([kept, refused]))
        # It was valid before it was kept, and is collected meanwhile.
        await peer.expect(Encoder().integer(11).string(refused))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.expect(Encoder().integer(31).strings([refused]).integer(0))
        await peer.say(Encoder().integer(TAG_LAST).strings([]))
        await peer.expect(Encoder().integer(11).string(absent))
        await peer.expect(Encoder().integer(31).strings([absent]).integer(0))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.fail("the database is gone")
        await peer.expect(Encoder().integer(11).string(kept))

    async with connected(socket_dir, script) as connection:
        assert await connection.root_valid_paths(paths) == {kept}
        with pytest.raises(DaemonOperationError, match="the database is gone"):
            await connection.root_valid_paths([absent])
        with pytest.raises(DaemonGone) as gone:
            await connection.root_valid_paths([kept])
        assert gone.value.unanswered


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 64])
async def test_a_peer_that_is_no_daemon_is_a_protocol_error(socket_dir: Path, greeting: bytes) -> None:
    async def script(peer: Peer) -> None:
        peer.writer.write(greeting)
        await peer.reader.read()

    async with serving(socket_dir, script) as path:
        with pytest.raises(DaemonProtocolError, match="not a Nix daemon"):
            await open_socket(path)


async def test_a_peer_that_hangs_up_and_one_that_is_not_there_are_gone(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readexactly(16)

    async with serving(socket_dir, script) as path:
        with pytest.raises(DaemonGone):
            await open_socket(path)
    with pytest.raises(DaemonGone, match="nowhere"):
        await open_socket(str(socket_dir / "nowhere"))


async def test_a_peer_that_sends_nothing_is_given_up(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.daemon.conversation.HANDSHAKE_S", 0.05)

    async def script(peer: Peer) -> None:
        await peer.reader.read()

    async with serving(socket_dir, script) as path:
        with pytest.raises(DaemonGone, match="handshake"):
            await open_socket(path)


@pytest.mark.parametrize(("trust", "expected"), [(0, None), (1, True), (2, False), (7, None)])
async def test_from_1_35_on_the_daemon_says_whether_it_trusts(
    socket_dir: Path, trust: int, expected: bool | None
) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38, trust=trust)
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        assert await connection.is_trusted() is expected


async def test_an_old_daemon_that_refuses_the_probe_does_not_trust(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(34)
        await peer.expect(Encoder().integer(1).string(PATH))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.expect(Encoder().integer(37).string(PATH).strings(()))
        await peer.fail("you are not privileged")

    async with connected(socket_dir, script) as connection:
        assert await connection.is_trusted(PATH) is False


async def test_a_missing_path_that_is_reported_as_an_error_is_missing(socket_dir: Path) -> None:
    # Nix 2.32.0-2.32.5 and 2.33.0-2.33.2 (infra/nix/FORMATS.md 5.3).
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        for valid in (0, 1):
            await peer.expect(Encoder().integer(26).string(PATH))
            await peer.fail(f"path '{PATH}' is not valid")
            await peer.expect(Encoder().integer(1).string(PATH))
            await peer.say(Encoder().integer(TAG_LAST).integer(valid))

    async with connected(socket_dir, script) as connection:
        assert await connection.query_path_info(PATH) is None
        with pytest.raises(DaemonOperationError, match="is not valid"):
            await connection.query_path_info(PATH)


def derivation() -> BasicDerivation:
    return BasicDerivation((BasicOutput("out", PATH),), (), "x86_64-linux", b"/bin/sh", (), ())


def started(activity: int, drv_path: str) -> Encoder:
    head = Encoder().integer(TAG_START_ACTIVITY).integer(activity).integer(3).integer(105).string("building")
    return head.integer(2).integer(1).string(drv_path).integer(1).string("").integer(0)


def log_line(activity: int, line: bytes) -> Encoder:
    return Encoder().integer(TAG_RESULT).integer(activity).integer(101).integer(1).integer(1).string(line)


async def test_many_paths_are_asked_about_together_and_each_answer_is_its_own(socket_dir: Path) -> None:
    paths = [f"{PATH}-{number}" for number in range(QUESTIONS + 3)]
    absent, refused = set(paths[::50]), paths[1]

    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        for together in (paths[:QUESTIONS], paths[QUESTIONS:]):
            for path in together:
                await peer.expect(Encoder().integer(26).string(path))
            for path in together:
                if path == refused:
                    await peer.fail(f"path '{path}' is not valid")
                elif path in absent:
                    await peer.say(Encoder().integer(TAG_LAST).integer(0))
                else:
                    answer = Encoder().integer(TAG_LAST).integer(1).string("").string("0" * 64).strings(())
                    await peer.say(answer.integer(0).integer(120).integer(0).strings(()).string(""))
            if refused in together:
                await peer.expect(Encoder().integer(26).string(refused))
                await peer.fail(f"path '{refused}' is not valid")
                await peer.expect(Encoder().integer(1).string(refused))
                await peer.say(Encoder().integer(TAG_LAST).integer(0))

    async with connected(socket_dir, script) as connection:
        found = await connection.query_path_infos(paths)
    assert [each and each.store_path for each in found] == [
        None if path in absent or path == refused else path for path in paths
    ]


async def test_only_lines_of_the_requested_build_are_its_log(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.reader.read(65536)
        for answer in (
            started(1, "/nix/store/other.drv"),
            log_line(1, b"of another build"),
            log_line(2, b"of a build that has not begun"),
            started(2, PATH + ".drv"),
            log_line(2, b"ours"),
            Encoder().integer(TAG_RESULT).integer(2).integer(101).integer(1).integer(0).integer(5),
            Encoder().integer(TAG_RESULT).integer(2).integer(105).integer(0),
            Encoder().integer(TAG_LAST).integer(0).string("").integer(1).integer(0).integer(5).integer(6),
            Encoder().integer(1).integer(7).integer(0).integer(0),
        ):
            await peer.say(answer)

    events: list[object] = []
    async with connected(socket_dir, script) as connection:
        result = await connection.build_derivation(PATH + ".drv", derivation(), events.append)
    assert events == [PrintedLines(b"ours\n", 1)]
    assert (result.status, result.cpu_user_us, result.cpu_system_us) == (BuildStatus.BUILT, 7, None)


@pytest.mark.parametrize(
    "nonsense",
    [
        Encoder().integer(0xBAD),
        Encoder().integer(TAG_RESULT).integer(1).integer(101).integer(1).integer(1).integer(1 << 60),
        Encoder().integer(TAG_LAST).integer(0).integer(1 << 63),
    ],
)
async def test_after_nonsense_the_connection_says_that_it_is_unusable(socket_dir: Path, nonsense: Encoder) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.reader.read(65536)
        await peer.say(nonsense)
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonProtocolError) as first:
            await connection.build_derivation(PATH + ".drv", derivation(), lambda _: None)
        assert connection.unusable_reason == str(first.value)
        with pytest.raises(DaemonGone, match="unusable"):
            await connection.query_valid_paths([PATH])


async def test_bytes_that_belong_to_no_request_are_noticed_before_the_next(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.reader.read(65536)
        await peer.say(Encoder().integer(TAG_LAST).strings(()).integer(TAG_LAST))
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        assert await connection.query_valid_paths([PATH]) == frozenset()
        with pytest.raises(DaemonProtocolError, match="belong to no request"):
            await connection.query_valid_paths([PATH])


async def test_more_valid_paths_than_were_requested_are_refused(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.reader.read(65536)
        await peer.say(Encoder().integer(TAG_LAST).strings([PATH, PATH]))
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonProtocolError, match="the limit is 1"):
            await connection.query_valid_paths([PATH])


async def test_a_long_list_in_small_pieces_is_read_whole(socket_dir: Path) -> None:
    paths = [f"/nix/store/{i:032}-x" for i in range(20_000)]

    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.expect(Encoder().integer(31).strings(paths).integer(1))
        await peer.say(Encoder().integer(TAG_LAST).strings(paths))

    async with connected(socket_dir, script) as connection:
        assert await connection.query_valid_paths(paths, substitute=True) == set(paths)


async def test_an_upload_that_is_refused_early_stops_at_a_frame_and_ends_the_stream(socket_dir: Path) -> None:
    size = 1 << 30
    taken = 0

    async def script(peer: Peer) -> None:
        nonlocal taken
        await peer.shake_hands(38)
        await peer.reader.readexactly(100_000)
        await peer.fail("no room")
        data = b""
        while not (data := data[-8:] + await peer.reader.read(65536)).endswith(b"\0" * 8):
            taken += 65536
        await peer.expect(Encoder().integer(31).strings([PATH]).integer(0))
        await peer.say(Encoder().integer(TAG_LAST).strings(()))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(size // 65536):
            yield b"\xff" * 65536

    async with connected(socket_dir, script) as connection:
        info = PathInfo(PATH, sha256_text(bytes(32)), size)
        with pytest.raises(DaemonOperationError, match="no room"):
            await connection.add_to_store_nar(Upload(info, endless()), dont_check_sigs=True)
        assert taken < size // 8
        assert await connection.query_valid_paths([PATH]) == frozenset()


@pytest.mark.parametrize(
    "nar", [b"x" * 112, b"\x0d" + b"\0" * 111, (b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0" + b"x" * 88)]
)
async def test_a_nar_that_is_none_or_ends_elsewhere_is_a_protocol_error(socket_dir: Path, nar: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.shake_hands(38)
        await peer.expect(Encoder().integer(1).string(PATH))
        await peer.say(Encoder().integer(TAG_LAST).integer(1))
        await peer.expect(Encoder().integer(38).string(PATH))
        await peer.say(Encoder().integer(TAG_LAST))
        async for piece in pieces(nar, 10):
            peer.writer.write(piece)
            await asyncio.sleep(0)
        await peer.reader.read()

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonProtocolError, match="NAR"):
            async for _ in connection.nar_from_path(PATH, 112):
                pass
        assert connection.unusable_reason is not None
