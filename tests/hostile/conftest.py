"""Farms as the README starts them, for tests that attack them.

- `readme_farm`: `drover up` as root or whoever else runs the tests, without configuration, with its default worker.
  All modules share it, so its tests leave it as it was: one worker that is online, and nothing that runs.
- `own_farm`: the same for tests that burden it.
- `users_farm`: the same for the tests of one module, as an ordinary user of the machine with a home of their own
  (`tests.support.ordinary`).
- `weak_farm`: two workers whose builders own the machine (class C), of which `allowed` is allowed by name and
  `refused` is not. All modules share it.
- `pair_farm`: two workers, each with a feature that is called as it is, a cache that compresses with xz and one that
  does not compress, `plain`.

Which modules share a farm says `tests.conftest.SHARING`.

The first three are `FarmUnderAttack`, which is a `tests.support.farm.Farm` with what attacks need:

    def test_a_stranger_is_refused(readme_farm: FarmUnderAttack) -> None:
        built = readme_farm.build_text('derivation { name = "x"; … }')        # `drover build`, as the farm's user
        with LoopStalls(readme_farm.url) as stalls:                           # tests.support.loop
            answer = readme_farm.request("POST", "/api/v1/submissions", b"{", token=None)   # raw HTTP
        assert answer.status == 401
        assert stalls.over(0.05) == 0
        assert readme_farm.process.peak_rss_bytes < 500_000_000               # also rss_bytes, descriptors

`readme_farm.process.reset_peak()` lets the peak begin anew. A test that hurts its farm for good makes one of its own:
`with running_farm(directory) as farm`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import BUSYBOX
from tests.support.attack import FarmUnderAttack, running, running_farm
from tests.support.farm import FARMS, Farm, WorkerSpec
from tests.support.ordinary import OrdinaryUser

#: Who may write to the cache `plain` of `pair_farm`.
PLAIN_WRITER = "a-writer-of-this-cache"
TWO_CACHES = """
[cache]
compression = "xz"

[[caches]]
name = "plain"
compression = "none"
writers = ["env:PLAIN_WRITERS"]
"""
#: Builders are root, as on a machine without build users before drover had its own.
WEAK = {"build-users-group": ""}


@pytest.fixture(scope="session")
def readme_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[FarmUnderAttack]:
    with running_farm(tmp_path_factory.mktemp("readme")) as farm:
        pytestconfig.stash.setdefault(FARMS, []).append(farm)
        yield farm


@pytest.fixture(scope="session")
def own_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[FarmUnderAttack]:
    with running_farm(tmp_path_factory.mktemp("own")) as farm:
        pytestconfig.stash.setdefault(FARMS, []).append(farm)
        yield farm


@pytest.fixture(scope="module")
def users_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarmUnderAttack]:
    root = tmp_path_factory.mktemp("user")
    with running_farm(root, user=OrdinaryUser(root)) as farm:
        yield farm


@pytest.fixture(scope="session")
def weak_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Farm]:
    workers = [WorkerSpec("allowed", slots=1, nix_options=WEAK), WorkerSpec("refused", slots=1, nix_options=WEAK)]
    with running(Farm(tmp_path_factory.mktemp("weak"), workers, settings='weak_isolation = ["allowed"]')) as farm:
        pytestconfig.stash.setdefault(FARMS, []).append(farm)
        yield farm


@pytest.fixture(scope="session")
def pair_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Farm]:
    root = tmp_path_factory.mktemp("pair")
    (root / "gate").mkdir()
    options = {"sandbox-paths": f"{BUSYBOX['sandbox-paths']} /bin/busybox /gate={root / 'gate'}"}
    workers = [WorkerSpec(name, features=(name,), nix_options=options) for name in ("first", "second")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIN_WRITERS", PLAIN_WRITER)
        farm = Farm(root, workers, settings=TWO_CACHES)
        with running(farm):
            farm.wait_for_workers(2)
            pytestconfig.stash.setdefault(FARMS, []).append(farm)
            yield farm
