"""Locks as Flox and devbox write them, made up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from infra.nix import base32

SYSTEMS = ("x86_64-linux", "aarch64-linux", "x86_64-darwin", "aarch64-darwin")
REVISION = "4f0dadbf38ee4cf4cc38cbc232b7708fddf965bc"
#: A set of packages, and its revision as locks name it.
PACKAGE_SET = "github:example/packages"
LOCKED_SET = f"{PACKAGE_SET}/{REVISION}"


def store_path(name: str, seed: str = "", store_dir: str = "/nix/store") -> str:
    """A well-formed store path."""
    return f"{store_dir}/{base32.encode(sha256(f'{name}{seed}'.encode()).digest()[:20])}-{name}"


def catalog_entry(name: str, system: str, **changes: Any) -> dict[str, Any]:
    """A package of Flox's catalog on one system."""
    return {
        "attr_path": name,
        "broken": False,
        "derivation": store_path(f"{name}-1.0.drv", system),
        "description": "A package",
        "install_id": name,
        "license": "MIT",
        "locked_url": f"https://github.com/flox/nixpkgs?rev={REVISION}",
        "name": f"{name}-1.0",
        "pname": name,
        "rev": REVISION,
        "rev_count": 1,
        "version": "1.0",
        "outputs_to_install": ["out"],
        "outputs": {"out": store_path(f"{name}-1.0", system)},
        "system": system,
        "group": "toplevel",
        "priority": 5,
        "unfree": False,
        **changes,
    }


def flake_entry(name: str, system: str, **changes: Any) -> dict[str, Any]:
    """A package of a flake on one system."""
    return {
        "install_id": name,
        "locked-url": f"github:example/{name}/{REVISION}",
        "flake-description": None,
        "locked-flake-attr-path": f"packages.{system}.default",
        "derivation": store_path(f"{name}-2.0.drv", system),
        "outputs": {"out": store_path(f"{name}-2.0", system), "man": store_path(f"{name}-2.0-man", system)},
        "output-names": ["man", "out"],
        "outputs-to-install": ["man", "out", "out", "out"],
        "requested-outputs-to-install": None,
        "package-system": system,
        "system": system,
        "name": f"{name}-2.0",
        "version": "2.0",
        "licenses": ["MIT"],
        "broken": False,
        "unfree": True,
        "priority": 5,
        **changes,
    }


def path_entry(name: str, system: str) -> dict[str, Any]:
    """A store path on one system."""
    return {"install_id": name, "store_path": store_path(name, system), "system": system, "priority": 5}


def flox_lock(packages: Iterable[Mapping[str, Any]], *, systems: Sequence[str] = SYSTEMS, version: Any = 1) -> bytes:
    """A `manifest.lock`."""
    manifest = {"version": 1, "install": {}, "hook": {}, "profile": {}, "options": {"systems": list(systems)}}
    return json.dumps({"lockfile-version": version, "manifest": manifest, "packages": list(packages)}).encode()


def devbox_lock(names: Iterable[str], systems: Sequence[str] = SYSTEMS, version: Any = "1") -> bytes:
    """A `devbox.lock`."""
    packages: dict[str, Any] = {f"{PACKAGE_SET}/unstable": {"resolved": LOCKED_SET + "?lastModified=1"}}
    for name in names:
        packages[f"{name}@latest"] = {
            "last_modified": "2026-08-12T11:28:58Z",
            "resolved": f"{LOCKED_SET}#{name}",
            "source": "devbox-search",
            "version": "1.0",
            "systems": {
                system: {
                    "outputs": [
                        {"name": "out", "path": store_path(f"{name}-1.0", system), "default": True},
                        {"name": "dev", "path": store_path(f"{name}-1.0-dev", system)},
                    ],
                    "store_path": store_path(f"{name}-1.0", system),
                }
                for system in systems
            },
        }
    return json.dumps({"lockfile_version": version, "packages": packages}).encode()
