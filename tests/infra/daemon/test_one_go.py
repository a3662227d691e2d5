"""A build in one go: what comes before and after it is requested with it, and each answer is told from the next."""

from pathlib import Path

import pytest

from infra.daemon import BuildStatus, DaemonGone, DaemonOperationError, Options
from infra.daemon.wire import TAG_LAST, Encoder
from tests.infra.daemon.conftest import Store
from tests.infra.daemon.test_peers import PATH, Peer, connected, derivation, started

DRV = PATH + ".drv"
INPUTS = (f"{PATH}-1", f"{PATH}-2")
TOOK_ROOT = Encoder().integer(TAG_LAST).integer(1)


def nothing(_: object) -> None:
    """Take no notice of an event."""


def options() -> Encoder:
    request = Encoder().integer(19)
    Options(build_cores=1).encode(request)
    return request


def build() -> Encoder:
    request = Encoder().integer(36).string(DRV)
    derivation().encode(request)
    return request.integer(0)


async def expect_all(peer: Peer) -> None:
    """All requests are here before the first is answered."""
    await peer.shake_hands(34)
    await peer.expect(options())
    for path in INPUTS:
        await peer.expect(Encoder().integer(11).string(path))
    await peer.expect(build())
    await peer.expect(Encoder().integer(26).string(PATH))


def verdict(status: int) -> Encoder:
    answer = Encoder().integer(TAG_LAST).integer(status).string("").integer(1).integer(0).integer(5).integer(6)
    return answer.strings(())


async def test_a_build_is_requested_with_its_options_its_roots_and_the_look_at_its_outputs(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await expect_all(peer)
        await peer.say(Encoder().integer(TAG_LAST))
        await peer.fail("cannot connect to socket at '/nix/var/nix/gc-socket/socket'")
        await peer.say(TOOK_ROOT)
        await peer.say(started(1, DRV))
        await peer.say(verdict(0))
        info = Encoder().integer(TAG_LAST).integer(1).string("").string("0" * 64).strings(()).integer(5).integer(120)
        await peer.say(info.integer(1).strings(()).string(""))

    async with connected(socket_dir, script) as connection:
        built = await connection.build_in_one_go(
            DRV, derivation(), nothing, options=Options(build_cores=1), roots=INPUTS
        )
        assert built.result.status is BuildStatus.BUILT
        assert built.refused == INPUTS[:1]
        assert built.infos[PATH].nar_size == 120
        assert connection.unusable_reason is None


async def test_an_output_that_the_daemon_does_not_answer_for_is_not_known(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await expect_all(peer)
        await peer.say(Encoder().integer(TAG_LAST))
        for _ in INPUTS:
            await peer.say(TOOK_ROOT)
        await peer.say(verdict(3))
        await peer.fail("path is not valid")
        await peer.expect(Encoder().integer(11).string(PATH))
        await peer.say(TOOK_ROOT)

    async with connected(socket_dir, script) as connection:
        built = await connection.build_in_one_go(
            DRV, derivation(), nothing, options=Options(build_cores=1), roots=INPUTS
        )
        assert (built.result.status, dict(built.infos)) == (BuildStatus.PERMANENT_FAILURE, {})
        # The next request is answered by its own answer.
        await connection.add_temp_roots([PATH])


async def test_after_an_error_in_place_of_a_verdict_the_connection_is_not_used_again(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await expect_all(peer)
        await peer.say(Encoder().integer(TAG_LAST))
        for _ in INPUTS:
            await peer.say(TOOK_ROOT)
        await peer.say(started(1, DRV))
        await peer.fail("[json.exception.type_error.305]")

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonOperationError) as refused:
            await connection.build_in_one_go(DRV, derivation(), nothing, options=Options(build_cores=1), roots=INPUTS)
        assert refused.value.builder_ran
        assert connection.unusable_reason


@pytest.mark.parametrize("answered", [0, 1, 3])
async def test_a_daemon_that_goes_before_it_says_anything_of_the_build_has_not_begun_it(
    socket_dir: Path, answered: int
) -> None:
    async def script(peer: Peer) -> None:
        await expect_all(peer)
        for answer in (Encoder().integer(TAG_LAST), TOOK_ROOT, TOOK_ROOT)[:answered]:
            await peer.say(answer)

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonGone) as gone:
            await connection.build_in_one_go(DRV, derivation(), nothing, options=Options(build_cores=1), roots=INPUTS)
        assert gone.value.unanswered


async def test_a_daemon_that_goes_while_it_builds_may_have_built(socket_dir: Path) -> None:
    async def script(peer: Peer) -> None:
        await expect_all(peer)
        for answer in (Encoder().integer(TAG_LAST), TOOK_ROOT, TOOK_ROOT, started(1, DRV)):
            await peer.say(answer)

    async with connected(socket_dir, script) as connection:
        with pytest.raises(DaemonGone) as gone:
            await connection.build_in_one_go(DRV, derivation(), nothing, options=Options(build_cores=1), roots=INPUTS)
        assert not gone.value.unanswered


async def test_a_real_daemon_builds_in_one_go_and_says_what_came_of_it(store: Store) -> None:
    async with await store.open() as connection:
        drv_path, good = store.derivation("good", "echo > $out")
        built = await connection.build_in_one_go(drv_path, good, nothing, options=Options(build_cores=1))
        (output,) = good.outputs
        assert built.result.status is BuildStatus.BUILT
        assert built.infos[output.path] == await connection.query_path_info(output.path)
        bad_path, bad = store.derivation("bad", "exit 1")
        failed = await connection.build_in_one_go(bad_path, bad, nothing, roots=[output.path])
        assert (failed.result.status, dict(failed.infos), failed.refused) == (BuildStatus.PERMANENT_FAILURE, {}, ())
        assert await connection.query_valid_paths([output.path])
