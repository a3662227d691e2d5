"""Steps of populating as pure functions: each takes what is known and says what is to be done next.

1. `targets_of` joins wishes with derivations. 2. `drift_of` compares the paths of a list with those that its
derivations make; what drifted is neither pulled nor built. 3. `to_pull` names the paths to have from upstreams.
4. `judged` says what became of each wish, and `to_build` which of them are built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from coordinator.api.mirroring import MirroredOutcome, MirroredPathView
from coordinator.populate.model import DerivationFacts, Drift, PopulatedWish, PopulateOutcome, PopulateTarget
from coordinator.wishes.model import Wish, WishedAttribute, WishedDerivation, WishedOutput, WishedPaths, WishList

_OF_MIRRORING = {
    MirroredOutcome.HERE: PopulateOutcome.HERE,
    MirroredOutcome.MIRRORED: PopulateOutcome.MIRRORED,
    MirroredOutcome.RECORDED: PopulateOutcome.RECORDED,
    MirroredOutcome.NOWHERE: PopulateOutcome.NOWHERE,
    MirroredOutcome.REFUSED: PopulateOutcome.REFUSED,
}
#: Of several outputs the one that is worst off counts.
_WORST_LAST = tuple(_OF_MIRRORING)


def changed(old: WishList, new: WishList) -> tuple[Wish, ...]:
    """Return the wishes of `new` that are not in `old`: paths that it does not name, other derivations, attributes."""
    paths = {(wish.system, path) for wish in old.wishes for path in _listed(wish)}
    targets = {(wish.system, wish.target) for wish in old.wishes}
    return tuple(wish for wish in new.wishes if not _is_in(wish, paths, targets))


def _is_in(wish: Wish, paths: Collection[tuple[str, str]], targets: Collection[object]) -> bool:
    listed = _listed(wish)
    if listed:
        return all((wish.system, path) in paths for path in listed)
    # An attribute may mean something else by now, though its name is the same.
    return isinstance(wish.target, WishedDerivation) and (wish.system, wish.target) in targets


def _listed(wish: Wish) -> tuple[str, ...]:
    return wish.target.paths if isinstance(wish.target, WishedPaths) else ()


def derivations_of(wishes: Iterable[Wish]) -> tuple[str, ...]:
    """Return the derivations that wishes name, full paths."""
    found: dict[str, None] = {}
    for wish in wishes:
        match wish.target:
            case WishedPaths(derivation=str(path)) | WishedDerivation(path):
                found[path] = None
            case _:
                pass
    return tuple(found)


def targets_of(
    wishes: Iterable[Wish],
    derivations: Mapping[str, DerivationFacts],
    makers: Mapping[str, str],
    evaluated: Mapping[tuple[str, str], str],
    unevaluated: Mapping[tuple[str, str], str],
) -> list[PopulateTarget]:
    """Join wishes with derivations.

    Args:
        wishes: What is wished for.
        derivations: What is known of derivations, by full path.
        makers: Derivations by the paths that they make.
        evaluated: Derivations that wishes were evaluated to, by the wish's key.
        unevaluated: Why others could not be evaluated.
    """
    return [_target(wish, derivations, makers, evaluated, unevaluated.get(wish.key, "")) for wish in wishes]


def _target(
    wish: Wish,
    derivations: Mapping[str, DerivationFacts],
    makers: Mapping[str, str],
    evaluated: Mapping[tuple[str, str], str],
    unevaluated: str,
) -> PopulateTarget:
    drv = evaluated.get(wish.key)
    match wish.target:
        case WishedPaths(outputs, derivation):
            candidates = (drv, derivation, *(makers.get(output.path) for output in outputs))
            found = next((derivations[each] for each in candidates if each is not None and each in derivations), None)
            return PopulateTarget(wish, outputs, found, unevaluated)
        case WishedDerivation(path, names):
            return _of_derivation(wish, derivations.get(path), names, unevaluated)
        case WishedAttribute():
            return _of_derivation(wish, None if drv is None else derivations.get(drv), (), unevaluated)


def _of_derivation(wish: Wish, found: DerivationFacts | None, names: Sequence[str], unevaluated: str) -> PopulateTarget:
    outputs = () if found is None else tuple(found.outputs.items())
    wanted = tuple(WishedOutput(name, path) for name, path in outputs if not names or name in names)
    return PopulateTarget(wish, wanted, found, unevaluated)


def drift_of(target: PopulateTarget, makers: Mapping[str, str]) -> Drift | None:
    """Return the first output whose listed path is not what the derivation makes, without the difference."""
    found = target.derivation
    if found is None or not isinstance(target.wish.target, WishedPaths):
        return None
    made = found.outputs
    for output in target.outputs:
        if output.path in made.values() or "" in made.values():
            continue
        other = made.get(output.name) or next(iter(made.values()))
        return Drift(output.name, output.path, other, found.path, makers.get(output.path, ""))
    return None


def to_pull(targets: Iterable[PopulateTarget], drifted: Mapping[tuple[str, str], Drift]) -> tuple[str, ...]:
    """Return the full store paths that are wanted of the cache and its upstreams."""
    return tuple(dict.fromkeys(path for target in targets if target.wish.key not in drifted for path in target.paths))


def judged(
    target: PopulateTarget, pulled: Mapping[str, MirroredPathView], drifted: Mapping[tuple[str, str], Drift]
) -> PopulatedWish:
    """Return what became of a wish by what was pulled."""
    wish = target.wish
    derivation = "" if target.derivation is None else target.derivation.path
    drift = drifted.get(wish.key)
    if drift is not None:
        return PopulatedWish(
            wish.name, wish.system, PopulateOutcome.DRIFT, target.paths, derivation=derivation, drift=drift
        )
    views = [pulled[path] for path in target.paths if path in pulled]
    if len(views) < max(1, len(target.outputs)):
        outcome, reason = _without_paths(target)
        return PopulatedWish(wish.name, wish.system, outcome, target.paths, derivation=derivation, reason=reason)
    worst = max(views, key=lambda view: _WORST_LAST.index(view.outcome))
    reason = worst.reason
    if target.unevaluated and not _OF_MIRRORING[worst.outcome].is_had:
        reason = "; ".join(filter(None, (reason, target.unevaluated)))
    outcome = _OF_MIRRORING[worst.outcome]
    return PopulatedWish(wish.name, wish.system, outcome, target.paths, worst.upstream, derivation, reason)


def _without_paths(target: PopulateTarget) -> tuple[PopulateOutcome, str]:
    """Return what becomes of a wish whose paths are not known, before anything is built."""
    wish = target.wish
    if isinstance(wish.target, WishedAttribute) and target.derivation is None:
        if wish.marks:
            return PopulateOutcome.EXCLUDED, f"Nix does not evaluate it: it is {', '.join(sorted(wish.marks))}"
        return PopulateOutcome.UNEVALUATED, target.unevaluated or "it could not be evaluated"
    if isinstance(wish.target, WishedDerivation) and target.derivation is None:
        return PopulateOutcome.NOWHERE, f"neither the farm nor this machine has {wish.target.path}"
    return (PopulateOutcome.UNEVALUATED if target.unevaluated else PopulateOutcome.NOWHERE), target.unevaluated


def refusal_to_build(target: PopulateTarget, systems: Collection[str]) -> tuple[PopulateOutcome, str] | None:
    """Return why a wish that is not had is not built either; None: it is built."""
    if target.derivation is None:
        return None
    if target.wish.marks:
        return PopulateOutcome.EXCLUDED, f"it is {', '.join(sorted(target.wish.marks))}, so it is not built"
    system = target.derivation.system
    if system not in systems and system != "builtin":
        return PopulateOutcome.NO_WORKER, f"no worker builds for {system}"
    return None
