"""Derivations for the native part beside Python's: `python -m tests.infra.nix.native_cases MODULE SEED COUNT`.

As a program it mutates members of a graph and compares the verdicts, so that a build with the compiler's sanitizers
meets what a stranger may send. It prints how many of the changed ones each kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import astuple
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from random import Random
from typing import Final, cast

from coordinator.intake.acceptance import accepted
from coordinator.intake.errors import DerivationRefusedError
from coordinator.stores.derivation_records import AtermCompressor, pack
from infra.nix import aterm
from infra.nix.errors import FormatError, NixError
from infra.nix.store_path import StoreDir
from infra.nix.verify_quickly import MODULE, Native, QuickVerifier
from tests.support.graphs import Made, Maker, text_path

STORE: Final = StoreDir("/nix/store")
#: What changes a text in ways that matter.
PIECES: Final = (
    *(b'"', b"\\", b"\\n", b"\\q", b"\n", b"\0", b"\1", b"\x7f", b"\xff", b",", b"(", b")", b"[", b"]", b'""', b'("'),
    *(
        b'","',
        b'"),("',
        b'")]',
        b'],["',
        b'("out","',
        b'("dev","',
        b"r:sha256",
        b"impure",
        b"/",
        b"a",
        b" ",
        b"builtin:",
    ),
    *(b'("__json","{}"),', b'("requiredSystemFeatures","b a b"),', b"/nix/store/", b"\\\\", b'\\"'),
)


def load(file: Path) -> Native:
    """The native part of a build that is not this environment's."""
    loader = ExtensionFileLoader(MODULE, str(file))
    spec = spec_from_loader(MODULE, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return cast("Native", module)


def graph() -> list[Made]:
    """Inputs first: each trait that the native part looks at."""
    make = Maker()
    source = STORE.make_text_path("builder.sh", "0" * 64)
    first = make.fixed("first", b"1", url="https://example.org/1")
    # Fetched otherwise, so it is another derivation with the same modulo.
    again = make.fixed("first", b"1", url="https://example.org/2")
    lib = make.plain("lib", [first], outputs=("dev", "lib", "out"), text='a\n\t"quoted" \\ back\r' * 3)
    twins = make.plain("twins", [first, again, (lib, ("dev", "lib"))], sources=(source,), flags="")
    plain = make.plain("plain", requiredSystemFeatures="kvm  big-parallel kvm ", preferLocalBuild="1")
    fetch = make.fixed("fetch", b"2", [plain], builder="x")
    builtin = make.plain("builtin", [plain, twins], builder="builtin:buildenv", text="\0\1\x7f\u00fc")
    top = make.plain("top", [builtin, fetch, (lib, ("lib",))], sources=(source, STORE.make_text_path("b", "1" * 64)))
    return [first, again, lib, twins, plain, fetch, builtin, top]


class Both:
    """The native part and Python's, which know the same."""

    def __init__(self, native: Native, members: Sequence[Made] = ()) -> None:
        self.quick = QuickVerifier(STORE, native)
        self.slow = QuickVerifier(STORE, None)
        for made in members:
            self.take(made.name, made.data)

    def in_python(self, name: str, data: bytes) -> tuple[object, ...] | str:
        """The fields of a `QuicklyVerified`, or what is wrong."""
        try:
            new = pack(accepted(self.slow.add(STORE.full(name), data), data), AtermCompressor())
        except (NixError, DerivationRefusedError) as error:
            return str(error)
        return new.node.step, int(new.node.kind), new.content, new.modulo, new.detail, new.inputs

    def take(self, name: str, data: bytes) -> bool:
        """Return whether the native part takes the derivation; then Python takes it too, and says the same."""
        found = self.quick.quickly(name, data)
        said = self.in_python(name, data)
        assert found is None or astuple(found) == said, (name, data)
        return found is not None


def at_its_path(name: str, data: bytes) -> str:
    """The base name at which `data` belongs, as far as it can be read: then more is looked at than its path."""
    try:
        return text_path(STORE, name[33:].removesuffix(".drv"), aterm.parse(data), data).rpartition("/")[2]
    except FormatError:
        return name


def mutated(data: bytes, chance: Random) -> bytes:
    """Changed at one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data = data[:at] + data[at + chance.choice((1, 1, 2, 40)) :]
            case 1:
                data = data[:at]
            case 2:
                other = chance.randrange(len(data) + 1)
                data = data[: min(at, other)] + data[max(at, other) :] + data[min(at, other) : max(at, other)]
            case _:
                data = data[:at] + chance.choice(PIECES) + data[at + chance.choice((0, 0, 1, 2)) :]
    return data


def main() -> None:
    """Compare the verdicts on mutated members."""
    native, chance = load(Path(sys.argv[1])), Random(int(sys.argv[2]))
    members = graph()
    both = Both(native, members)
    kept = taken = 0
    for _ in range(int(sys.argv[3])):
        made = chance.choice(members)
        data = mutated(made.data, chance)
        name = at_its_path(made.name, data) if chance.random() < 0.8 else made.name
        if chance.random() < 0.02:
            name = mutated(name.encode(), chance).decode("utf-8", "surrogateescape")
        taken += both.take(name, data)
        kept += not isinstance(both.in_python(name, data), str)
    print(taken, kept)


if __name__ == "__main__":
    main()
