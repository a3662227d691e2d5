"""Step details: they come back exactly, however odd, and take little room where they are as Nix makes them."""

from __future__ import annotations

import string
import sys
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from coordinator.readmodel.step_details import Details
from coordinator.stores.derivations import StepInfo
from scheduler.model import StepKey

_hash = st.text("0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32)
_name = st.text(string.ascii_letters + "0123456789+-._?=", min_size=1, max_size=20)


@st.composite
def _infos(draw: st.DrawFn) -> StepInfo:
    """A step as intake makes it: the key is the base name of its first path."""
    store, name = draw(st.sampled_from(["/nix/store", "/s"])), draw(_name)
    names = sorted(draw(st.sets(st.sampled_from(["out", "dev", "lib", "out-dev", "man"]), min_size=1)))
    outputs = tuple((out, f"{store}/{draw(_hash)}-{name}{'' if out == 'out' else f'-{out}'}") for out in names)
    key = StepKey(min(path for _, path in outputs)[len(store) + 1 :])
    features = draw(st.sampled_from([(), ("kvm",)]))
    return StepInfo(
        key, name, draw(st.sampled_from(["x", "y"])), features, f"{store}/{draw(_hash)}-{name}.drv", outputs
    )


_odd = st.builds(
    StepInfo,
    key=_name.map(StepKey),
    name=st.text(max_size=9),
    system=st.just("x"),
    features=st.just(()),
    drv=st.text(max_size=90),
    outputs=st.lists(st.tuples(_name, st.text(max_size=60)), max_size=3).map(tuple),
)


@given(st.lists(st.one_of(_infos(), _odd), unique_by=lambda info: info.key), st.integers(0, 90), st.integers(1, 90))
def test_details_come_back_as_kept_and_any_part_of_a_drv_finds_their_step(
    told: list[StepInfo], start: int, length: int
) -> None:
    details = Details()
    for info in told:
        details.learn(info.key, info)
    assert [details.get(info.key) for info in told] == told
    for info in told:
        assert info.key in details.find(info.drv)
        part = info.drv[start : start + length]
        paths = {other.key: (other.drv, *(path for _, path in other.outputs)) for other in told}
        assert set(details.find(part)) == {key for key, all_of in paths.items() if any(part in path for path in all_of)}
    assert details.get(StepKey("not known")) is None


def made(number: int) -> StepInfo:
    """A step whose texts take room of their own."""
    key = StepKey(f"{number:032}-name")
    outputs = (("out", f"/nix/store/{key}"), ("dev", f"/nix/store/1{key[1:]}-dev"))
    return StepInfo(key, "name", "x", (), f"/nix/store/2{key[1:]}.drv", outputs)


def test_details_of_paths_that_nix_makes_are_kept_as_hashes() -> None:
    """And so takes much less room than its texts."""
    details, number = Details(), 2_000
    keys = [made(each).key for each in range(number)]
    tracemalloc.start()
    try:
        for each, key in enumerate(keys):
            details.learn(key, made(each))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    hashes, entry = sys.getsizeof(bytes(2 + 32 * 3)), 120
    assert kept < number * (hashes + entry)
    assert [details.get(key) for key in keys] == [made(each) for each in range(number)]
