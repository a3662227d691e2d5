"""Derivations as Nix would write them, made without Nix: for tests of intake and for the ingest benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from infra.nix import aterm, modulo
from infra.nix.derivation import Derivation, DerivationOutput
from infra.nix.store_path import StoreDir


@dataclass(frozen=True, slots=True)
class Made:
    """A derivation and what those above it need to know of it."""

    drv: str
    data: bytes
    outputs: Mapping[str, str]
    modulo: str

    @property
    def name(self) -> str:
        """Base name of the .drv."""
        return self.drv.rpartition("/")[2]

    @property
    def step(self) -> str:
        """Key of its step."""
        return min(self.outputs.values()).rpartition("/")[2]


class Maker:
    """Makes valid derivations; inputs first, as there is no other way."""

    def __init__(self, store_dir: str = "/nix/store", system: str = "x86_64-linux") -> None:
        self.store = StoreDir(store_dir)
        self.system = system
        self.modulo: dict[str, str] = {}

    def plain(
        self,
        name: str,
        inputs: Iterable[tuple[Made, Sequence[str]] | Made] = (),
        *,
        sources: Sequence[str] = (),
        outputs: Sequence[str] = ("out",),
        builder: str = "/bin/sh",
        **env: str,
    ) -> Made:
        """An input-addressed derivation."""
        used = [(each, ("out",)) if isinstance(each, Made) else each for each in inputs]
        blank = self._derivation(name, used, sources, builder, env)
        blank = replace(
            blank,
            outputs=tuple(DerivationOutput(output, "") for output in sorted(outputs)),
            env=(*blank.env, *((output.encode(), b"") for output in outputs)),
        )
        masked = sha256(aterm.render(blank, mask_outputs=True, input_hashes=self.modulo)).hexdigest()
        paths = {output: self.store.make_output_path(masked, output, name) for output in sorted(outputs)}
        values = {**dict(blank.env), **{output.encode(): path.encode() for output, path in paths.items()}}
        whole = replace(
            blank,
            outputs=tuple(DerivationOutput(output, path) for output, path in paths.items()),
            env=tuple(values.items()),
        )
        digest = sha256(aterm.render(whole, input_hashes=self.modulo)).hexdigest()
        return self._made(name, whole, paths, digest)

    def fixed(self, name: str, content: bytes, inputs: Iterable[Made] = (), **env: str) -> Made:
        """A fixed-output derivation (flat, sha256 of `content`)."""
        digest = sha256(content).hexdigest()
        path = self.store.make_fixed_output_path(name, "", "sha256", digest)
        drv = self._derivation(name, [(each, ("out",)) for each in inputs], (), "/bin/sh", {**env, "out": path})
        output = DerivationOutput("out", path, "sha256", digest)
        return self._made(name, replace(drv, outputs=(output,)), {"out": path}, modulo.fixed_output_hash(output))

    def floating(self, name: str) -> Made:
        """A content-addressed derivation whose output path nobody knows yet."""
        drv = self._derivation(name, [], (), "/bin/sh", {"out": "/placeholder"})
        return self._made(name, replace(drv, outputs=(DerivationOutput("out", "", "r:sha256"),)), {"out": ""}, "0" * 64)

    def _derivation(
        self,
        name: str,
        used: Sequence[tuple[Made, Sequence[str]]],
        sources: Sequence[str],
        builder: str,
        env: Mapping[str, str],
    ) -> Derivation:
        pairs = {"name": name, "system": self.system, "builder": builder, **env}
        return Derivation(
            outputs=(),
            input_drvs=tuple((each.drv, tuple(sorted(names))) for each, names in used),
            input_srcs=tuple(sorted(sources)),
            system=self.system,
            builder=builder,
            args=(b"-c", b"echo > $out"),
            env=tuple((key.encode(), value.encode()) for key, value in pairs.items()),
        )

    def _made(self, name: str, drv: Derivation, paths: Mapping[str, str], digest: str) -> Made:
        data = aterm.render(drv)
        path = text_path(self.store, name, drv, data)
        self.modulo[path] = digest
        return Made(path, data, paths, digest)


def text_path(store: StoreDir, name: str, drv: Derivation, data: bytes) -> str:
    """The path at which a .drv of this content belongs."""
    references = [path for path, _ in drv.input_drvs] + list(drv.input_srcs)
    return store.make_text_path(f"{name}.drv", sha256(data).hexdigest(), references)


def relocated(store: StoreDir, made: Made, data: bytes) -> Made:
    """A derivation of other content at the path where that content belongs; its outputs stay what they were."""
    name = made.name[33:].removesuffix(".drv")
    return replace(made, drv=text_path(store, name, aterm.parse(data), data), data=data)
