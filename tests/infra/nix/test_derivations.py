"""Derivations as text: canonical round trips, two roads that agree, refusals at the offending byte, options."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import aterm
from infra.nix.derivation import Derivation, DerivationKind, DerivationOptions, DerivationOutput, classify, options
from infra.nix.errors import FormatError

MASKED = (
    b'Derive([("out","","","")],[],[],"x86_64-linux","/bin/sh",["-c","echo hi > $out"],'
    b'[("builder","/bin/sh"),("name","t"),("out",""),("system","x86_64-linux")])'
)
RICH = Derivation(
    outputs=(DerivationOutput("dev", "/nix/store/d"), DerivationOutput("out", "/nix/store/o")),
    input_drvs=(("/nix/store/a.drv", ("out",)), ("/nix/store/b.drv", ("dev", "out"))),
    input_srcs=("/nix/store/s1", "/nix/store/s2"),
    system="x86_64-linux",
    builder='/bin/"sh"\\\n',
    args=(b"-c", b'("out","', b"\xff\xfe", b"\\"),
    env=((b"", b""), (b'a"b', b'tab\tnl\ncr\rback\\quote"\\n'), (b"dev", b"/nix/store/d"), (b"out", b"/nix/store/o")),
)


def test_the_vector_of_the_format_page_holds() -> None:
    drv = aterm.parse(MASKED)
    assert aterm.render(drv) == MASKED
    assert sha256(MASKED).hexdigest() == "dae5410a258feb7cd81d2b9c2f76bd335c8ec80f87deffc6c54f6c9f0398e318"
    assert dict(drv.env)[b"name"] == b"t"
    assert drv.args == (b"-c", b"echo hi > $out")


def test_the_writer_escapes_five_characters_and_nothing_else() -> None:
    drv = replace(RICH, env=((b"k", bytes(range(256))),))
    text = aterm.render(drv)
    assert aterm.parse(text) == drv
    raw = bytes(byte for byte in range(256) if byte not in b'"\\\n\r\t')
    assert text.endswith(
        b'[("k","'
        + raw.replace(b"\x08", b"\x08\\t\\n")
        .replace(b"\x0c", b"\x0c\\r")
        .replace(b"!", b'!\\"')
        .replace(b"[", b"[\\\\")
        + b'")])'
    )


NAMES = st.text(alphabet="abcdef-_.+?=", min_size=1, max_size=6)
PIECES = st.lists(
    st.sampled_from(
        [
            b"\\",
            b'"',
            b"\n",
            b"\t",
            b"\r",
            b"n",
            b"(",
            b")",
            b'("out","',
            b"[",
            b"]",
            b",",
            b"\0",
            b"\1",
            b"\xff",
            b"ab",
        ]
    ),
    max_size=6,
).map(b"".join)


@st.composite
def derivations(draw: st.DrawFn) -> Derivation:
    return Derivation(
        outputs=tuple(
            DerivationOutput(
                name, draw(NAMES), draw(st.sampled_from(["", "r:sha256"])), draw(st.sampled_from(["", "ab"]))
            )
            for name in sorted(draw(st.sets(NAMES, min_size=1, max_size=3)))
        ),
        input_drvs=tuple(
            (path, tuple(sorted(draw(st.sets(NAMES, max_size=3))))) for path in sorted(draw(st.sets(NAMES, max_size=4)))
        ),
        input_srcs=tuple(sorted(draw(st.sets(NAMES, max_size=3)))),
        system=draw(NAMES),
        builder=draw(PIECES).decode(errors="replace"),
        args=tuple(draw(st.lists(PIECES, max_size=3))),
        env=tuple((key, draw(PIECES)) for key in sorted(draw(st.sets(PIECES, max_size=5)))),
    )


@given(derivations())
def test_a_rendered_derivation_parses_to_itself_and_is_canonical(drv: Derivation) -> None:
    text = aterm.render(drv)
    assert aterm.parse(text) == drv
    assert aterm.scan(text).in_order()
    assert aterm.render(aterm.parse(text)) == text


@given(derivations())
def test_the_input_section_is_where_the_scan_says(drv: Derivation) -> None:
    text = aterm.render(drv)
    scan = aterm.scan(text)
    assert text[scan.inputs_start : scan.inputs_end] == aterm.render_inputs(drv.input_drvs)
    assert text[scan.inputs_start - 3 : scan.inputs_start] == b"],["
    assert text[scan.inputs_end : scan.inputs_end + 3] == b"],["


@given(derivations(), st.data())
def test_any_bytes_either_parse_or_are_refused_with_an_offset_and_both_roads_agree(
    drv: Derivation, data: st.DataObject
) -> None:
    text = aterm.render(drv)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        new = data.draw(st.one_of(PIECES, st.sampled_from([b'"', b"\\q", b",", b'("","")', b'(",[])'])))
        text = text[:at] + new + text[at + data.draw(st.integers(0, 4)) :]
    fast = aterm.scan_canonical(text)
    try:
        slow = aterm.scan_by_token(text)
    except FormatError as refusal:
        offset = refusal.offset
        assert fast is None
    else:
        offset = 0
        assert fast is None or fast == slow
        assert not slow.in_order() or aterm.render(slow.derivation) == text
    assert 0 <= offset <= len(text)


def test_order_is_free_for_readers_but_seen() -> None:
    shuffled = replace(RICH, env=RICH.env[::-1])
    drv = aterm.parse(aterm.render(RICH))
    assert drv == RICH
    text = aterm.render(RICH).replace(b'[("","")', b'[("z","")')
    assert aterm.parse(text).env[0] == (b"z", b"")
    assert not aterm.scan(text).in_order()
    assert aterm.render(shuffled) == aterm.render(RICH)


@pytest.mark.parametrize(("text", "value"), [(b"\\q", b"q"), (b"a\nb", b"a\nb"), (b"\\\nb", b"\nb"), (b"\t", b"\t")])
def test_escapes_that_no_writer_makes_are_read_and_seen(text: bytes, value: bytes) -> None:
    data = MASKED.replace(b"echo hi > $out", text)
    assert aterm.parse(data).args[1] == value
    assert not aterm.scan(data).in_order()


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"", 0),
        (b"Derived", 6),
        (MASKED + b"\n", len(MASKED)),
        (MASKED + b'"', len(MASKED)),
        (MASKED + b'"x', len(MASKED)),
        (MASKED[:-1], len(MASKED) - 1),
        (MASKED[:60], MASKED.index(b'"-c"')),
        (MASKED.replace(b'],[],[],"x', b'],[], [],"x'), 29),
        (MASKED.replace(b'"x86_64', b'"x86\\_64'), 36),
        (MASKED.replace(b'"x86_64', b'"\xff86_64'), 32),
        (b'DrvWithVersion("xp-dyn-drv",[])', 0),
        (b"Derive([" + b"(" * 100_000, 9),
        (b'Derive([("' + b"\\" * 100_001, 9),
    ],
)
def test_broken_text_is_refused_at_the_byte_that_breaks_it(data: bytes, offset: int) -> None:
    with pytest.raises(FormatError) as refusal:
        aterm.parse(data)
    assert refusal.value.offset == offset


def test_masking_blanks_outputs_and_their_variables_and_merges_equal_inputs() -> None:
    hashes = {"/nix/store/a.drv": "ff", "/nix/store/b.drv": "ff"}
    text = aterm.render(RICH, mask_outputs=True, input_hashes=hashes)
    assert text.startswith(b'Derive([("dev","","",""),("out","","","")],[("ff",["dev","out"])],["')
    assert text.endswith(b'("dev",""),("out","")])')


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (("/p", "", ""), DerivationKind.INPUT_ADDRESSED),
        (("", "", ""), DerivationKind.DEFERRED),
        (("/p", "r:sha256", "ab"), DerivationKind.FIXED),
        (("", "r:sha256", ""), DerivationKind.FLOATING),
        (("", "r:sha256", "impure"), DerivationKind.IMPURE),
    ],
)
def test_outputs_tell_the_kind(fields: tuple[str, str, str], kind: DerivationKind) -> None:
    assert classify((DerivationOutput("out", *fields),)) is kind


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        (DerivationOutput("dev", "/p", "sha256", "ab"),),
        (DerivationOutput("out", "/p", "", "ab"),),
        (DerivationOutput("out", "/p", "sha256", ""),),
        (DerivationOutput("dev", "/p"), DerivationOutput("out", "")),
        (DerivationOutput("dev", "/p", "sha256", "ab"), DerivationOutput("out", "/p", "sha256", "ab")),
    ],
)
def test_outputs_of_no_or_of_mixed_kinds_are_refused(outputs: tuple[DerivationOutput, ...]) -> None:
    with pytest.raises(FormatError):
        classify(outputs)


def with_env(**env: bytes) -> Derivation:
    return replace(RICH, env=tuple((key.encode(), value) for key, value in env.items()))


def test_options_are_read_from_the_environment() -> None:
    assert options(RICH) == DerivationOptions()
    assert options(
        with_env(
            requiredSystemFeatures=b" kvm\n big-parallel ",
            preferLocalBuild=b"1",
            allowSubstitutes=b"",
            __noChroot=b"true",
        )
    ) == DerivationOptions(("kvm", "big-parallel"), prefer_local_build=True, allow_substitutes=False)


def test_structured_attributes_win_over_variables_of_the_same_name() -> None:
    attrs = json.dumps({"requiredSystemFeatures": ["kvm"], "allowSubstitutes": False}).encode()
    assert options(with_env(__json=attrs, preferLocalBuild=b"1")) == DerivationOptions(
        ("kvm",), allow_substitutes=False, structured_attrs=True
    )


@pytest.mark.parametrize(
    "attrs",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100000,
        b'{"a":' * 100000,
        b"1" * 10000,
        b'{"requiredSystemFeatures":"kvm"}',
        b'{"preferLocalBuild":1}',
        b'{"requiredSystemFeatures":[1]}',
    ],
    ids=range(10),
)
def test_structured_attributes_of_the_wrong_shape_are_refused(attrs: bytes) -> None:
    with pytest.raises(FormatError):
        options(with_env(__json=attrs))


@pytest.mark.parametrize("value", [b"x" * 3 * aterm.PIECE_BYTES, b'\\"\n' * aterm.PIECE_BYTES, b"\\" * 3_000_001])
def test_a_long_value_is_read_as_a_short_one_is(value: bytes) -> None:
    """In pieces, none of which ends within an escape."""
    drv = replace(aterm.parse(MASKED), env=((b"a", b"\\"), (b"big", b"." + value), (b"z", value[1:])))
    text = aterm.render(drv)
    found = aterm.scan(text)
    assert found.derivation == drv
    assert found.in_order()


def test_a_long_text_that_nix_did_not_write_is_refused_at_once() -> None:
    text = MASKED.replace(b"echo", b"\\a" * (aterm.SLOW_BYTES // 2))
    with pytest.raises(FormatError, match="not written as Nix writes them"):
        aterm.scan(text)
