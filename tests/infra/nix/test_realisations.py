"""Realisations in both layouts: the texts that Nix writes, what is signed, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import realisation
from infra.nix.errors import FormatError
from infra.nix.realisation import Realisation, RealisationLayout, parse_key
from infra.nix.signing import generate

HEX = "9103d0aa4c9d85b88cf0afac084decacf20d34f82a0e1025eaee3dfe8addced7"
BASE = "92hkz7sk8njbixfndj5ikl0dwkwqs7d8-ca-base"
TOP = "92bg1a8avlhh1frvgfy8p9khish8jbwl-ca-top"
DRV = "yq53l0m644z0mxl2rsqi1p2hjrlw6aam-ca-top.drv"
KEY = generate("cache-1", bytes(range(32)))
#: As `nix copy` of Nix 2.8 wrote it.
BY_HASH = b'{"dependentRealisations":{"sha256:%b!out":"%b"},"id":"sha256:%b!out","outPath":"%b","signatures":[]}' % (
    HEX.encode(),
    BASE.encode(),
    HEX[::-1].encode(),
    TOP.encode(),
)
OLD = Realisation(RealisationLayout.BY_HASH, f"sha256:{HEX[::-1]}!out", TOP, dependents=((f"sha256:{HEX}!out", BASE),))
NEW = Realisation(RealisationLayout.BY_DERIVATION, f"{DRV}/out", TOP)


def test_both_layouts_are_read_and_written() -> None:
    assert realisation.parse(OLD.layout, OLD.key, BY_HASH) == OLD
    assert OLD.render() == BY_HASH
    signed = replace(NEW, signatures=(KEY.sign(NEW.fingerprint()),))
    name, _, sig = signed.signatures[0].partition(":")
    assert json.loads(signed.render()) == {"outPath": TOP, "signatures": [{"keyName": name, "sig": sig}]}
    assert realisation.parse(NEW.layout, NEW.key, signed.render()) == signed
    # Nix from 2.35 still reads signatures written as one text.
    as_text = json.dumps({"outPath": TOP, "signatures": list(signed.signatures)}).encode()
    assert realisation.parse(NEW.layout, NEW.key, as_text) == signed
    minimal = json.dumps({"id": OLD.key, "outPath": TOP}).encode()
    assert realisation.parse(OLD.layout, OLD.key, minimal) == replace(OLD, dependents=())


def test_a_signature_covers_all_but_the_signatures() -> None:
    assert OLD.fingerprint() == BY_HASH.replace(b',"signatures":[]', b"")
    assert replace(OLD, signatures=(KEY.sign(b""),)).fingerprint() == OLD.fingerprint()
    # Nix's own golden file, src/libstore-tests/data/realisation/simple-fingerprint.txt, has this form.
    assert NEW.fingerprint().decode() == (
        f'{{"key":{{"drvPath":"{DRV}","outputName":"out"}},"value":{{"outPath":"{TOP}"}}}}'
    )


def test_keys_are_read_with_the_mark_plain_or_escaped() -> None:
    assert parse_key(OLD.layout, OLD.key.replace("!", "%21")) == OLD.key
    for layout, text in [
        (OLD.layout, OLD.key.replace("!", "")),
        (OLD.layout, f"sha256:{HEX.upper()}!out"),
        (OLD.layout, f"sha256:{HEX}!../../x"),
        (OLD.layout, f"sha256:{HEX}!"),
        (OLD.layout, f"sha256:{HEX}!out\n"),
        (OLD.layout, NEW.key),
        (NEW.layout, OLD.key),
        (NEW.layout, DRV),
        (NEW.layout, f"{DRV}/out/x"),
        (NEW.layout, f"{DRV}/.."),
        (NEW.layout, f"{TOP}/out"),
    ]:
        with pytest.raises(FormatError):
            parse_key(layout, text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"signatures":[]', b'"signatures":["x"]'),
        (b'"signatures":[]', b'"signatures":[{"keyName":"a","sig":7}]'),
        (b'"signatures":[]', b'"signatures":{}'),
        (b'"signatures":[]', b'"signatures":[],"more":1'),
        (b'"signatures":[]', b'"signatures":[],"signatures":[]'),
        (b'"signatures":[]', b'"signatures":' + b"[" * 100_000),
        (b'"signatures":[]', b'"signatures":' + b"1" * 10_000),
        (b'"outPath":"', b'"outPath":"/nix/store/'),
        (b'"outPath":"', b'"outPath":7,"x":"'),
        (b'"id":"sha256:7', b'"id":"sha256:8'),
        (b'{"dependentRealisations":{"sha256', b'{"dependentRealisations":{"sha1'),
        (b'{"dependentRealisations":{', b'{"dependentRealisations":{"x":[],'),
        (b"{", b"\xff{"),
        (b"{", b"[{"),
    ],
)
def test_a_malformed_or_foreign_realisation_is_refused(before: bytes, after: bytes) -> None:
    assert before in BY_HASH
    with pytest.raises(FormatError):
        realisation.parse(OLD.layout, OLD.key, BY_HASH.replace(before, after, 1))
    with pytest.raises(FormatError, match="larger"):
        realisation.parse(OLD.layout, OLD.key, BY_HASH + b" " * realisation.MAX_REALISATION_BYTES)


@given(st.data())
def test_any_text_is_read_or_refused_and_what_is_read_renders_to_itself(data: st.DataObject) -> None:
    known = data.draw(st.sampled_from([OLD, replace(NEW, signatures=(KEY.sign(NEW.fingerprint()),))]))
    text = known.render()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 20)) :]
    try:
        read = realisation.parse(known.layout, known.key, text)
    except FormatError:
        return
    assert realisation.parse(read.layout, read.key, read.render()) == read
