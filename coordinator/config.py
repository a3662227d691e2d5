"""Settings of a coordinator: a TOML file (`drover up --config FILE`), the environment (`DROVER_…`), arguments.

Arguments win over the environment, the environment over the file, the file over the defaults, for each setting of a
section too. Unknown names are errors: a setting that is silently ignored is worse than none.

    state_dir = "/var/lib/drover"
    port = 7878

    [[workers]]
    name = "native"
    slots = 2

    [[workers]]
    name = "mac"
    emulate = ["aarch64-darwin"]
    nix_options = { sandbox-paths = "/bin/sh=/bin/busybox" }

    [cache]                                  # the one at /cache; public unless it has readers
    writers = ["/etc/drover/ci-tokens"]      # a file of mode 0600, one token a line; or "env:NAME"

    [[caches]]                               # another, at /cache/team1, that shares nothing with the first
    name = "team1"
    readers = ["env:TEAM1_READERS"]
    signing_keys = ["/etc/drover/team1.key"]
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from coordinator.addresses import cache_database_url, is_http_address, server_url
from coordinator.defaults import HOST, OPERATOR, PORT, default_state_dir
from coordinator.demand_settings import DemandSettings
from coordinator.environment_settings import EnvironmentSettings
from coordinator.errors import CoordinatorError
from coordinator.remote_settings import RemoteEvaluationSettings
from coordinator.source_settings import SourceSettings
from infra.objects.compression import COMPRESSION, Compression
from infra.validation import first_fault
from scheduler.policy import MAX_WEIGHT

#: What the cache at `/cache` is called where caches have names.
DEFAULT_CACHE: Final = "default"
#: First parts of addresses below `/cache`, which therefore cannot name a cache.
RESERVED_CACHE_NAMES: Final = frozenset(
    {DEFAULT_CACHE, "build-trace-v2", "debuginfo", "environments", "incoming", "log", "nar", "narinfos"}
    | {"nix-cache-info", "realisations", "uploads"}
)

#: Owners of one farm: a grant of a lease may look at all of them.
MAX_OWNERS: Final = 64

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class ConfigError(CoordinatorError):
    """A setting is missing, unknown or has a value that cannot be used."""

    code = "bad_config"


class WorkerConfig(BaseModel):
    """One worker that `drover up` starts on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Unique in the farm.
    name: _Name
    #: Empty: what the machine's Nix builds for, or none of its own where the worker emulates.
    systems: tuple[str, ...] = ()
    #: Systems that the machine only pretends to be (`extra-platforms`).
    emulate: tuple[str, ...] = ()
    #: Features beside those that Nix assumes of every machine.
    features: tuple[str, ...] = ()
    #: Features of which a build must ask for all to come here; they are offered as well.
    mandatory_features: tuple[str, ...] = ()
    #: Whether the features that Nix assumes of every machine are offered.
    default_features: bool = True
    #: NIX_BUILD_CORES of builders; 0 is the machine's cores divided by the slots, for `big-parallel` by what runs.
    build_cores: Annotated[int, Field(ge=0)] = 0
    #: Builds at one time; 0 is one per core.
    slots: Annotated[int, Field(ge=0, le=1024)] = 0
    #: Whether it offers fewer while its machine is short of memory, or others keep its processors busy.
    yield_to_others: bool = True
    #: Root of a chroot store of the worker's own; empty: a directory below the state directory.
    store: str = ""
    #: MiB that must be free on its disks, or it takes no work; 0: it does not look.
    min_free_mb: Annotated[int, Field(ge=0)] = 512
    #: Whether its store deletes garbage when the disk runs low; unset: where the store is the worker's own.
    collect_garbage: bool | None = None
    #: Seconds between two trial builds while it is idle; 0: none.
    trial_every_s: Annotated[int, Field(ge=0)] = 600
    #: Seconds between two canaries, which measure how builds are isolated; 0: at the start and after doubt only.
    canary_every_s: Annotated[int, Field(ge=0)] = 4 * 3600
    #: IPv4 networks that its fixed-output builds reach although they are denied, and others that they do not reach.
    network_allow: tuple[str, ...] = ()
    network_deny: tuple[str, ...] = ()
    #: Whether fixed-output builds come here at all, and how many run at one time; `mandatory_features = ["network"]`:
    #: nothing else does.
    network: bool = True
    fetches: Annotated[int, Field(ge=1, le=1024)] = 8
    #: Nix settings of this worker only; they win over the farm's.
    nix_options: dict[str, str] = Field(default_factory=dict)


class LimitSettings(BaseModel):
    """Named bounds. Sizes are bytes, times seconds; 0 means no limit only where the bound's own text names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Members of one submission's closure.
    graph_size: Annotated[int, Field(ge=1)] = 500_000
    #: Body of a JSON request (an intake question about 500,000 names is some 60 MB).
    request_bytes: Annotated[int, Field(ge=1024)] = 128 * 1024 * 1024
    #: Wall time and silence of one build; 0 is no limit.
    build_timeout_s: Annotated[int, Field(ge=0)] = 0
    build_silence_s: Annotated[int, Field(ge=0)] = 0
    #: NARs of all outputs of one build; 0 is no limit.
    build_output_bytes: Annotated[int, Field(ge=0)] = 0
    #: Log kept of one attempt, its head and its tail; what is between is counted, not kept.
    log_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024
    #: How long a build that failed by its own fault is taken for known to fail; 0 is never.
    failure_ttl_s: Annotated[float, Field(ge=0)] = 24 * 3600.0
    #: How long a build waits while no worker that could do it is there, before it fails; 0 is for ever. The time starts
    #: anew when such a worker has been there, and when the coordinator starts.
    give_up_s: Annotated[float, Field(ge=0)] = 24 * 3600.0
    #: How long a submission whose client still evaluates waits for a sign of its client before it is closed as
    #: incomplete; what it has goes on building.
    open_silence_s: Annotated[float, Field(gt=0)] = 15 * 60.0
    #: Failed attempts beyond the first of each build that one submission may cost at once, and again in each hour.
    #: Beyond it what fails of it waits before it is tried again. 0 is no limit.
    retries_per_hour: Annotated[int, Field(ge=0)] = 200
    #: How long a submission that ended is remembered (`drover status`, `why`, `retry`); 0 is for ever.
    history_days: Annotated[float, Field(ge=0)] = 30.0
    #: How long build logs are kept, in the object store; 0 is for ever.
    log_days: Annotated[float, Field(ge=0)] = 90.0
    #: Steps in memory beyond which submissions that ended are forgotten earlier, some 1.7 KB each; 0 is no limit.
    history_steps: Annotated[int, Field(ge=0)] = 200_000
    #: How long the timing of an attempt is kept (`drover story`, `drover history`), and how many attempts at most, some
    #: 1 KB each; 0 is no limit.
    timings_days: Annotated[float, Field(ge=0)] = 90.0
    timings_rows: Annotated[int, Field(ge=0)] = 1_000_000
    #: How long a worker, which reports every 10 s, may be silent before its builds are done elsewhere. It is taken
    #: back when it reports again.
    worker_silence_s: Annotated[float, Field(ge=20)] = 120.0
    #: Bytes of NARs, unpacked, that one run of `drover populate` may fetch from upstreams; 0 is no limit.
    populate_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**3
    #: Watch streams open at one time.
    watchers: Annotated[int, Field(ge=1)] = 1000
    #: HTTP connections at one time, in all and from one address that is not loopback. Lowered to what the limit of open
    #: files allows (`ulimit -n`, raised to the hard limit at start); watch streams get half of them.
    connections: Annotated[int, Field(ge=8)] = 4096
    connections_per_address: Annotated[int, Field(ge=1)] = 256


class Redirect(StrEnum):
    """Choice of answer for a NAR in a remote store: its bytes, or a redirect to its presigned address."""

    #: Where the store's host name is not the coordinator's: clients send their credentials to a host, whatever its
    #: port, and S3 refuses presigned requests that carry any.
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class UploadRoute(StrEnum):
    """Route of objects that workers and people upload over HTTP."""

    #: Straight to the object store where that is S3, else through the coordinator.
    AUTO = "auto"
    #: Through the coordinator: for senders that cannot reach the object store.
    RELAY = "relay"


class Populating(StrEnum):
    """Choice of what populating a cache does with a path that an upstream has."""

    #: Its bytes are fetched, verified and published.
    MIRROR = "mirror"
    #: Only its signed narinfo is kept: the path can be had there. What a mirrored path stands on is mirrored all the
    #: same.
    RECORD = "record"


class UpstreamSettings(BaseModel):
    """Another binary cache that is trusted for what its keys have signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Its address, as in `substituters`.
    url: Annotated[str, Field(pattern=r"^https?://")]
    #: `name:base64`, as in `trusted-public-keys`.
    public_keys: Annotated[tuple[str, ...], Field(min_length=1)]
    #: Whether `drover populate` has the bytes of its paths here, or only records that they can be had there.
    populate: Populating = Populating.MIRROR


class CacheSettings(BaseModel):
    """One cache: who may use it, how it signs, what it keeps. Tokens and keys are named, never written here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Sources of tokens that may read: a file (mode 0600, one token a line) or `env:NAME`. Empty: everybody may.
    readers: tuple[str, ...] = ()
    #: Sources of tokens that may write (and read). The API token may write to the cache at `/cache` too.
    writers: tuple[str, ...] = ()
    #: Sources of signing keys, a file (mode 0600) or `env:NAME` each; every narinfo is signed by all of them. Empty:
    #: a key that is made on the first start and lies in the state directory.
    signing_keys: tuple[str, ...] = ()
    #: Lower wins; cache.nixos.org has 40, so what the farm built is fetched from the farm.
    priority: Annotated[int, Field(ge=0, le=1000)] = 30
    #: Size budget of the objects: beyond it whole roots expire, least recently used first. 0 is no limit.
    max_bytes: Annotated[int, Field(ge=0)] = 0
    #: What NARs that come from now on are compressed with; those that are there stay as they are. zstd is the fastest
    #: to read and write, but Nix 2.3 does not read it; every Nix reads xz.
    compression: Compression = COMPRESSION
    #: How long what was built or pushed is kept, unless something else keeps it. 0 is for ever.
    retention_days: Annotated[float, Field(ge=0)] = 30.0
    #: What they have need not be pushed here; what broke here is fetched from them (`drover cache verify --repair`),
    #: and so are built paths that a submission names as sources.
    upstreams: tuple[UpstreamSettings, ...] = ()
    #: How long what nothing keeps stays on disk, invisible, before it is deleted; more than the longest download.
    grace_hours: Annotated[float, Field(ge=0)] = 24.0
    #: Pace of garbage collection; 0 collects on demand only.
    collect_every_hours: Annotated[float, Field(ge=0)] = 1.0
    #: Behind nginx: an internal location that maps to the object directory; NARs are then sent by nginx
    #: (`X-Accel-Redirect`). Needs a `file://` object store.
    accel_prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._-]+)*$")] = ""
    #: Whether a NAR in a remote store is answered by a redirect to a presigned address; `auto`: where the store's host
    #: name is not the coordinator's.
    redirect: Redirect = Redirect.AUTO
    #: How uploads travel; `auto`: straight to the object store where that is S3, else through the coordinator.
    uploads: UploadRoute = UploadRoute.AUTO

    def expiry(self, since: float) -> float | None:
        """Return when something that ended at `since` (Unix seconds) need no longer be kept; None for never."""
        return since + self.retention_days * 86400.0 if self.retention_days else None


class NamedCacheSettings(CacheSettings):
    """A cache at `/cache/NAME`, with its own metadata, objects, keys, readers and writers."""

    #: The NAME in `/cache/NAME`.
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]

    @field_validator("name", mode="after")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value in RESERVED_CACHE_NAMES:
            msg = f"a cache cannot be called {value}"
            raise ValueError(msg)
        return value


class OwnerSettings(BaseModel):
    """An owner of submissions: whom the holders of its tokens submit for, and its share of the farm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Shown with each submission; `api` is the owner of what the farm's own token submits.
    name: _Name
    #: Sources of its tokens: a file (mode 0600, one token a line) or `env:NAME`. Its tokens submit and ask; what
    #: changes the farm or another owner's submissions takes the farm's own token.
    tokens: tuple[str, ...] = ()
    #: Its share of each worker beside that of others while both have work that is ready; 2 gets twice as many builds.
    weight: Annotated[int, Field(ge=1, le=MAX_WEIGHT)] = 1

    @model_validator(mode="after")
    def _has_tokens(self) -> OwnerSettings:
        if not self.tokens and self.name != OPERATOR:
            msg = f"the owner {self.name} has no tokens, so nothing could be submitted for it"
            raise ValueError(msg)
        return self


#: The file that `load_settings` reads at the moment.
_file: ContextVar[Path | None] = ContextVar("config_file", default=None)


class Settings(BaseSettings):
    """All settings of a coordinator. Empty texts stand for what follows from `state_dir` and the address."""

    model_config = SettingsConfigDict(
        env_prefix="DROVER_", env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    #: Where the farm keeps what it knows; the default is `$XDG_STATE_HOME/drover` or `~/.local/state/drover`.
    state_dir: Path = Field(default_factory=default_state_dir)
    #: Where the coordinator listens; other machines reach it there, with the tokens that THREAT_MODEL.md describes.
    host: str = HOST
    #: 0 takes any free port; the coordinator prints the address that it got when the farm is ready.
    port: Annotated[int, Field(ge=0, le=65535)] = PORT
    #: Where the farm's secrets lie, and are made on the first start (`farm_secrets`); empty: the state directory. What
    #: a coordinator that stands by has a copy of.
    secrets_dir: Path | None = None
    #: `host:port` of a Ray head that runs elsewhere (`drover head`) and is not this coordinator's to start or end;
    #: empty: one of its own. Its token is `ray-token` among the secrets, or the file `ray_token`.
    ray_address: Annotated[str, Field(pattern=r"^(\S+:[0-9]{1,5})?$")] = ""
    ray_token: Path | None = None
    #: `host:port` of a Redis that keeps the head's tables, so that the head can move; empty: on this machine's disk.
    #: Farms that share a Redis have different namespaces.
    ray_redis: Annotated[str, Field(pattern=r"^([^\s/@]+:[0-9]{1,5})?$")] = ""
    ray_redis_namespace: _Name = "drover"
    #: Source of its password: a file (mode 0600) or `env:NAME`; empty: it wants none.
    ray_redis_password: str = ""
    #: This machine's address for Ray, and where a head listens; 127.0.0.1 is this machine alone, anything else needs a
    #: private network (Ray then listens on every interface, behind its token). Port 0 takes a free one.
    ray_host: str = HOST
    ray_port: Annotated[int, Field(ge=0, le=65535)] = 0
    #: Seconds that head, nodes and builds go on after a coordinator that was killed, for the next one to take over.
    ray_outlive_s: Annotated[float, Field(ge=0)] = 3600
    #: Seconds without a sign of life after which the Ray head gives a node up for good: a node that learns of it
    #: ends itself and its builds. More for machines behind a VPN, or that nap. The head's own setting counts.
    ray_silence_s: Annotated[float, Field(ge=10, le=86400)] = 35
    #: Whether Ray's autoscaler is asked for the slots that the open work could use, where the cluster has one.
    ray_autoscaler: bool = False
    #: Collector of traces, OTLP over HTTP, for example `http://collector:4318`; empty: the `OTEL_EXPORTER_OTLP_…`
    #: variables of the environment name it, or no traces are sent.
    otlp_endpoint: str = ""
    #: Seconds that running builds have to end when the farm is stopped; then they are handed back.
    stop_grace_s: Annotated[float, Field(ge=0)] = 30
    #: How workers and clients reach the coordinator; empty: from host and port.
    public_url: str = ""
    #: Where NARs lie; empty: `file://STATE_DIR/objects`.
    object_store_url: str = ""
    #: SQLAlchemy addresses (async drivers); empty: SQLite files in the state directory.
    journal_database_url: str = ""
    derivations_database_url: str = ""
    cache_database_url: str = ""
    timings_database_url: str = ""
    #: Empty: that of the derivations where it is PostgreSQL, else a file of its own.
    environments_database_url: str = ""
    #: Name part of the farm's signing key, made on the first start.
    key_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "drover-1"
    #: Logical store directory of every path that the farm builds.
    store_dir: Annotated[str, Field(pattern=r"^/.*[^/]$")] = "/nix/store"
    #: Named bounds, see `[limits]`.
    limits: LimitSettings = LimitSettings()
    #: Evaluation on this machine for clients, see `[remote_evaluation]`.
    remote_evaluation: RemoteEvaluationSettings = RemoteEvaluationSettings()
    #: Paths that clients miss in the cache, see `[demand]`, and ways by which fixed outputs come in, see `[sources]`.
    demand: DemandSettings = DemandSettings()
    sources: SourceSettings = SourceSettings()
    #: Tracked environments, see `[environments]`.
    environments: EnvironmentSettings = EnvironmentSettings()
    #: The cache at `/cache`, which the farm publishes to.
    cache: CacheSettings = CacheSettings()
    #: Further caches, at `/cache/NAME`.
    caches: tuple[NamedCacheSettings, ...] = ()
    #: Owners of submissions with tokens of their own, and shares of the farm.
    owners: Annotated[tuple[OwnerSettings, ...], Field(max_length=MAX_OWNERS)] = ()
    #: Workers on this machine; without any, `drover up` starts one called `native`.
    workers: tuple[WorkerConfig, ...] = ()
    #: Names of workers that may build although they isolate builds weakly (class C, see `drover workers`).
    weak_isolation: tuple[_Name, ...] = ()
    #: Nix settings of every worker.
    nix_options: dict[str, str] = Field(default_factory=dict)

    @field_validator("state_dir", "secrets_dir", "ray_token", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        return Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - resolve() would follow links

    @field_validator("otlp_endpoint", mode="after")
    @classmethod
    def _http_address(cls, value: str) -> str:
        if value and not is_http_address(value):
            msg = f"{value!r} is no address of a collector; one is http://collector:4318"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _distinct_workers(self) -> Settings:
        names = [worker.name for worker in self.workers]
        for name in names:
            if names.count(name) > 1:
                msg = f"two workers are called {name}"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _distinct_caches(self) -> Settings:
        names = [cache.name for cache in self.caches]
        for name in names:
            if names.count(name) > 1:
                msg = f"two caches are called {name}"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _distinct_owners(self) -> Settings:
        names = [owner.name for owner in self.owners]
        for name in names:
            if names.count(name) > 1:
                msg = f"two owners are called {name}"
                raise ValueError(msg)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings, the strongest first; sections are merged setting by setting."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file.get())

    @property
    def secrets(self) -> Path:
        """Directory of the farm's secrets."""
        return self.secrets_dir or self.state_dir

    @property
    def ray_token_file(self) -> Path:
        """File with the token of the Ray cluster."""
        return self.ray_token or self.secrets / "ray-token"

    @property
    def objects_url(self) -> str:
        """Address of the object store."""
        return self.object_store_url or (self.state_dir / "objects").as_uri()

    def database_url(self, name: str) -> str:
        """Address of the `journal`, `derivations`, `cache`, `timings` or `environments` database.

        Five files, not one: SQLite has one writer per file, and a large intake must not hold up the
        journal.
        """
        urls = {
            "journal": self.journal_database_url,
            "derivations": self.derivations_database_url,
            "cache": self.cache_database_url,
            "timings": self.timings_database_url,
            # On a server that others can take over from, unlike a file.
            "environments": self.environments_database_url or server_url(self.derivations_database_url),
        }[name]
        return urls or f"sqlite+aiosqlite:///{self.state_dir / f'{name}.sqlite3'}"

    def named_cache_database_url(self, name: str) -> str:
        """Address of the metadata of the cache `name`: a file beside the default cache's, or a schema of its own."""
        return cache_database_url(self.database_url("cache"), name)

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the coordinator."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(config: Path | None = None, **arguments: Any) -> Settings:
    """Read the file, the environment and `arguments` (those that are None do not count).

    Raises `ConfigError` with one sentence that names the setting.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    reading = _file.set(config)
    try:
        if config is not None:
            # The source passes over a file that is not there.
            config.open("rb").close()
        return Settings(**given)
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not valid TOML: {error}.") from None
    except ValidationError as error:
        raise ConfigError(_sentence(error, config)) from None
    finally:
        _file.reset(reading)


def _sentence(error: ValidationError, config: Path | None) -> str:
    first = first_fault(error)
    source = f" (in {config} or the environment)" if config is not None else ""
    return f"setting {first.place or 'settings'}{source}: {first.message}."
