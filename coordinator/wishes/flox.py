"""Flox's `manifest.lock`, version 1: packages of a catalog, of flakes, and store paths.

An entry is one package on one system. Its shape shows by its keys: `locked_url` (catalog), `locked-url` (flake),
`store_path`. `outputs_to_install` may repeat a name, be null or be absent; then every output is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

from pydantic import BaseModel, Discriminator, FailFast, Field, Tag

from coordinator.wishes.checks import check_name, check_system, check_target, chosen_outputs, read_model
from coordinator.wishes.model import (
    MAX_INSTALLABLE,
    MAX_NAME,
    MAX_NOTES,
    MAX_OUTPUTS,
    MAX_PATH,
    MAX_SYSTEMS,
    MAX_WISHES,
    SHOWN,
    Wish,
    WishedOutput,
    WishedPaths,
    WishList,
    WishListError,
    WishMark,
    WishSource,
    unique,
)
from infra.nix.store_path import StoreDir

VERSION: Final = 1
#: Prefix of a catalog's locked address, and what Nix fetches it as.
_CATALOG_URL: Final = "https://github.com/flox/nixpkgs?rev="
_CATALOG_FLAKE: Final = "github:flox/nixpkgs/"
_RELOCK: Final = "lock it again with Flox"
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Text = Annotated[str, Field(max_length=MAX_INSTALLABLE)]
_Path = Annotated[str, Field(max_length=MAX_PATH)]
_Outputs = Annotated[dict[_Name, _Path], Field(min_length=1, max_length=MAX_OUTPUTS)]
#: Real locks have many repeats.
_Installed = Annotated[tuple[_Name, ...], Field(max_length=16 * MAX_OUTPUTS)]


class _Package(BaseModel):
    install_id: _Name
    system: _Name


class _LockedPackage(_Package):
    outputs: _Outputs
    derivation: _Path
    version: _Text | None = None
    group: _Text | None = None
    unfree: bool | None = None
    broken: bool | None = None
    insecure: bool | None = None

    @property
    def marks(self) -> frozenset[WishMark]:
        said = {WishMark.UNFREE: self.unfree, WishMark.BROKEN: self.broken, WishMark.INSECURE: self.insecure}
        return frozenset(mark for mark, holds in said.items() if holds)


class _CatalogPackage(_LockedPackage):
    locked_url: _Text
    attr_path: _Text
    outputs_to_install: _Installed | None = None

    @property
    def installed(self) -> tuple[str, ...] | None:
        return self.outputs_to_install

    @property
    def installable(self) -> str:
        url = self.locked_url
        if url.startswith(_CATALOG_URL):
            url = _CATALOG_FLAKE + url.removeprefix(_CATALOG_URL)
        return f"{url}#legacyPackages.{self.system}.{self.attr_path}"


class _FlakePackage(_LockedPackage):
    locked_url: Annotated[_Text, Field(alias="locked-url")]
    attr_path: Annotated[_Text, Field(alias="locked-flake-attr-path")]
    outputs_to_install: Annotated[_Installed | None, Field(alias="outputs-to-install")] = None
    requested: Annotated[_Installed | None, Field(alias="requested-outputs-to-install")] = None

    @property
    def installed(self) -> tuple[str, ...] | None:
        return self.requested or self.outputs_to_install

    @property
    def installable(self) -> str:
        return f"{self.locked_url}#{self.attr_path}"


class _StorePathPackage(_Package):
    store_path: _Path


def _shape(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    keys = {"store_path": "path", "locked-url": "flake", "locked_url": "catalog"}
    return next((shape for key, shape in keys.items() if key in value), None)


class _Options(BaseModel):
    systems: Annotated[tuple[_Name, ...], Field(max_length=MAX_SYSTEMS)] | None = None


class _Manifest(BaseModel):
    options: _Options | None = None


class _Lock(BaseModel):
    manifest: _Manifest = _Manifest()
    packages: Annotated[
        tuple[
            Annotated[
                Annotated[_CatalogPackage, Tag("catalog")]
                | Annotated[_FlakePackage, Tag("flake")]
                | Annotated[_StorePathPackage, Tag("path")],
                Discriminator(
                    _shape,
                    custom_error_type="package",
                    custom_error_message="a package has no locked_url, locked-url or store_path",
                ),
            ],
            ...,
        ],
        Field(max_length=MAX_WISHES),
        FailFast(),
    ]


class _Version(BaseModel):
    version: Annotated[Any, Field(alias="lockfile-version")] = None


def read_flox_lock(place: str, data: bytes, store_dir: StoreDir) -> WishList:
    """Return the wishes of a `manifest.lock`, which `place` names.

    Raises:
        WishListError: It is not whole, of another version, or names what is no package, system or path.
    """
    version = read_model(_Version, place, data, _RELOCK).version
    if str(version) != str(VERSION):
        said = "no lockfile-version" if version is None else f"lockfile-version {str(version)[:SHOWN]!r}"
        raise WishListError(place, f"it has {said}, and version {VERSION} is read", "lock it again with a newer Flox")
    lock = read_model(_Lock, place, data, _RELOCK)
    wishes, notes = unique(place, _wishes(place, lock, store_dir))
    asked = (lock.manifest.options or _Options()).systems or ()
    for system in asked:
        check_system(place, "its manifest", system)
    systems = tuple(dict.fromkeys([*asked, *(wish.system for wish in wishes)]))
    if len(systems) > MAX_SYSTEMS:
        raise WishListError(place, f"it is for more than {MAX_SYSTEMS} systems", "ask for some with --systems")
    return WishList(place, WishSource.FLOX, wishes, systems, str(VERSION), notes[:MAX_NOTES])


def _wishes(place: str, lock: _Lock, store_dir: StoreDir) -> Iterator[Wish]:
    for number, package in enumerate(lock.packages):
        here = f"{place} at packages.{number}"
        name = package.install_id
        check_name(here, name)
        check_system(here, name, package.system)
        if isinstance(package, _StorePathPackage):
            wish = Wish(name, package.system, WishedPaths((WishedOutput("out", package.store_path),)))
        else:
            outputs, others = chosen_outputs(here, name, package.outputs, package.installed)
            target = WishedPaths(outputs, package.derivation, package.installable, others)
            version = package.version or ""
            wish = Wish(name, package.system, target, package.group or "", package.marks, version)
        check_target(here, name, wish.target, store_dir)
        yield wish
