"""Realisations: which path a content-addressed output became, as binary caches serve it, in both layouts.

    realisations/sha256:<hex>!<output>.doi          Nix 2.4 to 2.34: {id, outPath, signatures, dependentRealisations}
    build-trace-v2/<name of the .drv>/<output>.doi  from Nix 2.35: {outPath, signatures: [{keyName, sig}]}

The hash of the first is the derivation's masked hash modulo. A signature covers the object without its signatures (of
the first layout), or key and value (of the second), as JSON without white space and with sorted keys (binary_cache
2.9). Reading refuses what it does not know: an unknown member would be covered by a signature that does not see it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from infra.nix.errors import FormatError
from infra.nix.signing import split_signature
from infra.nix.store_path import is_valid_name, parse_base_name

#: Largest JSON text that is read: some thousand dependent realisations.
MAX_REALISATION_BYTES: Final = 1024 * 1024
#: Signatures of one realisation.
MAX_SIGNATURES: Final = 64

_SUBJECT: Final = "realisation"
_DRV_OUTPUT: Final = re.compile(r"sha256:[0-9a-f]{64}!(?P<output>[^!/]*)\Z")


class RealisationLayout(StrEnum):
    """A layout; its value is the directory of the cache that holds it."""

    BY_HASH = "realisations"
    BY_DERIVATION = "build-trace-v2"


def _fault(message: str) -> FormatError:
    return FormatError(message, offset=0, subject=_SUBJECT)


def parse_key(layout: RealisationLayout, text: str) -> str:
    """The key in `text`: what an address has between the layout's directory and `.doi`, with `!` or `%21`.

    Raises:
        FormatError: If it is not a key of this layout.
    """
    if layout is RealisationLayout.BY_HASH:
        key = text.replace("%21", "!", 1)
        match = _DRV_OUTPUT.match(key)
        if match is None or not is_valid_name(match["output"]):
            raise _fault("the key is not sha256:<64 hex digits>!<output>")
        return key
    drv, slash, output = text.partition("/")
    if not slash or not parse_base_name(drv).is_derivation or not is_valid_name(output):
        raise _fault("the key is not <derivation>.drv/<output>")
    return text


@dataclass(frozen=True, slots=True)
class Realisation:
    """One realisation.

    Attributes:
        layout: Where it stands.
        key: As `parse_key` gives it.
        out_path: Base name of the path that the output became.
        dependents: Of the layout by hash: (key, base name) of each realisation that this one was made with, sorted.
        signatures: `name:base64` each.
    """

    layout: RealisationLayout
    key: str
    out_path: str
    dependents: tuple[tuple[str, str], ...] = ()
    signatures: tuple[str, ...] = ()

    def fingerprint(self) -> bytes:
        """Text that a signature covers."""
        if self.layout is RealisationLayout.BY_HASH:
            return _json(self._by_hash())
        drv_path, _, output = self.key.partition("/")
        return _json({"key": {"drvPath": drv_path, "outputName": output}, "value": {"outPath": self.out_path}})

    def render(self) -> bytes:
        """The JSON text that a cache answers.

        Raises:
            FormatError: If a signature is malformed.
        """
        if self.layout is RealisationLayout.BY_HASH:
            return _json(self._by_hash() | {"signatures": list(self.signatures)})
        pairs = []
        for signature in self.signatures:
            name, _ = split_signature(signature)
            pairs.append({"keyName": name, "sig": signature.partition(":")[2]})
        return _json({"outPath": self.out_path, "signatures": pairs})

    def _by_hash(self) -> dict[str, Any]:
        return {"dependentRealisations": dict(self.dependents), "id": self.key, "outPath": self.out_path}


def parse(layout: RealisationLayout, key: str, body: bytes) -> Realisation:
    """The realisation with this key (see `parse_key`) whose JSON text is `body`.

    Raises:
        FormatError: If the key is malformed, or the text is not what the layout asks for, names another key, is larger
            than MAX_REALISATION_BYTES, or has more than MAX_SIGNATURES.
    """
    key = parse_key(layout, key)
    members = _object(body)
    known = {"outPath", "signatures"}
    dependents: tuple[tuple[str, str], ...] = ()
    if layout is RealisationLayout.BY_HASH:
        known |= {"id", "dependentRealisations"}
        if members.get("id") != key:
            raise _fault("its id is not the key under which it was asked for")
        dependents = _dependents(members.get("dependentRealisations", {}))
    unknown = sorted(set(members) - known)
    if unknown:
        raise _fault(f"an unknown member {unknown[0][:40]!r}")
    return Realisation(
        layout, key, _base_name(members.get("outPath")), dependents, _signatures(members.get("signatures", []))
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _object(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_REALISATION_BYTES:
        raise _fault(f"larger than {MAX_REALISATION_BYTES} bytes")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique)
    # ValueError: bad JSON, bad UTF-8, or a number with thousands of digits.
    except (ValueError, RecursionError):
        raise _fault("not a JSON object") from None
    if not isinstance(value, dict):
        raise _fault("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _fault("a member appears twice")
    return members


def _base_name(value: object) -> str:
    if not isinstance(value, str):
        raise _fault("outPath is not a text")
    return parse_base_name(value).base_name


def _dependents(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise _fault("dependentRealisations is not an object")
    return tuple(sorted((parse_key(RealisationLayout.BY_HASH, key), _base_name(path)) for key, path in value.items()))


def _signatures(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_SIGNATURES:
        raise _fault(f"signatures is not a list of at most {MAX_SIGNATURES}")
    signatures = []
    for entry in value:
        text = entry
        if isinstance(entry, dict) and set(entry) == {"keyName", "sig"}:
            text = f"{entry['keyName']}:{entry['sig']}"
        if not isinstance(text, str):
            raise _fault("a signature is neither a text nor keyName and sig")
        split_signature(text)
        signatures.append(text)
    return tuple(signatures)
