"""Variants of a derivation: the same build under other output paths, so that a farm that has its outputs builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Final

from infra.nix import aterm
from infra.nix.derivation import Derivation
from infra.nix.store_path import StoreDir, drv_name_of

_DRV_SUFFIX: Final = ".drv"


def variant_of(
    drv_path: str, derivation: Derivation, input_hashes: Mapping[str, str], store_dir: StoreDir, value: bytes
) -> tuple[str, bytes]:
    """Return path and text of an input-addressed derivation that differs by one variable of its environment.

    Args:
        drv_path: Full path of the derivation.
        derivation: What it holds.
        input_hashes: Hash modulo of each of its input derivations, by full path.
        store_dir: The store directory that both lie in.
        value: What the variable holds; each value is a build of its own.
    """
    name = drv_name_of(drv_path)
    env = {**dict(derivation.env), b"DROVER_VARIANT": value}
    changed = replace(derivation, env=tuple(sorted(env.items())))
    masked = sha256(aterm.render(changed, mask_outputs=True, input_hashes=input_hashes)).hexdigest()
    paths = {each.name: store_dir.make_output_path(masked, each.name, name) for each in derivation.outputs}
    env.update((output.encode(), path.encode()) for output, path in paths.items())
    outputs = tuple(replace(each, path=paths[each.name]) for each in derivation.outputs)
    data = aterm.render(replace(changed, outputs=outputs, env=tuple(sorted(env.items()))))
    references = [*(path for path, _ in derivation.input_drvs), *derivation.input_srcs]
    return store_dir.make_text_path(f"{name}{_DRV_SUFFIX}", sha256(data).hexdigest(), references), data
