"""Errors of the Nix format code.

Two things can be wrong with what a stranger hands in: its bytes do not follow the format (`FormatError`, which says
where), or the bytes are well formed and claim something untrue (`VerificationError`, which names the member that
lies). Nothing else leaves `infra.nix` for any input.
"""

from __future__ import annotations


class NixError(Exception):
    """Root of every exception that `infra.nix` raises on purpose."""


class FormatError(NixError):
    """Input bytes that break a Nix format; `str()` is one sentence that ends with the offset.

    Attributes:
        message: What is wrong, without the place.
        offset: Byte (for text that is `str`: character) position in the input, from 0.
        what: The kind of thing that was read, such as "derivation" or "NAR"; may be empty.
    """

    def __init__(self, message: str, *, offset: int, subject: str = "") -> None:
        self.message = message
        self.offset = offset
        self.subject = subject
        super().__init__(message, offset, subject)

    def __str__(self) -> str:
        prefix = f"{self.subject}: " if self.subject else ""
        return f"{prefix}{self.message} (at byte {self.offset})"


class VerificationError(NixError):
    """A well-formed member of a graph that claims something untrue; `member` is its store path.

    Attributes:
        member: The full store path of the derivation or source that is refused.
        message: What is wrong with it, without the name.
    """

    def __init__(self, member: str, message: str) -> None:
        self.member = member
        self.message = message
        super().__init__(member, message)

    def __str__(self) -> str:
        return f"{self.member}: {self.message}"


class DerivationPathError(VerificationError):
    """The bytes of a .drv file do not hash to the path under which it was handed in."""


class OutputPathError(VerificationError):
    """An output path that a derivation claims is not the one that its content gives."""


class UnknownInputError(VerificationError):
    """An input derivation that was never handed in (or only after its consumer)."""


class UnknownOutputError(VerificationError):
    """A derivation asks for an output that its input does not have."""


class NotCanonicalError(VerificationError):
    """A derivation that Nix itself would have written with other bytes, so that its hashes are not Nix's."""


class UnsupportedDerivationError(VerificationError):
    """A derivation of a kind whose paths this code cannot verify."""


class SourcePathError(VerificationError):
    """The content of an uploaded source does not give its store path by any known method."""
