"""Words of the proxy: its settings, and a path as an upstream has it and as the proxy serves it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from infra.nix import narinfo
from infra.nix.base32 import SHA256_PATTERN
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import HASH_PART_PATTERN, StoreDir
from infra.objects.compression import SUFFIXES

#: File name of a NAR as the proxy serves it: hash part of the path, hash of the file (of the NAR where the narinfo has
#: none). It says all that is needed to find the NAR again after a restart, because Nix remembers it for a month.
NAR_NAME: Final = rf"{HASH_PART_PATTERN}-{SHA256_PATTERN}[.]nar([.](zst|xz|bz2))?"
#: Largest narinfo that is kept: some with thousands of references have a megabyte.
MAX_NARINFO_BYTES: Final = 4 * 1024 * 1024
_URL_LINE: Final = re.compile(rb"^URL: .*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Settings of one proxy."""

    upstreams: tuple[str, ...]
    directory: Path
    max_bytes: int
    listen: str = "127.0.0.1"
    port: int = 7879
    #: "" for none.
    netrc: str = ""
    store_dir: str = "/nix/store"


@dataclass(frozen=True, slots=True)
class KnownPath:
    """A path that an upstream has.

    Attributes:
        info: What the upstream says of it.
        upstream: Address of that upstream.
        text: The narinfo as the proxy serves it: with signatures and everything else as they came, but for the URL.
        nar_name: File name of its NAR here.
        references: Hash parts of what it refers to, without itself.
    """

    info: NarInfo
    upstream: str
    text: bytes
    nar_name: str
    references: tuple[str, ...]

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return self.info.hash_part

    def at(self, url: str) -> KnownPath:
        """Return the same with the address of its NAR at the upstream."""
        return replace(self, info=replace(self.info, stored=replace(self.info.stored, url=url)))


def known_path(text: bytes, upstream: str, store_dir: StoreDir) -> KnownPath | None:
    """Return what a narinfo says; None where it is none, or its NAR could not be verified here."""
    if len(text) > MAX_NARINFO_BYTES:
        return None
    try:
        info = narinfo.parse(text, store_dir)
    except FormatError:
        return None
    if info.stored.compression not in SUFFIXES:
        return None
    digest = (info.stored.file_hash or info.path.nar_hash).removeprefix("sha256:")
    name = f"{info.hash_part}-{digest}.nar{SUFFIXES[info.stored.compression]}"
    served = _URL_LINE.sub(f"URL: nar/{name}".encode(), text, count=1)
    own = info.base_name
    references = tuple(each[:32] for each in info.path.references if each != own)
    return KnownPath(info, upstream, served, name, references)
