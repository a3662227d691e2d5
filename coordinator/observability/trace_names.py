"""Table of the names of spans and of their attributes, from which code and documentation take them.

Names of OpenTelemetry (conventions for CI/CD and errors) where these fit, `drover.` and `nix.` else. `./run docs`
prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class SpanName:
    """Kind of a span: its name begins with `name`."""

    name: str
    meaning: str


@dataclass(frozen=True)
class Attribute:
    """Name of an attribute, and what its values mean."""

    name: str
    meaning: str


SUBMISSION: Final = SpanName("submission", "From the client's start, or the arrival, to the end of a submission.")
CLIENT_STAGE: Final = SpanName(
    "client", "`client evaluate`, `client closure`, `client upload`: what the client did before."
)
STEP: Final = SpanName("step", "`step NAME`: from the moment at which it was ready to its result.")
WAIT: Final = SpanName("wait", "A ready step had no slot.")
ATTEMPT: Final = SpanName("attempt", "One lease of a step, whatever became of it.")
STRETCH: Final = SpanName("inputs, build, pack, upload", "What the worker did for an attempt, as it measured it.")
PHASE: Final = SpanName("phase", "`phase NAME`: a phase that the builder announced.")
FETCH: Final = SpanName("fetch", "One input that the attempt waited for.")
VERIFY: Final = SpanName("verify", "The coordinator read the outputs back.")
PUBLISH: Final = SpanName("publish", "The outputs were signed and made visible.")
SPANS: Final = (SUBMISSION, CLIENT_STAGE, STEP, WAIT, ATTEMPT, STRETCH, PHASE, FETCH, VERIFY, PUBLISH)

PIPELINE_NAME: Final = Attribute("cicd.pipeline.name", "Label of the submission.")
PIPELINE_RUN: Final = Attribute("cicd.pipeline.run.id", "Id of the submission.")
PIPELINE_RESULT: Final = Attribute("cicd.pipeline.result", "`success`, `failure` or `cancellation` of the submission.")
TASK_NAME: Final = Attribute("cicd.pipeline.task.name", "Name of the step's derivation.")
TASK_RUN: Final = Attribute("cicd.pipeline.task.run.id", "Key of the step, or `KEY#ATTEMPT`.")
TASK_RESULT: Final = Attribute(
    "cicd.pipeline.task.run.result",
    "`success`, `failure` (the package's), `timeout` (a limit of its time), `error` (the farm's), `cancellation`.",
)
WORKER_NAME: Final = Attribute("cicd.worker.name", "Name of the worker.")
ERROR_TYPE: Final = Attribute("error.type", "Kind of the failure, as in `drover_failed_attempts_total`.")
EXIT_CODE: Final = Attribute("process.exit.code", "Exit code of a builder that failed. Absent where a signal ended it.")
CPU_SECONDS: Final = Attribute(
    "drover.build.cpu_seconds", "Processor time of the builders. Absent where it is not known."
)
PEAK_MEMORY: Final = Attribute(
    "drover.build.peak_memory_bytes", "Most memory of the builders: at one look, or as their control group counted it."
)
READ_BYTES: Final = Attribute("drover.build.read_bytes", "Bytes that builders and their Nix daemon read from disks.")
WRITTEN_BYTES: Final = Attribute("drover.build.written_bytes", "Bytes that they wrote to disks.")
FETCHED_BYTES: Final = Attribute("drover.inputs.bytes", "NAR bytes that the attempt fetched.")
OUTPUT_BYTES: Final = Attribute("drover.outputs.bytes", "NAR bytes of the outputs.")
UPLOADED_BYTES: Final = Attribute("drover.upload.bytes", "Bytes of the outputs as they were sent.")
ISOLATION: Final = Attribute("drover.isolation", "Class of the isolation of the build: A, B or C.")
STEPS: Final = Attribute("drover.submission.steps", "Steps of the submission.")
CACHED: Final = Attribute("drover.submission.cached", "Steps that the cache had when the submission arrived.")
FAILED: Final = Attribute("drover.submission.failed", "Steps that failed by themselves.")
SYSTEM: Final = Attribute("nix.system", "System of the derivation.")
STORE_PATH: Final = Attribute("nix.store_path", "Path of an input.")
NAR_BYTES: Final = Attribute("nix.nar_bytes", "Size of an input's NAR.")
SOURCE: Final = Attribute("drover.source", "Where an input came from: `objects` or `cache`.")
CUT: Final = Attribute(
    "drover.cut",
    "True: the worker sent no report (it was lost, or the build cancelled), and the span ends with the lease.",
)
ATTRIBUTES: Final = (
    PIPELINE_NAME,
    PIPELINE_RUN,
    PIPELINE_RESULT,
    TASK_NAME,
    TASK_RUN,
    TASK_RESULT,
    WORKER_NAME,
    ERROR_TYPE,
    EXIT_CODE,
    CPU_SECONDS,
    PEAK_MEMORY,
    READ_BYTES,
    WRITTEN_BYTES,
    FETCHED_BYTES,
    OUTPUT_BYTES,
    UPLOADED_BYTES,
    ISOLATION,
    STEPS,
    CACHED,
    FAILED,
    SYSTEM,
    STORE_PATH,
    NAR_BYTES,
    SOURCE,
    CUT,
)
