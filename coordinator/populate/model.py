"""Words of populating: wishes with what is known of them, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from coordinator.wishes.model import Wish, WishedOutput


class PopulateOutcome(StrEnum):
    """Outcomes for a wish."""

    #: The cache had it before.
    HERE = "here"
    #: It was fetched from an upstream and published here.
    MIRRORED = "mirrored"
    #: An upstream has it, and only that is recorded here.
    RECORDED = "recorded"
    BUILT = "built"
    #: What its derivation makes is not what the list names.
    DRIFT = "drift"
    #: Its build failed, or ended before its end.
    FAILED = "failed"
    #: No worker builds for its system.
    NO_WORKER = "no worker"
    #: Nix refuses to build it: unfree, insecure, broken, unsupported.
    EXCLUDED = "excluded"
    #: An upstream has something that does not count, and it cannot be built.
    REFUSED = "refused"
    #: No upstream has it, and no derivation of it is known.
    NOWHERE = "nowhere"
    #: It could not be evaluated.
    UNEVALUATED = "unevaluated"

    @property
    def is_had(self) -> bool:
        """True where the wish can be fetched now."""
        return self in _HAD


_HAD = frozenset({PopulateOutcome.HERE, PopulateOutcome.MIRRORED, PopulateOutcome.RECORDED, PopulateOutcome.BUILT})


class ProofState(StrEnum):
    """Results of a proof."""

    #: A client that trusts the farm's key alone fetched the closure.
    PROVEN = "proven"
    FAILED = "failed"
    #: The bytes lie with an upstream; its signature was verified when that was recorded.
    UPSTREAM = "upstream"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class DerivationFacts:
    """A derivation that can be built."""

    #: Full path of the .drv.
    path: str
    #: Output -> full store path, "" for one that only a build says.
    outputs: Mapping[str, str]
    system: str
    #: The farm has it with all that it needs; else this machine's store does.
    at_farm: bool


@dataclass(frozen=True, slots=True)
class PopulateTarget:
    """A wish, the outputs that are wanted of it, and a derivation that should make them."""

    wish: Wish
    #: Those that the list names, or, where it names none, those of the derivation.
    outputs: tuple[WishedOutput, ...]
    derivation: DerivationFacts | None = None
    #: Why it could not be evaluated.
    unevaluated: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Full store paths that are wanted, as far as they are known."""
        return tuple(output.path for output in self.outputs if output.path)


@dataclass(frozen=True, slots=True)
class Drift:
    """A path that the list names, and the other one that its derivation makes."""

    output: str
    listed: str
    made: str
    #: Derivation that makes `made`, and the one that made `listed`, "" where that is not known.
    derivation: str
    listed_by: str = ""
    #: One sentence about the first input in which the two derivations differ, or why that is not known.
    difference: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """Result of a proof for a wish."""

    state: ProofState = ProofState.NOT_TRIED
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PopulatedWish:
    """A wish, and what became of it."""

    name: str
    system: str
    outcome: PopulateOutcome
    paths: tuple[str, ...] = ()
    #: Address of the upstream that it came from.
    upstream: str = ""
    derivation: str = ""
    #: One clause about why it is not had, or what was odd on the way.
    reason: str = ""
    #: Step to read on with `drover log` or `drover why`.
    step: str = ""
    drift: Drift | None = None
    proof: Proof = Proof()

    @property
    def is_good(self) -> bool:
        """True where it can be fetched, and no proof says otherwise."""
        return self.outcome.is_had and self.proof.state is not ProofState.FAILED
