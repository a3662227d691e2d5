"""Record of one remote evaluation: what was asked, and what its program said so far, each part within a bound."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from coordinator.api.evaluations import EvaluationState, EvaluationView, FailedAttrView
from coordinator.api.limits import MAX_ROOTS
from coordinator.api.requests import RemoteEvaluationRequest, RootRequest
from coordinator.remote_evaluation.errors import RemoteFailedError
from coordinator.remote_evaluation.frames import BadFrameError, FrameKind
from coordinator.remote_evaluation.jobs import FailedAttrs, FoundRoots

#: Failed attributes that are kept of one evaluation, and those of them with all that Nix printed.
KEPT_FAILED: Final = 1000
KEPT_WHOLE: Final = 20
#: Characters of what Nix printed that are kept, and bytes of it after which an evaluation is ended.
KEPT_MESSAGES: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
MAX_SENTENCE: Final = 1024


@dataclass(slots=True)
class EvaluationRecord:
    """One evaluation, as it stands."""

    id: str
    ask: RemoteEvaluationRequest
    #: Owner of its submission.
    owner: str
    state: EvaluationState = EvaluationState.QUEUED
    #: What it finds is submitted; else it is kept here.
    submits: bool = True
    found: list[RootRequest] = field(default_factory=list)
    #: Name of its tree; empty until it is there.
    tree: str = ""
    error: str = ""
    submission: str = ""
    #: Roots that its program named, and the derivations among them.
    root_count: int = 0
    drvs: set[str] = field(default_factory=set)
    failed: list[FailedAttrView] = field(default_factory=list)
    failed_count: int = 0
    left_out: str = ""
    messages: str = ""
    message_bytes: int = 0
    task: asyncio.Task[None] | None = None
    #: Set, and made anew, whenever the state changes.
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, state: EvaluationState) -> None:
        """Change the state, and wake those who wait for that."""
        self.state = state
        self.wake()

    def wake(self) -> None:
        """Wake those who wait for news of it."""
        self.changed.set()
        self.changed = asyncio.Event()

    def view(self) -> EvaluationView:
        """Return what clients see of it."""
        return EvaluationView(
            id=self.id,
            state=self.state,
            tree=self.tree,
            error=self.error,
            submission=self.submission,
            roots=self.root_count,
            failed=tuple(self.failed),
            failed_count=self.failed_count,
            left_out=self.left_out,
            messages=self.messages,
        )

    def take(self, kind: FrameKind, data: bytes) -> None:
        """Take a frame of findings.

        Raises:
            RemoteFailedError: It says too much.
            BadFrameError: It is no such frame.
            ValidationError: What it holds is none of the answers.
        """
        match kind:
            case FrameKind.MESSAGES:
                self._add_messages(data)
            case FrameKind.FAILED:
                self._add_failed(FailedAttrs.model_validate_json(data))
            case FrameKind.LEFT_OUT:
                self.left_out = data.decode(errors="replace")[:MAX_SENTENCE]
            case _:
                raise BadFrameError("the evaluator sent a frame that is not its own")

    def taken_roots(self, data: bytes) -> tuple[RootRequest, ...]:
        """Count the roots of a frame, and return them. Raises `RemoteFailedError`, `ValidationError`."""
        roots = FoundRoots.model_validate_json(data).roots
        self.root_count += len(roots)
        if self.root_count > MAX_ROOTS:
            raise RemoteFailedError(f"it has more than {MAX_ROOTS} roots, the limit; choose some with -A")
        self.drvs.update(root.drv for root in roots)
        return roots

    def _add_messages(self, data: bytes) -> None:
        self.message_bytes += len(data)
        if self.message_bytes > MAX_MESSAGE_BYTES:
            raise RemoteFailedError(f"the evaluation printed more than {MAX_MESSAGE_BYTES} bytes; take its traces out")
        room = KEPT_MESSAGES - len(self.messages)
        if room > 0:
            self.messages += data.decode(errors="replace")[:room]

    def _add_failed(self, found: FailedAttrs) -> None:
        for each in found.failed:
            self.failed_count += 1
            if len(self.failed) < KEPT_FAILED:
                text = each.text if len(self.failed) < KEPT_WHOLE else ""
                view = FailedAttrView(attr=each.attr, error=each.error, text=text, position=each.position)
                self.failed.append(view)
