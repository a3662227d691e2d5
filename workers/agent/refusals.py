"""Refusals of Nix: a table of known messages, and a signature for each unknown one.

Nix ends many builds with one status or with an error instead of a result, whether the recipe or the machine is at
fault; only its words distinguish them. `recognise` finds the words that can only be about the recipe. For all else
`signature` says whether two refusals are the same one, so that the scheduler can believe a second worker that says the
same.

A builder cannot choose these words for others: whatever it makes Nix say ends its own recipe and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

#: Characters of a refusal that are looked at; Nix's own sentence stands first.
LOOKED_AT = 4000


@dataclass(frozen=True, slots=True)
class RecipeRefusal:
    """One sentence of Nix's, by words that every version has in common."""

    #: All of these stand in the message, in this order.
    words: tuple[str, ...]
    reason: Literal["permanent", "output_rejected"]
    #: The versions in whose sources the sentence was read.
    seen_in: str = "2.8, 2.26, 2.34"


#: The refusals that are the recipe's own fault. ARCHITECTURE names the test that provokes them.
REFUSALS = (
    # What an output is.
    RecipeRefusal(("has an unsupported type",), "output_rejected"),
    RecipeRefusal(("has unsupported type",), "output_rejected", "2.8"),
    RecipeRefusal(("cycle detected in build of", "in the references of output"), "output_rejected"),
    RecipeRefusal(("cycle detected in the references of",), "output_rejected"),
    RecipeRefusal(("failed to produce output path for output",), "output_rejected"),
    RecipeRefusal(("is not allowed to refer to the following paths",), "output_rejected"),
    RecipeRefusal(("is not allowed to refer to other store paths",), "output_rejected", "2.26, 2.34"),
    RecipeRefusal(("path '", "is too large at", "limit is"), "output_rejected"),
    RecipeRefusal(("should be a non-executable regular file",), "output_rejected"),
    RecipeRefusal(("suspicious ownership or permission on", "rejecting this build output"), "output_rejected"),
    RecipeRefusal(("NAR contains invalid file name",), "output_rejected", "2.8, 2.26, 2.34"),
    # What a recipe asks for.
    RecipeRefusal(("has '__noChroot' set, but that's not allowed",), "permanent"),
    RecipeRefusal(("requested impure path", "not in allowed-impure-host-deps"), "permanent"),
    RecipeRefusal(("cannot export references of path", "not in the input closure"), "permanent"),
    RecipeRefusal(("odd number of tokens in 'exportReferencesGraph'",), "permanent"),
    RecipeRefusal(("invalid file name", "in 'exportReferencesGraph'"), "permanent"),
    RecipeRefusal(("'exportReferencesGraph' contains a non-store path",), "permanent"),
    RecipeRefusal(("while parsing derivation '", "error: "), "permanent", "2.34"),
    RecipeRefusal(("contains an illegal reference specifier",), "permanent", "2.8, 2.26"),
    RecipeRefusal(("output check for", "this is not a valid output of this derivation"), "permanent", "2.34"),
    RecipeRefusal(("cannot process __json attribute of",), "permanent", "2.8, 2.26"),
    RecipeRefusal(("Cannot have an environment variable named '__json'",), "permanent", "2.34"),
    RecipeRefusal(("[json.exception.",), "permanent"),
    RecipeRefusal(("unsupported builtin builder",), "permanent"),
    RecipeRefusal(("unknown hash algorithm",), "permanent"),
)

#: What differs between two tellings of one refusal, in the order in which it is taken out.
_TERMINAL = re.compile(r"\x1b\[[0-9;]*m")
_HASH = re.compile(r"[0-9a-z]{32,64}")
#: Directories: a build's, a worker's and the store's differ between machines. The last name of a path counts.
_PLACE = re.compile(r"/(?:[\w.+@%~=-]+/)+")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_SPACE = re.compile(r"\s+")


def recognise(message: str) -> Literal["permanent", "output_rejected"] | None:
    """Return why a lease ends whose build Nix refused so; None where its words may be about the machine."""
    text = _TERMINAL.sub("", message[:LOOKED_AT])
    for refusal in REFUSALS:
        at = 0
        for words in refusal.words:
            at = text.find(words, at)
            if at < 0:
                break
        else:
            return refusal.reason
    return None


def signature(message: str) -> str:
    """Return what two refusals have in common exactly if they are the same one, 16 characters; empty for no words.

    Hashes, numbers (of processes, users, lines) and directories do not count.
    """
    text = _TERMINAL.sub("", message[:LOOKED_AT])
    for pattern, instead in ((_HASH, "H"), (_PLACE, "/"), (_NUMBER, "N"), (_SPACE, " ")):
        text = pattern.sub(instead, text)
    text = text.strip().lower()
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest() if text else ""
