"""A route of the HTTP API as a value: routing, the rights check, addresses and the API's description follow from it.

Clients import this module for one short question, so it imports no pydantic: requests are named, not imported.
"""

from __future__ import annotations

import re
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from infra.records import record

if TYPE_CHECKING:
    from pydantic import BaseModel

    from infra.upload.protocol import UploadMessage

#: Refusals that any route may answer: malformed, no right, a compressed body, a foreign host name, a fault of ours, not
#: now.
EVERY_ROUTE: Final = (400, 401, 415, 421, 500, 503)
#: A dynamic part of a path, `{name}` or `{name:pattern}`, whose pattern may hold a repetition such as `{32}`.
_PART: Final = re.compile(r"\{(\w+)(?::(?:[^{}]|\{[^{}]*\})+)?\}")

_Answer = TypeVar("_Answer")


class Right(StrEnum):
    """Rights that a request must prove by `Authorization`: `Bearer TOKEN`, or the password of `Basic`."""

    #: Nothing.
    NONE = "none"
    #: The API token or one of an owner, as `Bearer`.
    API = "api"
    #: The API token, as `Bearer`.
    OPERATE = "operate"
    #: The cookie of a browser's session, or the API token as `Bearer`.
    PAGE = "page"
    #: The cookie of a session, its CSRF token in the form, and an `Origin` that is the coordinator's own.
    CHANGE = "change"
    #: A reader's or a writer's token of the cache; nothing where the cache is public.
    READ = "read"
    #: A writer's token of the cache.
    WRITE = "write"
    #: A writer's token of the cache, or the token of one lease of it (for that lease's outputs alone).
    UPLOAD = "upload"


class Content(StrEnum):
    """Content type of a body or an answer that is no model."""

    #: Framing: `coordinator.api.streams`.
    DERIVATIONS = "application/x-drover-derivations"
    SOURCES = "application/x-drover-sources"
    #: `infra.upload.packs`.
    PACK = "application/x-drover-pack"
    #: `coordinator.api.trees`.
    TREE = "application/x-drover-tree"
    #: A lock file, a list of store paths, or lines of nix-eval-jobs: `coordinator.wishes`.
    WISHES = "application/x-drover-wishes"
    #: Server-sent `WatchEvent`s: `snapshot`, then `step`, `transfers` and `counts`, at last `end`.
    EVENTS = "text/event-stream"
    #: Raw bytes of a build log, chunked while it is followed.
    LOG = "text/plain"
    PAGE = "text/html"
    #: Server-sent events: `parts` (JSON: name of a part of the page -> its HTML), at last `end`.
    PARTS = "text/event-stream; parts"
    FORM = "application/x-www-form-urlencoded"
    ASSET = "text/css, text/javascript, image/svg+xml"
    #: OpenAPI 3.1.
    OPENAPI = "application/json; openapi"
    HEALTH = "application/json; status"
    METRICS = "text/plain; version=0.0.4"
    #: What Nix defines.
    CACHE_INFO = "text/x-nix-cache-info"
    NARINFO = "text/x-nix-narinfo"
    NAR = "application/x-nix-nar"
    LISTING = "application/json; listing"
    REALISATION = "application/json; realisation"
    #: `{"narinfos": [text], "missing": [base name], "next": text}`, a narinfo a line.
    NARINFOS = "application/json; narinfos"
    #: Systems, each with the revision that is stable there and its store paths; and the same as a Nix expression.
    POINTER = "application/json; pointer"
    NIX = "text/x-nix"
    #: A plain file.
    FILE = "application/octet-stream; file"
    #: Any bytes, which are dropped.
    DROPPED = "application/octet-stream"

    @property
    def media_type(self) -> str:
        """The content type without what only distinguishes two of them here."""
        return self.value.partition(";")[0]

    @property
    def is_json(self) -> bool:
        """True for a JSON value."""
        return self.media_type == "application/json"


#: Classes of `coordinator.api.requests`.
RequestName: TypeAlias = Literal[
    "IntakeQuery",
    "SubmitRequest",
    "GrowRequest",
    "SealRequest",
    "BumpRequest",
    "DrainRequest",
    "PinRequest",
    "CollectRequest",
    "VerifyRequest",
    "ForecastQuery",
    "PairsQuery",
    "PlanQuery",
    "RemoteEvaluationRequest",
    "MirrorRequest",
    "KnownDerivationsQuery",
    "TrackRequest",
    "PushSubmissionRequest",
    "RollbackRequest",
]


@record(frozen=True)
class Query:
    """One parameter of a query, `?name=…`; each may be left out."""

    name: str
    summary: str
    type: Literal["string", "integer", "boolean"] = "string"
    minimum: int = 0
    #: Words that it may be, one or several with commas between; none: any text.
    words: tuple[str, ...] = ()
    #: Regular expression of the text; empty: any.
    pattern: str = ""


#: Most digits of a number in a query.
NUMBER_DIGITS: Final = 9
#: What a list takes beside its own.
LIMIT: Final = Query("limit", "Rows of a page: 100 if left out, and never more than 1000.", "integer", minimum=1)
AFTER: Final = Query(
    "after", "Cursor of the page, from the `Link` of the page before.", pattern=f"^[0-9]{{1,{NUMBER_DIGITS}}}$"
)


@record(frozen=True)
class Late(Generic[_Answer]):
    """The record of an answer, which is imported when it is needed: clients have the whole table and read few answers.

    `module` is one of `coordinator.api`.
    """

    module: str
    name: str

    def record(self) -> type[_Answer]:
        """Import it."""
        found: type[_Answer] = getattr(import_module(f"coordinator.api.{self.module}"), self.name)
        return found


@record(frozen=True)
class Route(Generic[_Answer]):
    """One method of one address. `path` begins with `/`, or, below a cache's prefix, with `{prefix}/`."""

    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: str
    right: Right
    #: The request's body: a model (by its name where clients send it), or bytes of that content.
    body: type[BaseModel | UploadMessage] | RequestName | Content | None = None
    #: The answer's body; None: there is none.
    answer: type[_Answer] | Late[_Answer] | Content | None = None
    #: The answer is a page of a list of these.
    many: bool = False
    status: int = 200
    #: Statuses of refusals beside `EVERY_ROUTE`.
    errors: tuple[int, ...] = ()
    #: A client whose answer was lost sends the request again: that changes nothing more. None: all methods but POST.
    repeats: bool | None = None
    #: HEAD is answered wherever GET is, except for streams that do not end by themselves.
    head: bool = True
    #: One or two sentences for people who call the API.
    summary: str = ""
    #: Parameters of its query, beside `LIMIT` and `AFTER` of a list.
    query: tuple[Query, ...] = ()

    @property
    def answered(self) -> type[_Answer] | Content | None:
        """The answer's body, imported."""
        return self.answer.record() if isinstance(self.answer, Late) else self.answer

    @property
    def may_repeat(self) -> bool:
        """True where a request that is sent twice changes no more than once."""
        return self.method != "POST" if self.repeats is None else self.repeats

    @property
    def queries(self) -> tuple[Query, ...]:
        """All parameters of its query."""
        own = {query.name for query in self.query}
        return (*self.query, *(query for query in (LIMIT, AFTER) if self.many and query.name not in own))

    def named(self, name: str) -> Query:
        """Return one parameter of its query. Raises `StopIteration` without it."""
        return next(query for query in self.queries if query.name == name)

    def below(self, prefix: str) -> str:
        """Return the path as a router takes it, for a cache at `prefix`."""
        return prefix + self.path.removeprefix("{prefix}")

    def address(self, prefix: str = "", /, **parts: str) -> str:
        """Return the path with its parts filled in, each as one segment.

        Names in `parts` that the path lacks are passed over. Raises `KeyError` for a part that is not given.
        """
        return _PART.sub(lambda found: quote(parts[found[1]], safe=""), self.below(prefix))
