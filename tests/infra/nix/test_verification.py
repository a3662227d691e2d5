"""Verifying a graph: the vector of the format page, every lie refused by the name of its member."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import aterm, errors, modulo
from infra.nix.derivation import Derivation, DerivationKind, DerivationOutput
from infra.nix.store_path import StoreDir
from infra.nix.verify import VerifiedDerivation, Verifier
from tests.benchmarks.ingest_core import make_graph, measure

NIX_STORE = StoreDir("/nix/store")
Env = tuple[tuple[bytes, bytes], ...]


def drv_path(name: str, data: bytes, drv: Derivation) -> str:
    refs = [path for path, _ in drv.input_drvs] + list(drv.input_srcs)
    return NIX_STORE.make_text_path(f"{name}.drv", sha256(data).hexdigest(), refs)


def add(verifier: Verifier, drv: Derivation, name: str = "t") -> VerifiedDerivation:
    """Hand in `drv` at its own true .drv path."""
    data = aterm.render(drv)
    return verifier.add(drv_path(name, data, drv), data)


def sealed(drv: Derivation, hashes: dict[str, str], name: str = "t") -> Derivation:
    """`drv` with true input-addressed output paths, by the plain road: rendering with masks."""
    env = {**dict(drv.env), **{output.name.encode(): b"" for output in drv.outputs}}
    masked = aterm.render(replace(drv, env=tuple(env.items())), mask_outputs=True, input_hashes=hashes)
    digest = sha256(masked).hexdigest()
    paths = {output.name: NIX_STORE.make_output_path(digest, output.name, name) for output in drv.outputs}
    env |= {output.encode(): path.encode() for output, path in paths.items()}
    return replace(
        drv,
        outputs=tuple(DerivationOutput(output, paths[output]) for output in sorted(paths)),
        env=tuple(sorted(env.items())),
    )


PLAIN = sealed(
    Derivation(
        (DerivationOutput("out", ""),),
        (),
        (),
        "x86_64-linux",
        "/bin/sh",
        (b"-c", b"echo hi > $out"),
        ((b"builder", b"/bin/sh"), (b"name", b"t"), (b"out", b""), (b"system", b"x86_64-linux")),
    ),
    {},
)
DIGEST = sha256(b"hello\n").hexdigest()
FIXED_PATH = "/nix/store/1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f"
FIXED = replace(
    PLAIN,
    outputs=(DerivationOutput("out", FIXED_PATH, "sha256", DIGEST),),
    env=((b"name", b"f"), (b"out", FIXED_PATH.encode())),
)


def test_the_vector_of_the_format_page_verifies() -> None:
    verified = add(Verifier(NIX_STORE), PLAIN)
    assert verified.drv_path == "/nix/store/hb09lmdvs22v5ianga0vgpi9k446q3kw-t.drv"
    assert dict(verified.outputs) == {"out": "/nix/store/2jmiqxxd2z4ypk8am71rc6kffqzgma57-t"}
    assert verified.masked_hash == "dae5410a258feb7cd81d2b9c2f76bd335c8ec80f87deffc6c54f6c9f0398e318"
    assert (verified.name, verified.kind, verified.inputs) == ("t", DerivationKind.INPUT_ADDRESSED, ())


def consumer(verifier: Verifier, inputs: dict[str, tuple[str, ...]], **env: bytes) -> Derivation:
    hashes = {path: known.hash_modulo for path in inputs if (known := verifier.known(path))}
    drv = replace(PLAIN, input_drvs=tuple(sorted(inputs.items())), env=tuple((k.encode(), v) for k, v in env.items()))
    return sealed(drv, hashes)


def test_how_a_fixed_output_is_fetched_does_not_change_what_is_built_from_it() -> None:
    verifier = Verifier(NIX_STORE)
    fetchers = [add(verifier, replace(FIXED, args=(url,)), "f") for url in (b"https://a", b"https://b")]
    assert fetchers[0].drv_path != fetchers[1].drv_path
    assert fetchers[0].kind is DerivationKind.FIXED
    built = [add(verifier, consumer(verifier, {fetcher.drv_path: ("out",)})) for fetcher in fetchers]
    both = add(verifier, consumer(verifier, {fetcher.drv_path: ("out",) for fetcher in fetchers}))
    assert built[0].drv_path != built[1].drv_path
    assert built[0].outputs == built[1].outputs == both.outputs
    assert built[0].inputs == (FIXED_PATH,)


def test_inputs_are_the_sources_and_the_outputs_used() -> None:
    verifier = Verifier(NIX_STORE)
    many = replace(PLAIN, outputs=tuple(DerivationOutput(name, "") for name in ("dev", "lib", "out")))
    first = add(verifier, sealed(many, {}))
    source = NIX_STORE.make_text_path("s", DIGEST)
    drv = replace(consumer(verifier, {first.drv_path: ("dev", "out")}), input_srcs=(source,))
    second = add(verifier, sealed(drv, {first.drv_path: first.hash_modulo}))
    assert second.inputs == tuple(sorted([source, first.outputs["dev"], first.outputs["out"]]))


def test_what_another_verifier_knew_is_enough_to_go_on() -> None:
    first, second = Verifier(NIX_STORE), Verifier(NIX_STORE)
    below = add(first, PLAIN)
    above = consumer(first, {below.drv_path: ("out",)})
    with pytest.raises(errors.UnknownInputError):
        add(second, above)
    second.preload(below.drv_path, below.known)
    assert add(second, above) == add(first, above)


def test_a_value_that_only_looks_like_the_output_variable_is_not_masked() -> None:
    trap = b'("out","x") \\("out","'
    drv = sealed(replace(PLAIN, args=(b"(", b"out", trap), env=((b"(", b"out"), (b"a(", trap), (b"out", b""))), {})
    assert add(Verifier(NIX_STORE), drv).outputs["out"] == drv.outputs[0].path


FLOATING = replace(PLAIN, outputs=(DerivationOutput("out", "", "r:sha256", ""),), env=((b"out", b"/placeholder"),))
IMPURE = replace(FLOATING, outputs=(DerivationOutput("out", "", "r:sha256", "impure"),))


@pytest.mark.parametrize(("drv", "kind"), [(FLOATING, DerivationKind.FLOATING), (IMPURE, DerivationKind.IMPURE)])
def test_outputs_below_a_path_that_is_not_known_are_deferred(drv: Derivation, kind: DerivationKind) -> None:
    verifier = Verifier(NIX_STORE)
    below = add(verifier, drv)
    assert (below.kind, dict(below.outputs)) == (kind, {"out": ""})
    above = replace(
        PLAIN,
        outputs=(DerivationOutput("out", ""),),
        env=((b"out", b""),),
        input_drvs=((below.drv_path, ("out",)),),
    )
    deferred = add(verifier, above)
    assert (deferred.kind, deferred.inputs) == (DerivationKind.DEFERRED, ())
    assert add(verifier, replace(above, input_drvs=((deferred.drv_path, ("out",)),))).kind is DerivationKind.DEFERRED
    with pytest.raises(errors.OutputPathError):
        add(verifier, sealed(above, {below.drv_path: below.hash_modulo}))


ELSEWHERE = "/nix/store/vylz2d5mzcgx8z67q4xi43zhzf5zrld5-t"


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (
            replace(PLAIN, outputs=(DerivationOutput("out", ELSEWHERE),), env=((b"out", ELSEWHERE.encode()),)),
            errors.OutputPathError,
        ),
        (replace(PLAIN, args=(b"-c", b"evil")), errors.OutputPathError),
        (replace(PLAIN, env=((b"out", b""),)), errors.OutputPathError),
        (replace(PLAIN, env=()), errors.OutputPathError),
        (replace(PLAIN, outputs=(DerivationOutput("out", ""),), env=((b"out", b""),)), errors.OutputPathError),
        (replace(FIXED, outputs=(replace(FIXED.outputs[0], hash="0" * 64),)), errors.OutputPathError),
        (replace(FIXED, outputs=(replace(FIXED.outputs[0], hash_algo="r:sha256"),)), errors.OutputPathError),
        (replace(FIXED, outputs=(replace(FIXED.outputs[0], hash_algo="git:sha1"),)), errors.UnsupportedDerivationError),
        (replace(FIXED, outputs=(replace(FIXED.outputs[0], hash="0"),)), errors.UnsupportedDerivationError),
        (replace(FIXED, outputs=(replace(FIXED.outputs[0], hash=""),)), errors.UnsupportedDerivationError),
        (replace(PLAIN, outputs=()), errors.UnsupportedDerivationError),
        (replace(PLAIN, outputs=(DerivationOutput("o/ut", ELSEWHERE),)), errors.UnsupportedDerivationError),
        (replace(PLAIN, input_drvs=((f"{ELSEWHERE}.drv", ("out",)),)), errors.UnknownInputError),
        (replace(PLAIN, input_srcs=("/etc/passwd",)), errors.VerificationError),
    ],
)
def test_a_lie_is_refused_by_the_name_of_its_member(lie: Derivation, error: type[errors.VerificationError]) -> None:
    name = "f" if lie.outputs and lie.outputs[0].hash_algo else "t"
    with pytest.raises(error) as refusal:
        add(Verifier(NIX_STORE), lie, name)
    assert refusal.value.member == drv_path(name, aterm.render(lie), lie)
    assert refusal.value.member in str(refusal.value)


def test_a_file_at_another_path_than_its_own_is_refused() -> None:
    data = aterm.render(PLAIN)
    with pytest.raises(errors.DerivationPathError):
        Verifier(NIX_STORE).add(f"{ELSEWHERE}.drv", data)
    with pytest.raises(errors.FormatError, match=r"does not end with \.drv"):
        Verifier(NIX_STORE).add(ELSEWHERE, data)


def test_an_output_that_the_input_lacks_is_refused() -> None:
    verifier = Verifier(NIX_STORE)
    below = add(verifier, PLAIN)
    for names, error in ((("dev",), errors.UnknownOutputError), ((), errors.NotCanonicalError)):
        with pytest.raises(error):
            add(verifier, consumer(verifier, {below.drv_path: names}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'("name","t"),("out"', b'("out","x"),("out"'),
        (b'("builder","/bin/sh"),("name","t")', b'("name","t"),("builder","/bin/sh")'),
        (b"echo hi", b"echo\nhi"),
        (b"echo hi", b"\\echo hi"),
    ],
)
def test_a_derivation_that_nix_would_have_written_otherwise_is_refused(before: bytes, after: bytes) -> None:
    data = aterm.render(PLAIN)
    assert before in data
    data = data.replace(before, after)
    with pytest.raises(errors.NotCanonicalError):
        Verifier(NIX_STORE).add(drv_path("t", data, PLAIN), data)


def test_bytes_that_are_no_derivation_are_refused_with_member_and_offset() -> None:
    with pytest.raises(errors.FormatError, match=rf"derivation {ELSEWHERE}.drv: .*at byte 6\)"):
        Verifier(NIX_STORE).add(f"{ELSEWHERE}.drv", b"Derive{")


GRAPH = make_graph(60, seed=1)


def test_a_graph_like_a_package_set_verifies_and_byte_surgery_equals_rendering() -> None:
    verifier = Verifier(NIX_STORE)
    hashes: dict[str, str] = {}
    for path, data in GRAPH:
        verified = verifier.add(path, data)
        hashes[path] = verified.hash_modulo
        drv = aterm.parse(data)
        if verified.kind is DerivationKind.FIXED:
            assert verified.hash_modulo == modulo.fixed_output_hash(drv.outputs[0])
        else:
            assert verified.hash_modulo == sha256(aterm.render(drv, input_hashes=hashes)).hexdigest()
            masked = aterm.render(drv, mask_outputs=True, input_hashes=hashes)
            assert verified.masked_hash == sha256(masked).hexdigest()


def test_the_stages_of_intake_can_be_measured() -> None:
    ticks = iter(range(100))
    assert set(measure(GRAPH[:5], lambda: float(next(ticks)))) >= {"parse", "verify"}


def verifier_below_the_last() -> Verifier:
    verifier = Verifier(NIX_STORE)
    for path, data in GRAPH[:-1]:
        verifier.add(path, data)
    return verifier


BELOW = verifier_below_the_last()


@given(st.data())
def test_any_change_to_a_file_is_refused_with_a_typed_error(data: st.DataObject) -> None:
    path, original = GRAPH[-1]
    at = data.draw(st.integers(0, len(original)))
    changed = original[:at] + data.draw(st.binary(max_size=3)) + original[at + data.draw(st.integers(0, 3)) :]
    honest_path = data.draw(st.booleans())
    if changed == original:
        return
    if honest_path:
        try:
            path = drv_path("p", changed, aterm.parse(changed))
        except errors.FormatError:
            return
    with pytest.raises(errors.NixError):
        BELOW.add(path, changed)
