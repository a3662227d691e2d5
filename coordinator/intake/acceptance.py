"""Derivations as the farm takes them: verified, and of a kind that it builds.

Shared by threads of the coordinator and by its child processes (`coordinator.intake.verifier_child`), which import
neither a database nor a framework.
"""

from __future__ import annotations

from coordinator.intake.errors import DerivationRefusedError
from coordinator.stores.derivation_records import Kind, Known, NewDerivation, Node
from infra.nix.derivation import DerivationKind
from infra.nix.verify import KnownDerivation, VerifiedDerivation
from scheduler.model import ANY_SYSTEM, StepKey

_KINDS = {DerivationKind.INPUT_ADDRESSED: Kind.INPUT_ADDRESSED, DerivationKind.FIXED: Kind.FIXED}
_BACK = {kind: nix for nix, kind in _KINDS.items()}


def accepted(verified: VerifiedDerivation, data: bytes) -> NewDerivation:
    """Return a verified derivation on its way into the store. Raises `DerivationRefusedError`."""
    kind = _KINDS.get(verified.kind)
    if kind is None:
        raise DerivationRefusedError(
            f"{verified.drv_path} is {verified.kind.value}: its output paths are not known before it is built, and "
            "this farm builds only input-addressed and fixed-output derivations"
        )
    drv = verified.derivation
    system = ANY_SYSTEM if drv.builder.startswith("builtin:") else drv.system
    outputs = tuple(sorted(verified.outputs.items()))
    first = outputs[0][1] if len(outputs) == 1 else min([path for _, path in outputs])
    features = verified.options.required_system_features
    prefix = len(verified.drv_path.rpartition("/")[0]) + 1
    node = Node(
        drv=verified.drv_path[prefix:],
        step=StepKey(first[prefix:]),
        kind=kind,
        system=system,
        features=tuple(sorted(set(features))) if features else (),
        outputs=outputs,
        needs=tuple([path[prefix:] for path, _ in drv.input_drvs]),
        sources=drv.input_srcs,
    )
    content = f"{drv.outputs[0].hash_algo}:{drv.outputs[0].hash}" if kind is Kind.FIXED else ""
    return NewDerivation(node, bytes.fromhex(verified.hash_modulo), verified.inputs, data, content)


def to_verifier(known: Known) -> KnownDerivation:
    """Return a stored derivation as verification keeps it."""
    return KnownDerivation(_BACK[known.kind], known.modulo.hex(), dict(known.outputs), deferred=False)
