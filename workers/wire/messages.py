"""The wire between coordinator and agent: versioned, validated on both sides.

Messages cross the transport as plain containers (`dump`), never as pickled classes, so that either side may change its
code without the other. Every call is short and idempotent; see ARCHITECTURE.md, "The agent on each worker". Every call
carries the epoch of its coordinator: a call of one that another has taken over from has no effect.

    hello(FarmInfo) -> Hello                introduces both sides; may be repeated at any time
    start_many([LeaseOrder]) -> None        keyed by (step, attempt); a repeat is a no-op
    events(ack, max_bytes, wait_s) -> Batch one outstanding long poll; forgets what is at or below `ack`
    cancel([Lease]) -> None                 an unknown lease is a no-op
    drain(bool) -> None                     no new work while true
    fetch_ahead(InputHint) -> None          a hint; only to agents that say `takes_hints`
    provide([path], token) -> [Output]      uploads again what is valid in the worker's store, for a cache that lost it

Either side may be the newer one, because agents outlive the update of their coordinator. Rules:

1. What is only added, and means nothing bad where it is not known, leaves `PROTOCOL_VERSION` as it is: each side passes
   over fields that it does not know, and every new one has a default that says "an older peer did not say".
2. All else raises it: a field that must be obeyed (a limit of a build), another meaning, a new kind of event or value.
   Sides of different protocols refuse each other in one sentence, whatever else they say.

A call is defined three times: `workers.wire.fleet.Fleet` (the port), `workers.wire.polling.AgentRoster` (sends it) and
`workers.agent.agent.Agent` (answers it). Transports carry every call of `CallName` alike.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import COMPRESSION, Compression
from workers.wire.grades import IsolationGrade
from workers.wire.measures import FetchSource, Measures
from workers.wire.reasons import Reason

PROTOCOL_VERSION = 2
CallName = Literal["hello", "start_many", "events", "cancel", "drain", "provide", "fetch_ahead"]
CALLS: tuple[CallName, ...] = get_args(CallName)
#: Bounds of one `events` answer: with only reports and phases, and with log text in it (Ray is slower above 100 KiB).
SMALL_BATCH_BYTES = 64 * 1024
BULK_BATCH_BYTES = 1024 * 1024
LONG_POLL_S = 10.0
#: Leases whose transfers one answer names; seconds until bytes that move, and nothing else, cause an answer.
MAX_TRANSFERS = 64
TRANSFERS_EVERY_S = 1.0
#: Feature that each fixed-output step asks for and each worker has that takes such steps: what may use the network.
NETWORK_FEATURE = "network"
#: Largest count of bytes that is read; JSON has no larger numbers.
MOST_BYTES = 1 << 56
#: Missing inputs that one report names; the others come to light once these are there.
MAX_MISSING = 64
#: What a worker may say of itself. A worker that exceeds one of these is not understood, and counts as silent.
MAX_SLOTS = 1024
MAX_HELD = 1 << 16
MAX_EVENTS = 1 << 14
MAX_NAMES = 256
MAX_NAME = 1024
MAX_SENTENCE = 16 * 1024

Name = Annotated[str, Field(max_length=MAX_NAME)]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)]
Sentence = Annotated[str, Field(max_length=MAX_SENTENCE)]


class WireMessage(BaseModel):
    """Base of all wire messages: immutable, and deaf to fields of a newer peer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def dump(self) -> dict[str, Any]:
        """Return plain containers for the transport."""
        return self.model_dump()


class Introduction(WireMessage):
    """First words of either side, in whatever protocol it speaks."""

    protocol: int = PROTOCOL_VERSION


class FarmInfo(Introduction):
    """Description of the farm for an agent."""

    #: Where the binary cache answers, without a trailing slash, for example `http://127.0.0.1:7878/cache`.
    cache_url: str
    #: `name:base64` of every key whose signature makes an input acceptable.
    public_keys: tuple[str, ...]
    #: Where NARs are put and read: `file:///…`, `s3://bucket/prefix`, …
    object_store_url: str
    store_dir: str = "/nix/store"
    #: What the coordinator wrote into the object store (`MARKER_KEY`): a store without it is another one of the same
    #: name. Empty: whatever mark is there will do.
    store_mark: str = ""
    #: Whether the cache takes uploads over HTTP, so that a worker need not see the object store.
    takes_uploads: bool = False
    #: What the cache wants NARs compressed with.
    compression: Compression = COMPRESSION
    #: Epoch of the coordinator over the journal; an agent follows none lower than it has seen.
    epoch: int = 0
    #: Lets the agent read the cache where that is private; a secret.
    cache_token: str = Field(default="", repr=False)


class Lease(WireMessage):
    """Names one lease on the wire."""

    step: str
    attempt: int


class BuildLimits(WireMessage):
    """Limits of one build: the fields of `scheduler.resource_limits.ResourceLimits`, by the same names.

    The aliases are the names on the wire.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    #: Seconds of wall time and of silence after which the build is stopped; 0 is no limit.
    timeout_s: int = 0
    silence_s: int = Field(default=0, alias="max_silent_s")
    #: Bytes of log that are kept and sent, its head and its tail; what is between is counted, not kept.
    log_bytes: int = Field(default=64 * 1024 * 1024, alias="max_log_bytes")
    #: Bytes of the NARs of all outputs together; 0 is no limit.
    output_bytes: int = Field(default=0, alias="max_output_bytes")
    #: Memory that the build should take; a hint, 0: not known.
    memory_bytes: int = 0

    def limit_of(self, reason: Reason) -> int:
        """The limit that a build ended at which ended for this reason; 0 where it did not end at one."""
        limits = {"timeout": self.timeout_s, "silence": self.silence_s, "output_size": self.output_bytes}
        return limits.get(reason, 0)


_LIMITS_ON_THE_WIRE = frozenset(field.alias or name for name, field in BuildLimits.model_fields.items())


class LeaseOrder(WireMessage):
    """One build to do. The agent parses `derivation` itself; no .drv file is needed on its machine.

    On the wire the fields of `limits` stand among the order's own, because agents of protocol 2 read them there. Those
    of before 2026-11-30 refuse a field that they do not know.
    """

    step: str
    attempt: int
    #: Full store path of the .drv; log names, sandbox names and fixed-output names derive from it.
    drv_path: str
    #: The .drv's bytes (ATerm).
    derivation: bytes
    #: Full store paths: input sources and the chosen outputs of input derivations, resolved by the coordinator.
    inputs: tuple[str, ...]
    limits: BuildLimits = BuildLimits()
    #: Lets the worker upload exactly this lease's outputs over HTTP; a secret.
    upload_token: str = Field(default="", repr=False)
    #: W3C trace context: the span that this attempt will be. The agent names it in its log and reports it back; "" from
    #: an older coordinator.
    traceparent: str = ""
    #: Processors that the build should have use for (`workers.agent.build_cores`); 0: not known. On the wire only for
    #: agents that take it.
    cores: Annotated[int, Field(ge=0, le=MAX_SLOTS)] = 0
    #: Leases of the same agent whose builds make inputs that may not be in the cache yet: it begins once these are
    #: built there, and hands the lease back where one of them ends otherwise. On the wire only for agents that take it.
    after: tuple[Lease, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _take_limits(cls, data: Any) -> Any:
        """Gather the limits that stand among the order's own fields."""
        if not isinstance(data, dict) or data.keys().isdisjoint(_LIMITS_ON_THE_WIRE):
            return data
        own = {name: value for name, value in data.items() if name not in _LIMITS_ON_THE_WIRE}
        return own | {"limits": {name: data[name] for name in _LIMITS_ON_THE_WIRE & data.keys()}}

    @model_serializer(mode="wrap")
    def _give_limits(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        del data["limits"]
        if not self.cores:
            del data["cores"]
        if not self.after:
            del data["after"]
        return data | self.limits.model_dump(by_alias=True)


class InputHint(WireMessage):
    """Inputs of a step that the agent should have next, which it may fetch while it builds. It may drop the hint."""

    step: Name
    #: Full store paths, as in `LeaseOrder`.
    inputs: tuple[str, ...]


class Stage(StrEnum):
    """Stages of a lease on its worker."""

    QUEUED = "queued"
    FETCHING = "fetching"
    BUILDING = "building"
    UPLOADING = "uploading"


class HeldLease(WireMessage):
    """A lease in the agent's hands."""

    step: Name
    attempt: int
    stage: Stage


HeldLeases = Annotated[tuple[HeldLease, ...], Field(max_length=MAX_HELD)]


class Hello(Introduction):
    """Description of an agent by itself."""

    #: The worker's name, unique in the farm.
    worker: Name
    #: New at every start of the agent.
    incarnation: Name
    systems: Names
    #: The part of `systems` that this machine does not really have (`--emulate`).
    emulated: Names
    features: Names
    mandatory_features: Names
    slots: Annotated[int, Field(ge=0, le=MAX_SLOTS)]
    capacity: Annotated[int, Field(ge=0, le=MAX_HELD)]
    #: Why the worker should get no leases for now (a failing trial build, a full disk); empty while it is fit.
    unfit: Sentence = ""
    #: How builds are kept from its machine; None: it did not measure it (it runs an older drover, or could build no
    #: canary).
    isolation: IsolationGrade | None = None
    #: Whether it takes fixed-output builds, which may use the network (`NETWORK_FEATURE`).
    network: bool = True
    #: Memory of its machine; 0: not known.
    memory_bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)] = 0
    #: Whether it reads `LeaseOrder.cores`.
    takes_cores: bool = False
    #: Whether it reads `LeaseOrder.after`.
    takes_successors: bool = False
    #: Whether it answers `fetch_ahead`.
    takes_hints: bool = False
    nix_version: Name
    leases: HeldLeases


class Output(WireMessage):
    """One output as it lies in the object store. Hashes are `sha256:<52 nix32 characters>`, sizes bytes."""

    name: str
    #: Full store path.
    path: str
    nar_hash: str
    nar_size: int
    #: Base names, sorted, itself included where it refers to itself.
    references: tuple[str, ...]
    ca: str = ""
    #: Key in the object store, relative to its root.
    url: str
    compression: str
    file_hash: str
    file_size: int

    @classmethod
    def of(cls, name: str, narinfo: NarInfo) -> Output:
        """Return the output that a path is, stored as its narinfo says."""
        path, stored = narinfo.path, narinfo.stored
        return cls(
            name=name, path=path.store_path, nar_hash=path.nar_hash, nar_size=path.nar_size, references=path.references,
            ca=path.ca, url=stored.url, compression=stored.compression, file_hash=stored.file_hash,
            file_size=stored.file_size,
        )  # fmt: skip

    def narinfo(self, deriver: str = "") -> NarInfo:
        """Return what the worker claims with it; `deriver` is the base name of its .drv."""
        path = PathInfo(self.path, self.nar_hash, self.nar_size, self.references, deriver, ca=self.ca)
        return NarInfo(path, StoredNar(self.url, self.compression, self.file_hash, self.file_size))


class Succeeded(WireMessage):
    """Outputs are built and uploaded."""

    kind: Literal["succeeded"] = "succeeded"
    outputs: tuple[Output, ...]


class Failed(WireMessage):
    """`reason` is a value of `scheduler.model.FailureKind`; the agent's `lease_machine` decides it."""

    kind: Literal["failed"] = "failed"
    reason: Reason
    message: str
    #: The limit that the build ended at, seconds or bytes; 0 where it was none.
    limit: int = 0
    #: Full paths that the farm's cache does not have and the build needs. The coordinator looks for itself.
    missing: Annotated[tuple[str, ...], Field(max_length=MAX_MISSING)] = ()
    #: As in `scheduler.model.Failure`.
    signature: Annotated[str, Field(pattern=r"\A[0-9a-f]{0,64}\z")] = ""


class Report(WireMessage):
    """The end of a lease; kept in the agent's outbox until it is acknowledged."""

    kind: Literal["report"] = "report"
    step: str
    attempt: int
    #: Unix seconds; 0 where the stage was never reached.
    started_at: float
    building_at: float
    built_at: float
    ended_at: float
    result: Annotated[Succeeded | Failed, Field(discriminator="kind")]
    #: None from an agent that measures nothing (an older drover).
    measures: Measures | None = None


class StageChange(WireMessage):
    """A lease moved on, or its builder announced a phase (`@nix` setPhase)."""

    kind: Literal["stage"] = "stage"
    step: str
    attempt: int
    stage: Stage
    phase: str = ""
    at: float


class LogChunk(WireMessage):
    """Raw log bytes; `offset` counts from the start of this attempt's log, so a repeat can be recognised."""

    kind: Literal["log"] = "log"
    step: str
    attempt: int
    offset: int
    data: bytes


AgentEvent = Annotated[Report | StageChange | LogChunk, Field(discriminator="kind")]


class Vitals(WireMessage):
    """Load of a worker's machine at the last look; None where the machine does not measure it."""

    #: Load average over a minute, divided by the number of processors.
    load: float | None = None
    #: Parts (0 to 1) of the last 10 s in which some task waited: Linux pressure stall information.
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None
    memory_available_bytes: int | None = None
    #: Room on the fullest of the disks that builds use.
    disk_free_bytes: int | None = None


class Transfer(WireMessage):
    """Inputs or outputs of a lease on their way at the moment of an answer: no event, so it is never kept or repeated.

    Bytes are of NARs, unpacked, of all paths of the lease together.
    """

    step: str
    attempt: int
    direction: Literal["fetch", "upload"]
    #: Store path whose bytes moved last.
    path: Annotated[str, Field(max_length=1024)]
    #: Where they come from, or go to.
    source: FetchSource
    done_bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)]
    #: None where it is not known.
    size_bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)] | None = None


class Batch(WireMessage):
    """One answer of `events`: everything after the acknowledged sequence number that fits."""

    incarnation: Name
    #: Sequence number of the last event in here; acknowledge it once it is safe.
    last: int
    events: Annotated[tuple[AgentEvent, ...], Field(max_length=MAX_EVENTS)]
    #: How many leases the agent is willing to hold in all, now.
    capacity: Annotated[int, Field(ge=0, le=MAX_HELD)]
    leases: HeldLeases
    draining: bool = False
    #: As in `Hello`.
    unfit: Sentence = ""
    #: As in `Hello`, once it differs from the latest `Hello`.
    isolation: IsolationGrade | None = None
    #: The agent's time when it got the call, and when it answered; None from an older drover.
    received_at: float | None = None
    answered_at: float | None = None
    #: None: the agent runs an older drover, or has not looked yet.
    vitals: Vitals | None = None
    #: Slots that it offers now and why these are not all (`workers.agent.admission`); None: all.
    offered: Annotated[int, Field(ge=0, le=MAX_SLOTS)] | None = None
    offers_less: Sentence = ""
    #: How often its store has deleted garbage since the agent started: what it had may be gone.
    collections: Annotated[int, Field(ge=0, le=MAX_HELD)] = 0
    #: At most one for each lease.
    transfers: Annotated[tuple[Transfer, ...], Field(max_length=MAX_TRANSFERS)] = ()


ORDERS: TypeAdapter[tuple[LeaseOrder, ...]] = TypeAdapter(tuple[LeaseOrder, ...])
LEASES: TypeAdapter[tuple[Lease, ...]] = TypeAdapter(tuple[Lease, ...])
OUTPUTS: TypeAdapter[tuple[Output, ...]] = TypeAdapter(tuple[Output, ...])
