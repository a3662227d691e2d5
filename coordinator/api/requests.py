"""Requests of clients as JSON: bounded models, because the sender of a request is a stranger."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from coordinator.api.limits import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_BRANCH,
    MAX_COMMIT,
    MAX_IDEMPOTENCY_KEY,
    MAX_LIMIT,
    MAX_PAIRS,
    MAX_PLANNED,
    MAX_PULL,
    MAX_ROOTS,
    MAX_TAG_KEY,
    MAX_TAG_VALUE,
    MAX_TAGS,
    MAX_TEXT_BYTES,
    MAX_UNEVALUATED,
    MAX_WAIT_S,
    TAG_KEY,
)
from coordinator.api.root_limits import RootLimits
from coordinator.api.trace_context import MAX_TRACEPARENT
from coordinator.wishes.document import WishListDocument

#: Characters of an output's name; Nix makes it part of a store path's name, which has at most 211.
MAX_OUTPUT_LENGTH = 211


class Request(BaseModel):
    """Base of the API's requests. Each is built when it is first used, because a command uses few of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


#: Base names of store paths; the error names the first that is none, and no other.
Names = Annotated[tuple[Annotated[str, Field(max_length=255)], ...], FailFast()]


def _short(text: str) -> str:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_TEXT_BYTES} are taken")
    return text


#: What people call something. The length in characters is looked at first: that costs nothing.
_Text = Annotated[str, Field(max_length=MAX_TEXT_BYTES), AfterValidator(_short)]


#: A Nix expression.
_Code = Annotated[str, Field(max_length=64 * 1024)]


class RootRequest(Request):
    """One wish: an attribute of the evaluated file and the derivation it stands for (`outputs` empty: all)."""

    attr: _Text
    drv: _Text
    outputs: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_OUTPUT_LENGTH)], ...], Field(max_length=64), FailFast()
    ] = ()
    limits: RootLimits | None = None


class ClientStage(Request):
    """Work of the client before it submitted, for the trace. Times are the client's, Unix seconds."""

    name: Literal["evaluate", "closure", "upload"]
    begin: Annotated[float, Field(allow_inf_nan=False, ge=0)]
    end: Annotated[float, Field(allow_inf_nan=False, ge=0)]


#: Text in which nothing is hidden: neither control characters nor such as reorder what stands around them.
_Plain = Annotated[
    str, Field(pattern="^[^\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]*$")
]


#: Random name of one run of a client: of several with one idempotency key one grows the submission, the others wait.
_Client = Annotated[str, Field(pattern="^[0-9A-Za-z_-]{0,64}$")]


class SubmissionOrigin(Request):
    """Origin of a submission by its client's word; its owner follows from the token and is never read here."""

    branch: Annotated[_Plain, Field(max_length=MAX_BRANCH)] = ""
    #: Pull or merge request, as its forge names it.
    pull: Annotated[_Plain, Field(max_length=MAX_PULL)] = ""
    commit: Annotated[_Plain, Field(max_length=MAX_COMMIT)] = ""
    tags: Annotated[
        dict[
            Annotated[str, Field(max_length=MAX_TAG_KEY, pattern=f"^{TAG_KEY}$")],
            Annotated[_Plain, Field(max_length=MAX_TAG_VALUE)],
        ],
        # Keys that do not have the pattern are refused, which pydantic's own description leaves out.
        Field(max_length=MAX_TAGS, json_schema_extra={"additionalProperties": False}),
    ] = {}
    #: Of several submissions of one owner the higher goes first.
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = 0
    #: It takes the place of older ones of the same owner, pull request (else branch), label and `repository` tag.
    supersede: bool = False
    #: Seconds from now, or the Unix time, at which it is withdrawn unless it has ended; 0: never.
    deadline_s: Annotated[int, Field(ge=0, le=MAX_WAIT_S)] = 0
    deadline_at: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    #: The first root that fails withdraws the rest.
    fail_fast: bool = False
    #: Another request of the same owner with this key and the same wish gets the same submission.
    idempotency_key: Annotated[str, Field(max_length=MAX_IDEMPOTENCY_KEY, pattern=r"^[!-~]*$")] = ""


class SubmitRequest(SubmissionOrigin):
    """A submission of derivations that the coordinator already has. One that is not `open` has a root."""

    roots: Annotated[tuple[RootRequest, ...], Field(max_length=MAX_ROOTS), FailFast()]
    #: Further roots follow (`GrowRequest`): the submission does not end before it is sealed.
    open: bool = False
    client: _Client = ""
    #: SHA-256 of what an open one is evaluated from, as its client says it; empty: unsaid. Another one under the same
    #: idempotency key is another wish.
    evaluates: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    label: _Text = ""
    #: Build again what is known to fail.
    retry_failed: bool = False
    #: Seconds that a step waits while no worker that could build it is there, before it fails; 0 is for ever, None the
    #: farm's own limit. The most patient submission counts; kept where it runs again.
    wait_s: Annotated[int, Field(ge=0, le=MAX_WAIT_S)] | None = None
    #: Further derivations, full .drv paths: built where one makes an input source that the cache lacks.
    makers: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()
    #: W3C trace context of the program that submits; text that is none begins a trace of its own.
    traceparent: Annotated[str, Field(max_length=MAX_TRACEPARENT)] = ""
    stages: Annotated[tuple[ClientStage, ...], Field(max_length=8)] = ()


class GrowRequest(Request):
    """Further roots of an open submission; those that it has already change nothing. None: its client still works."""

    roots: Annotated[tuple[RootRequest, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()
    #: As in `SubmitRequest`.
    makers: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()
    retry_failed: bool = False
    client: _Client = ""


class UnevaluatedAttr(Request):
    """An attribute that could not be evaluated, and why; `attr` empty: the whole of what was asked for."""

    attr: _Text = ""
    kind: Annotated[str, Field(max_length=64)] = "error"
    message: _Text = ""


class SealRequest(Request):
    """The end of an open submission's growth."""

    #: The first of those that could not be evaluated, and how many there are.
    not_evaluated: Annotated[tuple[UnevaluatedAttr, ...], Field(max_length=MAX_UNEVALUATED), FailFast()] = ()
    unevaluated: Annotated[int, Field(ge=0, le=MAX_ROOTS * 10)] = 0
    #: Why more was to come, where it was; empty: all roots have come.
    incomplete: _Text = ""
    #: What the client did meanwhile.
    stages: Annotated[tuple[ClientStage, ...], Field(max_length=8)] = ()
    client: _Client = ""
    #: Derivations that the client has named as roots, each once; None: unsaid. A client that did not grow it learns by
    #: this that it wishes something else.
    drv_count: Annotated[int, Field(ge=0, le=MAX_ROOTS * 10)] | None = None


class IntakeQuery(Request):
    """Base names of the closure: .drv files and input sources."""

    store_dir: Annotated[str, Field(max_length=4096)]
    derivations: Names
    sources: Names
    #: Those of `sources` that something built: they cannot be sent, so the farm looks for them in its upstreams.
    built: Names = ()


class ForecastQuery(Request):
    """Derivations that the coordinator has, full .drv paths, of which a submission would consist."""

    drvs: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_ROOTS), FailFast()]


class PlannedDerivation(Request):
    """A derivation of the asker's machine, by its word alone: a plan counts it, and nothing is stored of it."""

    #: Base name of the .drv, full paths of its outputs by the order of their names, and its system.
    drv: Annotated[str, Field(max_length=255)]
    outputs: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=64), FailFast()]
    system: Annotated[str, Field(max_length=64)]
    #: Derivations that it needs: places in the list before its own, and base names of those that the farm has.
    needs: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MAX_PLANNED)], ...], Field(max_length=MAX_PLANNED), FailFast()
    ] = ()
    known: Names = ()


class PlanQuery(Request):
    """A wish list, and which of its store paths are on the asker's machine already."""

    wishes: WishListDocument
    #: Derivations that the wishes stand on and the farm does not have, inputs first.
    graph: Annotated[tuple[PlannedDerivation, ...], Field(max_length=MAX_PLANNED), FailFast()] = ()
    present: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()


class PairsQuery(Request):
    """Pairs of full store paths: each of `before` with the one at its place in `after`."""

    before: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_PAIRS), FailFast()]
    after: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_PAIRS), FailFast()]


class BumpRequest(Request):
    """Another priority of a submission; None: one above all that wait of its owner."""

    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] | None = None


class DrainRequest(Request):
    """Body of a request that drains a worker or ends its drain."""

    on: bool = True


class PinRequest(Request):
    """Full store paths to keep with all that they refer to; `expires_at` 0: until unpinned."""

    paths: Annotated[
        tuple[Annotated[str, Field(max_length=4096)], ...], Field(min_length=1, max_length=10_000), FailFast()
    ]
    expires_at: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class MirrorRequest(Request):
    """Full store paths to have from upstreams, with all that they refer to, and the name under which they are kept."""

    paths: Annotated[
        tuple[Annotated[str, Field(max_length=4096)], ...], Field(min_length=1, max_length=10_000), FailFast()
    ]
    #: A later run of the same owner takes the place of an earlier one of this name; empty: a name of its own.
    keep_as: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._/+-]{0,199})?$")] = ""
    #: False: the upstreams are not asked; it only says what is here, and keeps it.
    pull: bool = True


class KnownDerivationsQuery(Request):
    """Full paths of derivations, and of outputs whose derivations are looked for."""

    derivations: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()
    outputs: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()


class CollectRequest(Request):
    """A wish for a garbage collection; `dry_run` changes nothing and gives the same numbers."""

    dry_run: bool = False


class VerifyRequest(Request):
    """`full` reads every object; `repair` fetches again what is broken, and hides what cannot be had."""

    full: bool = False
    repair: bool = False


#: An argument of an evaluation: its name, and an expression or a text.
_Argument = tuple[Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_'-]*$")], _Code]


class RemoteEvaluationRequest(SubmissionOrigin):
    """An evaluation on the coordinator's machine: of a tree that was sent, or of a revision of a git repository.

    A repeat with the same idempotency key gets the evaluation that goes on; after a restart, its submission.
    """

    #: SHA-256 of the NAR of a tree that was sent, in hexadecimal; or else `git` and `rev`.
    tree: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    git: Annotated[str, Field(max_length=2048)] = ""
    #: A commit, or a name of one.
    rev: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._/+-]{0,254})?$")] = ""
    #: Path in the tree, `PATH#ATTR` for the output of a flake; or else `expression`.
    file: _Text = ""
    expression: _Code = ""
    #: Directory of the tree where relative paths of `expression` and of arguments begin.
    directory: _Text = ""
    attrs: Annotated[tuple[_Text, ...], Field(max_length=1000), FailFast()] = ()
    systems: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}-[a-z0-9_]{1,32}$")], ...],
                       Field(max_length=32), FailFast()] = ()  # fmt: skip
    args: Annotated[tuple[_Argument, ...], Field(max_length=100), FailFast()] = ()
    argstrs: Annotated[tuple[_Argument, ...], Field(max_length=100), FailFast()] = ()
    #: Seconds that one attribute may take; 0: as long as the farm lets an evaluation.
    timeout_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)] = 0.0
    #: As in `SubmitRequest`.
    label: _Text = ""
    retry_failed: bool = False
    wait_s: Annotated[int, Field(ge=0, le=MAX_WAIT_S)] | None = None
    traceparent: Annotated[str, Field(max_length=MAX_TRACEPARENT)] = ""


#: Name of an owner, as in `[[owners]]`.
_Owner = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
_System = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}-[a-z0-9_]{1,32}$")]


class TrackRequest(Request):
    """The source of an environment, and its owners."""

    kind: Literal["push", "file", "git"]
    #: File or directory of the coordinator's machine; of git: the file in the tree, empty for one of a known name.
    path: _Text = ""
    url: Annotated[str, Field(max_length=2048)] = ""
    #: Branch or tag; empty: the repository's HEAD.
    ref: Annotated[str, Field(max_length=200)] = ""
    #: System of store paths that do not say theirs; empty: the coordinator's.
    system: _System | Literal[""] = ""
    #: Owners whose tokens may change it; none: the one who asks.
    owners: Annotated[tuple[_Owner, ...], Field(max_length=16), FailFast()] = ()


class PushSubmissionRequest(Request):
    """A submission whose roots an environment is to consist of."""

    submission: Annotated[str, Field(min_length=1, max_length=64)]
    #: What the source calls this content, such as a commit; empty: the submission's commit, or its digest.
    mark: Annotated[_Plain, Field(max_length=MAX_COMMIT)] = ""


class RollbackRequest(Request):
    """Systems whose pointer moves back (none: all), and to which revision (0: where it was before)."""

    systems: Annotated[tuple[_System, ...], Field(max_length=16), FailFast()] = ()
    to: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0
