"""Path info: the metadata of a store path and its NAR, what Nix calls ValidPathInfo (infra/nix/FORMATS.md 6.3).

A narinfo, a daemon's answer, an upload's claim and a builder's output all carry it, in forms of their own. References
and deriver are base names here, as in a narinfo; the daemon's protocol has them as full paths.
"""

from __future__ import annotations

from infra.nix.store_path import base_name_of, hash_part_of
from infra.records import record


@record(frozen=True, slots=True)
class PathInfo:
    """The metadata of one store path.

    Attributes:
        store_path: Full store path.
        nar_hash: `sha256:<nix32>` of the NAR.
        nar_size: Bytes of the NAR.
        references: Base names, sorted, self included if it refers to itself.
        deriver: Base name of the .drv, or "".
        sigs: `name:base64` each.
        ca: Content address such as `fixed:r:sha256:...`, or "".
    """

    store_path: str
    nar_hash: str
    nar_size: int
    references: tuple[str, ...] = ()
    deriver: str = ""
    sigs: tuple[str, ...] = ()
    ca: str = ""

    @property
    def base_name(self) -> str:
        """File name of the store path."""
        return base_name_of(self.store_path)

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return hash_part_of(self.store_path)

    @property
    def reference_paths(self) -> tuple[str, ...]:
        """The references as full paths."""
        return tuple(self.full(reference) for reference in self.references)

    @property
    def deriver_path(self) -> str:
        """Full path of the .drv, or ""."""
        return self.full(self.deriver) if self.deriver else ""

    def fingerprint(self) -> bytes:
        """Text that a signature covers: `1;<path>;<nar hash>;<nar size>;<full references, comma separated>`."""
        references = ",".join(sorted(self.reference_paths))
        return f"1;{self.store_path};{self.nar_hash};{self.nar_size};{references}".encode()

    def full(self, base_name: str) -> str:
        """The full path of `base_name` in this path's store directory."""
        return self.store_path[: self.store_path.rfind("/") + 1] + base_name
