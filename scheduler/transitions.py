"""The life of a step as data: states, legal edges, and which fact may touch a step in which state.

`state.evolve` takes no edge that is not here, and the diagram in ARCHITECTURE.md is printed from here (`mermaid`).
A known step that no submission wants (a need of a recipe that is not in use) is `waiting` too: it runs only once a
submission stands on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler import facts as f
from scheduler.model import StepState

_S = StepState

#: Every legal edge, with the facts that may cause it. A fact about one step may move others (a need is done or lost).
EDGES: Mapping[tuple[StepState, StepState], tuple[type[f.Fact], ...]] = {
    (_S.WAITING, _S.READY): (
        f.StepDone,
        f.StepCached,
        f.SubmissionAccepted,
        f.SubmissionGrew,
        f.StepFellBack,
        f.StepLost,
    ),
    (_S.WAITING, _S.LEASED): (f.StepLeased,),
    (_S.WAITING, _S.DONE): (f.StepCached,),
    (_S.WAITING, _S.DOOMED): (f.StepDoomed,),
    (_S.WAITING, _S.ABANDONED): (f.StepAbandoned,),
    (_S.READY, _S.WAITING): (f.StepLost, f.StepFellBack),
    (_S.READY, _S.LEASED): (f.StepLeased,),
    (_S.READY, _S.DONE): (f.StepCached,),
    (_S.READY, _S.FAILED): (f.StepFailed,),
    (_S.READY, _S.ABANDONED): (f.StepAbandoned,),
    (_S.LEASED, _S.PUBLISHING): (f.StepBuilt,),
    (_S.LEASED, _S.READY): (f.LeaseRevoked,),
    (_S.LEASED, _S.WAITING): (f.LeaseRevoked, f.StepFellBack),
    (_S.LEASED, _S.FAILED): (f.StepFailed,),
    (_S.PUBLISHING, _S.DONE): (f.StepDone,),
    (_S.PUBLISHING, _S.READY): (f.LeaseRevoked,),
    (_S.PUBLISHING, _S.WAITING): (f.LeaseRevoked,),
    (_S.PUBLISHING, _S.FAILED): (f.StepFailed,),
    (_S.DONE, _S.WAITING): (f.StepLost,),
    (_S.FAILED, _S.WAITING): (f.StepRevived,),
    (_S.FAILED, _S.DONE): (f.StepCached,),
    (_S.DOOMED, _S.WAITING): (f.StepRevived,),
    (_S.DOOMED, _S.DONE): (f.StepCached,),
    (_S.ABANDONED, _S.WAITING): (f.StepRevived,),
    (_S.ABANDONED, _S.DONE): (f.StepCached,),
}

#: The targets of each state, for the quick check in `evolve`.
LEGAL: Mapping[StepState, frozenset[StepState]] = {
    source: frozenset(to for start, to in EDGES if start is source) for source in StepState
}

#: States in which the step that a fact names may be. Facts that name no step are absent.
SUBJECT: Mapping[type[f.Fact], frozenset[StepState]] = {
    f.RecipeAdded: frozenset(StepState),
    f.StepCached: frozenset(
        {_S.WAITING, _S.READY, _S.FAILED, _S.DOOMED, _S.ABANDONED},
    ),
    f.StepRevived: frozenset({_S.FAILED, _S.DOOMED, _S.ABANDONED}),
    f.StepLost: frozenset({_S.DONE}),
    f.StepLeased: frozenset({_S.WAITING, _S.READY}),
    f.LeaseRevoked: frozenset({_S.LEASED, _S.PUBLISHING}),
    f.StepBuilt: frozenset({_S.LEASED}),
    f.StepDone: frozenset({_S.PUBLISHING}),
    f.StepFellBack: frozenset({_S.WAITING, _S.READY, _S.LEASED}),
    f.StepFailed: frozenset({_S.READY, _S.LEASED, _S.PUBLISHING}),
    f.StepDoomed: frozenset({_S.WAITING}),
    f.StepAbandoned: frozenset({_S.WAITING, _S.READY}),
    f.BackOffEnded: frozenset({_S.READY}),
    f.StepHeld: frozenset({_S.READY}),
}

UNFINISHED = frozenset({_S.WAITING, _S.READY, _S.LEASED, _S.PUBLISHING})
#: Finished without a result: a submission that wants such a step revives it.
LAPSED = frozenset({_S.FAILED, _S.DOOMED, _S.ABANDONED})


def mermaid() -> str:
    """Return the table as a Mermaid state diagram, one line per edge, for ARCHITECTURE.md."""
    lines = ["stateDiagram-v2", "    [*] --> waiting: StepAdded", "    [*] --> done: StepCached"]
    for (source, target), causes in EDGES.items():
        label = ", ".join(cause.__name__ for cause in causes)
        lines.append(f"    {source.value} --> {target.value}: {label}")
    return "\n".join(lines) + "\n"
