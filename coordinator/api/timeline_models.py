"""Answers about where time went: attempts with their timelines, and the history of a package.

Plain records, as those of `coordinator.api.models`.
"""

from __future__ import annotations

from coordinator.api.flakes import RecipeRecordView
from coordinator.api.models import AttemptOutcome
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class StretchView:
    """One stretch of an attempt, by the coordinator's clock."""

    name: str
    at: float
    took_s: float


@record(frozen=True, slots=True, kw_only=True)
class FetchView:
    """One input that an attempt fetched, or waited for (`shared`: another attempt had begun to fetch it)."""

    #: Full store path.
    path: str
    #: `objects`: the object store; `cache`: the coordinator's cache over HTTP.
    source: str
    nar_bytes: int
    at: float
    took_s: float
    shared: bool


@record(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """One attempt of a step with its timeline. None: not known, because nothing measured it; never 0 instead.

    `outcome` is `running`, `done`, `failed` (for good), `retried` (the farm may be at fault), `lost` (the worker was),
    `returned` (handed back), `moved` (to a faster worker) or `cancelled`; `reason` and `message` say why it failed.
    `spans` are `inputs`, `build`, `pack`, `upload`, `verify` and `publish`, as far as it came; between them it waited.
    """

    step: str
    attempt: int
    #: Index of the step's recipe.
    recipe: int
    name: str
    system: str
    worker: str
    isolation: str
    outcome: AttemptOutcome
    reason: str
    message: str
    submitted_at: float | None
    ready_at: float | None
    leased_at: float | None
    built_at: float | None
    ended_at: float | None
    spans: tuple[StretchView, ...]
    #: Phases that the builder announced; `more_phases` beyond the bound of a report are summed.
    phases: tuple[StretchView, ...]
    more_phases: int
    more_phases_s: float
    #: The largest; the others are counted and summed.
    fetches: tuple[FetchView, ...]
    more_fetches: int
    more_fetches_bytes: int
    #: The report never came: the timeline ends with what the worker had sent.
    cut: bool
    #: W3C trace context of the attempt's span, as the worker's log has it; "" where no report told it.
    traceparent: str
    build_s: float | None
    #: Of the builders and all their processes; see `workers.wire.measures.Measures`.
    cpu_s: float | None
    peak_memory_bytes: int | None
    read_bytes: int | None
    written_bytes: int | None
    #: NARs of the inputs that it fetched; of its outputs, and as they were sent.
    fetched_bytes: int | None
    output_bytes: int | None
    uploaded_bytes: int | None


@record(frozen=True, slots=True, kw_only=True)
class FlakyStepView:
    """A step that failed and later succeeded with the same recipe, and the record of that recipe."""

    step: str
    name: str
    record: RecipeRecordView


@record(frozen=True, slots=True, kw_only=True)
class WorkerTriesView:
    """Attempts of a package on one worker: those that came to an end of their own or the machine's, and failed."""

    worker: str
    attempts: int
    failed: int


@record(frozen=True, slots=True, kw_only=True)
class SystemHistoryView:
    """Newest remembered attempts of a package on one system. `usual_…` are medians of the newest successful ones."""

    system: str
    done: int
    failed: int
    #: The worker was lost, or the farm tried again.
    lost: int
    #: Recipes that were built or failed by themselves, and those of them that failed and later succeeded.
    recipes: int
    flaky: int
    #: The first of these, those that fail most first.
    flaky_steps: tuple[FlakyStepView, ...] = ()
    #: By name.
    workers: tuple[WorkerTriesView, ...] = ()
    usual_s: float | None
    usual_memory_bytes: int | None
    usual_output_bytes: int | None
    #: Newest first.
    recent: tuple[AttemptView, ...]


@record(frozen=True, slots=True, kw_only=True)
class HistoryView:
    """History of a package, by its name with or without version."""

    name: str
    systems: tuple[SystemHistoryView, ...]
