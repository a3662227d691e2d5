"""Readers of wish lists: what real forms say, and one sentence for whatever is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coordinator.wishes import model
from coordinator.wishes.document import WishListDocument, document_of
from coordinator.wishes.model import (
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishListError,
    WishMark,
    WishSource,
    joined,
)
from coordinator.wishes.reading import WishReading, named_wishes, read_wishes, source_by_content, source_by_name
from infra.nix.store_path import StoreDir
from tests.support.wishes import (
    LOCKED_SET,
    REVISION,
    SYSTEMS,
    catalog_entry,
    devbox_lock,
    flake_entry,
    flox_lock,
    path_entry,
    store_path,
)

STORE = StoreDir("/nix/store")
LINUX, ARM, _, MAC = SYSTEMS
HERE = WishReading(STORE, LINUX)
FLOX = flox_lock(
    [
        catalog_entry("ripgrep", LINUX),
        catalog_entry("ripgrep", MAC, outputs_to_install=None),
        flake_entry("tool", LINUX),
        path_entry("notes", ARM),
    ]
)
FLAKE_LOCK = json.dumps(
    {
        "nodes": {
            "nixpkgs": {"locked": {"type": "github", "rev": REVISION}},
            "root": {"inputs": {"nixpkgs": "nixpkgs"}},
        },
        "root": "root",
        "version": 7,
    }
).encode()
JOB = {
    "attr": "hello",
    "attrPath": ["hello"],
    "drvPath": store_path("hello-2.drv"),
    "name": "hello-2",
    "outputs": {"out": store_path("hello-2")},
    "system": ARM,
    "meta": {"broken": False, "unfree": True},
}
LINES = "\n".join([json.dumps(JOB), json.dumps({"attr": "bad", "error": "no"}), ""]).encode()
PATHS = "\n".join(["# mine", "", store_path("a-1"), store_path("b-2.drv") + "!out,dev", store_path("a-1")]).encode()
EVERY = {
    "manifest.lock": FLOX,
    "devbox.lock": devbox_lock(["jq"]),
    "flake.lock": FLAKE_LOCK,
    "paths": PATHS,
    "jobs": LINES,
}


def read(place: str, data: bytes, *systems: str) -> WishList:
    """Read for a machine with x86_64-linux."""
    return read_wishes(place, data, WishReading(STORE, LINUX, systems))


def test_a_flox_lock_has_a_wish_for_each_package_and_system_in_its_three_shapes() -> None:
    found = read("manifest.lock", FLOX)
    assert found.systems == SYSTEMS
    assert found.names == ("ripgrep", "tool", "notes")
    first, _, tool, notes = found.wishes
    out = WishedOutput("out", store_path("ripgrep-1.0", LINUX))
    installable = f"github:flox/nixpkgs/{REVISION}#legacyPackages.{LINUX}.ripgrep"
    target = WishedPaths((out,), store_path("ripgrep-1.0.drv", LINUX), installable)
    assert first == Wish("ripgrep", LINUX, target, "toplevel", version="1.0")
    assert isinstance(tool.target, WishedPaths)
    # Repeats of the real lock are gone, its order is kept.
    assert [each.name for each in tool.target.outputs] == ["man", "out"]
    assert tool.marks == {WishMark.UNFREE}
    assert notes.target == WishedPaths((WishedOutput("out", store_path("notes", ARM)),))
    assert read("manifest.lock", FLOX, MAC).names == ("ripgrep",)


def test_a_devbox_lock_has_paths_and_for_systems_that_it_lacks_an_attribute() -> None:
    found = read("devbox.lock", devbox_lock(["jq"], [LINUX]), LINUX, MAC)
    here, there = found.wishes
    assert isinstance(here.target, WishedPaths)
    assert (here.target.paths, [each.name for each in here.target.others]) == ((store_path("jq-1.0", LINUX),), ["dev"])
    assert there.target == WishedAttribute(LOCKED_SET, f"legacyPackages.{MAC}.jq")


def test_lines_hold_paths_derivations_and_jobs() -> None:
    listed = read("paths", PATHS, MAC)
    first, second = listed.wishes
    assert (first.name, first.system, second.target) == (
        "a-1", MAC, WishedDerivation(store_path("b-2.drv"), ("out", "dev"))
    )  # fmt: skip
    assert listed.notes == ("paths at line 5: " + store_path("a-1")[11:] + " is there twice; it counts once",)
    jobs = read("jobs", LINES)
    (job,) = jobs.wishes
    assert job == Wish(
        "hello",
        ARM,
        WishedPaths((WishedOutput("out", store_path("hello-2")),), store_path("hello-2.drv")),
        marks=frozenset({WishMark.UNFREE}),
    )
    assert jobs.notes == ("jobs at line 2: bad could not be evaluated",)
    several = "\n".join([store_path("a-1"), store_path("a-1", "other")])
    assert len(read("paths", several.encode()).names) == 2
    drv = store_path("b-2.drv")
    outputs = read("drvs", "\n".join(f"{drv}^{name}" for name in ("out", "dev", "man", "dev")).encode())
    short = f"b-2 ({drv[11:19]})"
    assert [(wish.name, wish.target) for wish in outputs.wishes] == [
        ("b-2", WishedDerivation(drv, ("out",))),
        (short, WishedDerivation(drv, ("dev",))),
        (f"{short}^man", WishedDerivation(drv, ("man",))),
    ]


def test_outputs_of_flakes_and_configurations_are_attributes() -> None:
    both = WishReading(STORE, LINUX, (LINUX, MAC))

    def attributes(name: str) -> list[tuple[str, str]]:
        source = source_by_name(name)
        assert source is not None
        found = named_wishes(name, both, source=source)
        return [
            (wish.system, wish.target.installable) for wish in found.wishes if isinstance(wish.target, WishedAttribute)
        ]

    assert attributes(".#tool") == [(each, f".#packages.{each}.tool") for each in (LINUX, MAC)]
    assert attributes("x#devShells.default") == [(each, f"x#devShells.{each}.default") for each in (LINUX, MAC)]
    assert attributes(f".#packages.{MAC}.a") == [(MAC, f".#packages.{MAC}.a")]
    assert attributes(".#nixosConfigurations.box") == [
        (LINUX, ".#nixosConfigurations.box.config.system.build.toplevel")
    ]
    assert attributes(".#darwinConfigurations.mac") == [(MAC, ".#darwinConfigurations.mac.system")]
    assert attributes(".#darwinConfigurations.ecosystem") == [(MAC, ".#darwinConfigurations.ecosystem.system")]
    for exact in ("nixosConfigurations.box.config.system.build.toplevel", "nixosConfigurations.box.config.build.vm"):
        assert attributes(f".#{exact}") == [(LINUX, f".#{exact}")]
    assert attributes(".#homeConfigurations.me") == [(LINUX, ".#homeConfigurations.me.activationPackage")]
    assert [wish.target for wish in read("sub/flake.lock", FLAKE_LOCK).wishes] == [
        WishedAttribute("./sub", f"packages.{LINUX}"),
        WishedAttribute("./sub", f"devShells.{LINUX}"),
    ]


def through_json(wishes: WishList) -> WishList:
    """Return a list as a farm reads it from a request."""
    return WishListDocument.model_validate_json(document_of(wishes).model_dump_json()).wish_list(STORE)


@pytest.mark.parametrize(("place", "data"), EVERY.items())
def test_every_form_is_found_by_its_content_and_survives_its_json_form(place: str, data: bytes) -> None:
    found = read("elsewhere", data)
    assert source_by_content("elsewhere", data) is found.source
    again = through_json(found)
    assert again == found
    assert again.digest == found.digest
    assert read(place, data).wishes == found.wishes or found.source is WishSource.FLAKE_LOCK


def test_paths_without_any_path_are_refused() -> None:
    found = read("manifest.lock", FLOX)
    (first, *_) = found.wishes
    assert isinstance(first.target, WishedPaths)
    empty = replace(found, wishes=(replace(first, target=replace(first.target, outputs=())),))
    with pytest.raises(ValidationError, match=r"wishes.0.target.paths.outputs\n +Tuple should have at least 1 item"):
        through_json(empty)


def test_a_digest_is_that_of_the_wishes_and_not_of_the_file() -> None:
    lock = json.loads(FLOX)
    again = json.dumps({**lock, "packages": lock["packages"][::-1]}, indent=2).encode()
    assert read("manifest.lock", again).digest == read("manifest.lock", FLOX).digest
    lock["packages"][0]["outputs"]["out"] = store_path("ripgrep-1.0", "tampered")
    assert read("manifest.lock", json.dumps(lock).encode()).digest != read("manifest.lock", FLOX).digest


def changed(**changes: Any) -> bytes:
    """Return a lock of one package that was changed."""
    return flox_lock([{**catalog_entry("a", LINUX), **changes}])


@pytest.mark.parametrize(
    ("place", "data", "sentence"),
    [
        ("manifest.lock", FLOX[:-40], "manifest.lock: it is not whole or no JSON"),
        ("manifest.lock", b"", "manifest.lock: it is not whole or no JSON"),
        ("manifest.lock", flox_lock([], version=2), "manifest.lock: it has lockfile-version '2', and version 1 is"),
        ("manifest.lock", b"{}", "manifest.lock: it has no lockfile-version, and version 1 is read; lock it again"),
        ("manifest.lock", b'{"lockfile-version": true}', "manifest.lock: it has lockfile-version 'True'"),
        ("manifest.lock", b'{"lockfile-version": 1}', "manifest.lock at packages: Field required; lock it again"),
        ("manifest.lock", flox_lock([{"install_id": "a"}]), "manifest.lock at packages.0: a package has no locked_url"),
        (
            "manifest.lock",
            flox_lock([catalog_entry("a", LINUX), catalog_entry("a", LINUX, version="2")]),
            f"manifest.lock: a is there twice for {LINUX}, and differently; lock it again",
        ),
        ("manifest.lock", changed(system="x86_64-plan10"), "a is for 'x86_64-plan10', which is no system; correct"),
        (
            "manifest.lock",
            changed(outputs={"out": store_path("a", store_dir="/gnu/store")}),
            "not in the store directory /nix/store; this farm has paths of /nix/store alone",
        ),
        ("manifest.lock", changed(outputs={"out": "/nix/store/short"}), "not 32 hash characters, a dash and a name"),
        ("manifest.lock", changed(derivation=store_path("a")), "which is no .drv; make it again"),
        ("manifest.lock", changed(outputs_to_install=["man"]), "a has no output 'man' that is to be installed"),
        ("devbox.lock", devbox_lock(["a"], version="2"), "devbox.lock: it has lockfile_version '2', and version 1"),
        ("devbox.lock", devbox_lock(["a"], ["mips"]), "a@latest is for 'mips', which is no system"),
        ("devbox.lock", devbox_lock(["a"]).replace(b'"dev"', b'"\\u001f"'), r"a@latest has '\x1f'; use up to 512"),
        ("flake.lock", FLAKE_LOCK.replace(b"7", b"99"), "flake.lock: it has version 99, and 7 is read"),
        ("flake.lock", FLAKE_LOCK.replace(b'"root": "root"', b'"root": "r"'), "its root 'r' is not among its nodes"),
        ("paths", b"/nix/store/nothing", "paths at line 1: '/nix/store/nothing' is no store path"),
        ("paths", store_path("a").encode() + b"!out", "has outputs and is no .drv; give full store paths"),
        ("jobs", b'{"attr": 3}', "jobs at line 1 at attr: it is no line of nix-eval-jobs"),
        ("what", b"hello", "what: its form is not known; it begins with 'hello'; say it with --kind"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_sentence_with_its_place_and_a_way_on(place: str, data: bytes, sentence: str) -> None:
    with pytest.raises(WishListError) as caught:
        read(place, data)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_more_bytes_than_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WishListError, match="more than 50 MB, the limit; divide it"):
        read("manifest.lock", b" " * (model.MAX_FILE_BYTES + 1))


def test_paths_for_two_systems_at_once_are_refused() -> None:
    with pytest.raises(WishListError, match="do not say which system"):
        read("paths", store_path("a-1").encode(), LINUX, MAC)


def test_lists_that_agree_are_joined_and_lists_that_disagree_are_refused() -> None:
    more = flox_lock([catalog_entry("ripgrep", LINUX), catalog_entry("jq", LINUX)])
    both = joined([read("a.lock", FLOX), read("b.lock", more)])
    assert both.names == ("ripgrep", "tool", "notes", "jq")
    other = flox_lock([catalog_entry("ripgrep", LINUX, outputs={"out": store_path("ripgrep-2", LINUX)})])
    with pytest.raises(WishListError, match=f"b.lock: it and a.lock disagree about ripgrep on {LINUX}: /nix/store/"):
        joined([read("a.lock", FLOX), read("b.lock", other)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*SYSTEMS, "out"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, each in inner for place in places(each, (*above, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A source, of which one value is another or is gone."""
    name = draw(st.sampled_from(sorted(EVERY)))
    data = EVERY[name]
    if name in {"jobs", "paths"}:
        lines = data.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(st.binary(max_size=60) | st.just(lines[at][: draw(st.integers(0, len(lines[at])))]))
        return name, b"\n".join(lines)
    value = json.loads(data)
    *way, last = draw(st.sampled_from(places(value)[1:]))
    holder = value
    for step in way:
        holder = holder[step]
    if draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = draw(JSON)
    return name, json.dumps(value).encode()


def reads_or_refuses(read_it: Callable[[], WishList]) -> None:
    """Read: what comes is whole, or one sentence."""
    try:
        found = read_it()
    except WishListError:
        return
    assert len({wish.key for wish in found.wishes}) == len(found.wishes)
    assert through_json(found) == found


@given(mutated())
@settings(max_examples=150, deadline=None)
def test_no_mutation_of_a_source_gives_anything_but_wishes_or_a_sentence(source: tuple[str, bytes]) -> None:
    reads_or_refuses(lambda: read(*source))


@given(st.binary(max_size=200), st.sampled_from(sorted(EVERY)))
@example(b"[" * 100_000, "manifest.lock")
@settings(max_examples=80, deadline=None)
def test_no_bytes_give_anything_but_wishes_or_a_sentence(data: bytes, name: str) -> None:
    reads_or_refuses(lambda: read(name, data))


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_no_name_of_a_flake_gives_anything_but_wishes_or_a_sentence(text: str) -> None:
    reads_or_refuses(lambda: named_wishes(f"{text}#{text}", HERE, source=WishSource.FLAKE))
