"""Inputs come from the farm's cache, once, and only what the farm has signed."""

from __future__ import annotations

import pytest

from infra.nix import signing
from infra.substituter.closures import QUESTION_PATHS
from workers.agent import farm_sources
from workers.agent.farm_sources import FarmSources
from workers.wire.messages import Failed, Output, Succeeded

from .conftest import STORE, AgentHarness, ReportReader, drv, hash_part, order


async def _publish_chain(bench: AgentHarness, reader: ReportReader) -> list[Output]:
    """Three outputs: the second refers to the first, the third, which is large, to the second."""
    made: list[Output] = []
    scripts = [
        "echo first > $out",
        "mkdir $out; echo {0} > $out/link",
        (
            "mkdir $out; echo {0} > $out/link; i=0; while [ $i -lt 40000 ]; do "
            'echo "$i 0123456789012345678901234567890123456789" >> $out/large; i=$((i+1)); done'
        ),
    ]
    for number, script in enumerate(scripts):
        inputs = [made[-1].path] if made else []
        [report] = await reader.build(order(drv(f"chain{number}", script.format(*inputs)), inputs))
        made += bench.publish(report)
    return made


async def test_a_second_worker_fetches_the_closure_of_its_inputs(bench: AgentHarness) -> None:
    one = await bench.agent("one")
    chain = await _publish_chain(bench, one)
    assert bench.cache.questions == []
    two = await bench.agent("two")
    use = order(drv("use", f"read line < {chain[2].path}/link; echo $line > $out"), [chain[2].path])
    [report] = await two.build(use)
    assert isinstance(report.result, Succeeded), report.result
    assert report.result.outputs[0].references == (chain[1].path.rpartition("/")[2],)
    assert bench.cache.questions == [[chain[2].path.rpartition("/")[2]]]
    for output in chain:
        assert (bench.root / "two" / "store" / output.path.lstrip("/")).exists()


async def test_a_closure_larger_than_one_answer_is_requested_in_parts_references_first(bench: AgentHarness) -> None:
    """A bounded answer holds the nearest paths; a fan and a chain that end beyond it come with further questions."""
    bench.cache.at_most = QUESTION_PATHS

    def publish(name: str, *references: str) -> str:
        path = f"{STORE}/{hash_part(name)}-{name}"
        nar_hash = "sha256:" + "0" * 52
        bench.cache.publish(
            Output(
                name="out",
                path=path,
                url=f"nar/{'0' * 52}.nar",
                compression="none",
                file_hash=nar_hash,
                file_size=1,
                nar_hash=nar_hash,
                nar_size=1,
                references=tuple(sorted(references)),
                ca="",
            )
        )
        return path.rpartition("/")[2]

    chain = publish("chain-0")
    for number in range(1, 40):
        chain = publish(f"chain-{number}", chain)
    leaves = [publish(f"leaf-{number}", chain) for number in range(2 * QUESTION_PATHS + 7)]
    roots = [f"{STORE}/{publish(f'root-{number}', *leaves[number::2])}" for number in range(2)]
    sources = FarmSources(bench.farm, None)
    try:
        infos = await sources.narinfos(roots)
    finally:
        await sources.close()
    places = {info.store_path.rpartition("/")[2]: place for place, info in enumerate(infos)}
    assert len(places) == len(infos) == 40 + len(leaves) + len(roots)
    assert all(places[name] < place for place, info in enumerate(infos) for name in info.path.references)
    assert len(bench.cache.questions) > 2
    assert max(map(len, bench.cache.questions)) <= QUESTION_PATHS


async def test_concurrent_leases_fetch_a_shared_input_once_and_later_ones_ask_nothing(bench: AgentHarness) -> None:
    one = await bench.agent("one")
    chain = await _publish_chain(bench, one)
    two = await bench.agent("two")
    wanted = chain[1].path
    reports = await two.build(*(order(drv(f"user{i}", f"cat {wanted}/link; : > $out"), [wanted]) for i in range(2)))
    assert all(isinstance(report.result, Succeeded) for report in reports)
    assert len(bench.cache.questions) == 1
    [later] = await two.build(order(drv("later", ": > $out"), [wanted, chain[0].path]))
    assert isinstance(later.result, Succeeded)
    assert len(bench.cache.questions) == 1


async def test_an_input_that_the_cache_lacks_is_named_and_the_farms_fault(bench: AgentHarness) -> None:
    reader = await bench.agent()
    lost = f"{STORE}/{hash_part('lost')}-lost"
    [report] = await reader.build(order(drv("use", ": > $out"), [lost]))
    assert isinstance(report.result, Failed)
    assert report.result.reason == "input_missing"
    assert lost in report.result.message
    assert report.result.missing == (lost,)


async def test_an_input_that_is_not_signed_by_the_farm_is_refused(bench: AgentHarness) -> None:
    one = await bench.agent("one")
    bench.cache.key = signing.generate("farm-1", b"x" * 32)
    [report] = await one.build(order(drv("foreign", ": > $out")))
    [output] = bench.publish(report)
    two = await bench.agent("two")
    [refused] = await two.build(order(drv("use", ": > $out"), [output.path]))
    assert isinstance(refused.result, Failed)
    assert "not signed by a key of the farm" in refused.result.message
    assert not (bench.root / "two" / "store" / output.path.lstrip("/")).exists()


async def test_an_input_that_was_verified_once_is_refused_with_another_signature(bench: AgentHarness) -> None:
    one, two = await bench.agent("one"), await bench.agent("two")
    [report] = await one.build(order(drv("below", "echo below > $out")))
    [below] = bench.publish(report)
    [report] = await one.build(order(drv("above", f"echo {below.path} > $out"), [below.path]))
    [above] = bench.publish(report)
    [report] = await two.build(order(drv("first", f"read x < {below.path}; echo $x > $out"), [below.path]))
    bench.publish(report)
    signed = bench.cache.narinfos[below.path.rpartition("/")[2]]
    bench.cache.key = signing.generate("farm-1", b"x" * 32)
    bench.cache.publish(below)
    [refused] = await two.build(order(drv("second", f"read x < {above.path}; echo $x > $out"), [above.path]))
    assert isinstance(refused.result, Failed)
    assert f"{below.path} is not signed by a key of the farm" in refused.result.message
    bench.cache.narinfos[signed.base_name] = signed
    [report] = await two.build(order(drv("third", f"read x < {above.path}; echo $x > $out"), [above.path]))
    bench.publish(report)


@pytest.mark.parametrize("damage", ["gone", "corrupt"])
async def test_an_object_that_is_gone_or_corrupt_is_the_farms_fault_and_mends(bench: AgentHarness, damage: str) -> None:
    one = await bench.agent("one")
    chain = await _publish_chain(bench, one)
    objects = bench.root / "objects" / chain[2].url
    whole = objects.read_bytes()
    if damage == "gone":
        objects.unlink()
    else:
        objects.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    two = await bench.agent("two")
    made = drv("use", ": > $out")
    [failed] = await two.build(order(made, [chain[2].path]))
    assert isinstance(failed.result, Failed)
    assert failed.result.reason == "input_missing"
    assert chain[2].path in failed.result.message
    objects.write_bytes(whole)
    [mended] = await ReportReader(two.agent, ack=two.ack).build(order(made, [chain[2].path], attempt=2))
    assert isinstance(mended.result, Succeeded), mended.result


@pytest.mark.parametrize("what", ["cache", "store"])
async def test_an_input_that_cannot_be_had_for_a_while_is_waited_for(
    bench: AgentHarness, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = await bench.agent("one")
    chain = await _publish_chain(bench, one)
    file = bench.root / "objects" / chain[1].url
    if what == "cache":
        bench.cache.away = True
    else:
        # A directory in its place cannot be read.
        file.rename(file.with_name("aside"))
        file.mkdir()
    two = await bench.agent("two")
    use = order(drv("use", ": > $out"), [chain[2].path])
    await two.agent.start_many([use.dump()])
    await two.until(lambda: len(bench.cache.questions) > 2 or "it is asked again" in caplog.text)
    if what == "cache":
        bench.cache.away = False
    else:
        file.rmdir()
        file.with_name("aside").rename(file)
    [report] = await two.finish(use)
    assert isinstance(report.result, Succeeded), report.result


async def test_a_cache_that_does_not_answer_is_the_farms_fault(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farm_sources, "AWAY_S", 0.3)
    reader = await bench.agent(greet=False)
    away = bench.farm.model_copy(update={"cache_url": "http://127.0.0.1:9/cache"})
    await reader.agent.hello(away.dump())
    [report] = await reader.build(order(drv("use", ": > $out"), [f"{STORE}/{hash_part('some')}-some"]))
    assert isinstance(report.result, Failed)
    assert report.result.reason == "input_missing"
    assert away.cache_url in report.result.message
