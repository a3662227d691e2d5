"""Hash modulo: the hash of a derivation that ignores how its fixed inputs are fetched (infra/nix/FORMATS.md 3.3).

As an input, a fixed-output derivation is represented by its content hash and path, any other by the sha256 of its
text in which each input derivation is replaced by the hash that represents it. Its own output paths come from the
same text with the output paths, and the environment values named after outputs, blanked.

The functions that take the original bytes cut and join them instead of rendering the whole derivation again. That is
right only for bytes that Nix would have written itself; `verify` checks it first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from infra.nix.canonical import CanonicalDrv
from infra.nix.derivation import DerivationOutput

#: What represents every impure derivation as an input; all below it is deferred.
IMPURE_HASH: Final = sha256(b"impure").hexdigest()

#: The content of a string, up to the quote that ends it.
_STRING_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def fixed_output_hash(output: DerivationOutput) -> str:
    """Base16 hash that represents a fixed-output derivation: how it is fetched is not in it."""
    return sha256(f"fixed:out:{output.hash_algo}:{output.hash}:{output.path}".encode()).hexdigest()


def unmasked_hash(data: bytes, drv: CanonicalDrv, inputs_text: bytes) -> str:
    """Base16 hash that represents a derivation of another kind, as an input of others.

    Args:
        data: The canonical text of the derivation.
        drv: The derivation in it.
        inputs_text: The text between the brackets of the input derivations, with hashes for paths, sorted and merged.
    """
    return sha256(b"%b%b%b" % (data[: drv.inputs_start], inputs_text, data[drv.inputs_end :])).hexdigest()


def masked_hash(data: bytes, drv: CanonicalDrv, inputs_text: bytes, output_names: Sequence[str]) -> str:
    """Base16 hash from which the paths of input-addressed outputs are made; arguments as for `unmasked_hash`.

    Output names must have been checked to be valid store path names. Then `("name","` after the inputs can only be a
    key of the environment: quotes in strings are escaped, so its first quote begins or ends a string, and what follows
    the end of a string is no character of a name.
    """
    made = drv.outputs
    outputs = ",".join([f'("{each.name}","","{each.hash_algo}","{each.hash}")' for each in made])
    cuts: list[tuple[int, int]] = []
    for name in output_names:
        key = b'("%b","' % name.encode()
        at = data.find(key, drv.inputs_end)
        if at >= 0:
            value_start = at + len(key)
            value = _STRING_REST.match(data, value_start)
            cuts.append((value_start, value.end() if value else value_start))
    pieces = [b"Derive([%b],[%b" % (outputs.encode(), inputs_text)]
    start = drv.inputs_end
    for value_start, value_end in sorted(cuts):
        pieces.append(data[start:value_start])
        start = value_end
    pieces.append(data[start:])
    return sha256(b"".join(pieces)).hexdigest()
