"""Cores of builds: one each where there are as many slots as cores, and more for what asks for `big-parallel`."""

from __future__ import annotations

import os

from workers.agent.build_cores import BuildCores
from workers.wire.messages import Succeeded

from .conftest import AgentHarness, drv, nar_of, order


def test_what_asks_for_big_parallel_gets_the_share_of_those_that_run() -> None:
    cores = BuildCores(machine=16, usual=1)
    assert cores.of((), 1) == 1
    assert [cores.of(("big-parallel", "kvm"), running) for running in (0, 1, 2, 5, 16, 40)] == [16, 16, 8, 3, 1, 1]
    assert BuildCores(16, 4).of(("big-parallel",), 16) == 4
    assert BuildCores(16, 2, fixed=True).of(("big-parallel",), 1) == 2


def test_a_package_of_which_it_is_known_gets_the_cores_that_it_has_use_for_of_the_same_share() -> None:
    cores = BuildCores(machine=16, usual=1)
    # What asks for all and uses few leaves the others; what asks for none and uses more gets more.
    assert cores.of(("big-parallel",), 1, 3) == 3
    assert [cores.of((), running, 6) for running in (1, 2, 4, 16)] == [6, 6, 4, 1]
    assert BuildCores(16, 4).of((), 1, 2) == 4
    assert BuildCores(16, 2, fixed=True).of((), 1, 8) == 2


async def test_a_build_is_given_its_cores_by_what_its_derivation_asks_for(bench: AgentHarness) -> None:
    reader, cores = await bench.agent(slots=2), os.cpu_count() or 1
    features = {"requiredSystemFeatures": "big-parallel"}
    usual = max(1, cores // 2)
    for name, env, useful, expected in (
        ("usual", {}, 0, usual),
        ("large", features, 0, cores),
        ("known", {}, cores, cores),
        ("few", features, 1, usual),
    ):
        told = order(drv(name, "echo $NIX_BUILD_CORES > $out", env=env)).model_copy(update={"cores": useful})
        [report] = await reader.build(told)
        assert isinstance(report.result, Succeeded)
        assert f"{expected}\n".encode() in nar_of(bench, report.result.outputs[0])
