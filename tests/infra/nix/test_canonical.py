"""Derivations as verification reads them: what the short way takes is canonical by the long way too, and the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.nix import aterm
from infra.nix.canonical import MAX_BYTES, of_scan, read_canonical
from infra.nix.derivation import OPTION_KEYS, Derivation
from infra.nix.errors import FormatError
from tests.benchmarks.ingest_core import make_graph
from tests.infra.nix.test_derivations import MASKED, PIECES, RICH, derivations


def long_way(data: bytes) -> aterm.Scan | None:
    """The scan of a canonical derivation."""
    try:
        scan = aterm.scan_by_token(data)
    except FormatError:
        return None
    return scan if scan.in_order() else None


def agree(text: bytes) -> bool:
    """Return whether the short way took `text`; the long way then says the same."""
    short = read_canonical(text)
    if short is None:
        return False
    scan = long_way(text)
    assert scan is not None
    whole = of_scan(scan)
    read = {output.name.encode() for output in whole.outputs}
    if not OPTION_KEYS.isdisjoint(whole.env):
        read |= OPTION_KEYS
    assert short == replace(whole, env={key: value for key, value in whole.env.items() if key in read})
    return True


@given(derivations(), st.data())
@example(replace(RICH, env=((b"out", b'\\"),("a","'), (b"z", b'x"),('))), None)
def test_what_the_short_way_takes_is_canonical_and_the_same(drv: Derivation, data: st.DataObject | None) -> None:
    text = aterm.render(drv)
    for _ in range(data.draw(st.integers(0, 3)) if data else 0):
        assert data is not None
        at = data.draw(st.integers(0, len(text)))
        new = data.draw(st.one_of(PIECES, st.sampled_from([b'"', b"\\q", b",", b'("","")', b'","', b'"),("', b'")])'])))
        text = text[:at] + new + text[at + data.draw(st.integers(0, 4)) :]
    agree(text)


def test_derivations_of_a_package_set_go_the_short_way() -> None:
    assert all(agree(data) for _, data in make_graph(60, seed=2))
    assert agree(MASKED)


@pytest.mark.parametrize(
    "change",
    [
        (b'"x86_64-linux"', b'"x86_64-\nlinux"'),
        (b"echo hi", b"echo\\ hi"),
        (b'("out","","","")', b'("out","","",""),("dev","","","")'),
        (b'("name","t")', b'("name","t"),("name","t")'),
        (b'("name","t")', b'("name","t\\a")'),
        (b'("name","t")', b'("name","t"x)'),
        (b'("name","t")', b'("name","t"")'),
        (b'("name","t")', b'("name")'),
        (b'("name","t")', b'("na\\"me","t")'),
        (b"[],[],", b'[("/b.drv",["out"]),("/a.drv",["out"])],[],'),
        (b"[],[],", b'[("/a.drv",["out","dev"])],[],'),
        (b"[],[],", b'[("/a.drv",["out"]),],[],'),
        (b"[],[],", b'[],["/b","/a"],'),
        (b'("system","x86_64-linux")])', b'("system","x86_64-linux")'),
        (b'("system","x86_64-linux")])', b'("system","x86_64-linux")])x'),
        (b'("system","x86_64-linux")])', b'("system","x86_64-linux\\")])'),
    ],
)
def test_what_nix_would_not_write_so_is_left_to_the_long_way(change: tuple[bytes, bytes]) -> None:
    assert change[0] in MASKED
    assert read_canonical(MASKED.replace(*change)) is None


def test_a_very_long_derivation_is_left_to_the_long_way() -> None:
    assert agree(aterm.render(replace(aterm.parse(MASKED), env=((b"a", b"x" * 1000),))))
    assert read_canonical(aterm.render(replace(aterm.parse(MASKED), env=((b"a", b"x" * MAX_BYTES),)))) is None
