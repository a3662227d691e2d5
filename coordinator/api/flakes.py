"""Records of what became of a recipe's attempts, and of a worker's beside other workers', with their sentences.

Plain records, as those of `coordinator.api.models`. Pages and commands say the same of them, so the sentences stand
here.
"""

from __future__ import annotations

from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class RecipeRecordView:
    """Outcomes of a step's attempts with its recipe in use that ended by the build itself, as far as remembered.

    A worker that was lost, a full disk and a lease that was handed back say nothing of a recipe and do not count.
    """

    attempts: int
    succeeded: int
    #: A failure was followed by a success: nothing but chance or the machine differed.
    flaky: bool

    @property
    def failed(self) -> int:
        """Attempts that failed."""
        return self.attempts - self.succeeded


@record(frozen=True, slots=True, kw_only=True)
class WorkerRecordView:
    """A worker's newest attempts, and how its failures compare with other workers' at the same packages.

    The comparison counts each recipe once on each worker, and only recipes that succeeded somewhere, of packages that
    other workers tried too: what no machine can build blames none. `failures` are all failures there, on any worker;
    `expected` is this worker's share of them by its share of the tries, which it would have if all workers were alike.
    """

    attempts: int
    failed_attempts: int
    #: Recipes that failed here, and the comparison.
    failed: int = 0
    failures: int = 0
    expected: float = 0.0
    #: It failed more often than chance explains (`coordinator.readmodel.flakes.stands_out`).
    stands_out: bool = False


def failure_sentence(record: RecipeRecordView | None) -> str:
    """Say of a failed step that its recipe can succeed; "" where it never did."""
    if record is None or not record.succeeded:
        return ""
    times = _times(record.attempts)
    return f"failed here, succeeded {record.succeeded} of {times} with the same recipe{_flaky(record)}"


def flake_sentence(record: RecipeRecordView | None) -> str:
    """Say of a step that its recipe is flaky, with its rate; "" where it is not."""
    if record is None or not record.flaky:
        return ""
    return f"failed {record.failed} of {_times(record.attempts)} with the same recipe{_flaky(record)}"


def worker_sentence(record: WorkerRecordView | None) -> str:
    """Say that builds fail more often on a worker than elsewhere; "" where they do not."""
    if record is None or not record.stands_out:
        return ""
    return (
        f"builds fail more often here than elsewhere: {record.failed} of {record.failures} failures of steps that "
        f"succeeded somewhere, where one of equals would have {record.expected:.1f}"
    )


def _flaky(record: RecipeRecordView) -> str:
    return f": flaky, {record.failed * 100 / record.attempts:.0f} % fail" if record.flaky else ""


def _times(count: int) -> str:
    return f"{count} time" if count == 1 else f"{count} times"
