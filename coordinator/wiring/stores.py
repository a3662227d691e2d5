"""The stores of a coordinator, opened, and what workers must know of the farm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from secrets import token_urlsafe
from typing import Final

from coordinator.caches.opening import OpenCache, open_caches
from coordinator.config import Settings
from coordinator.environments.store import EnvironmentStore
from coordinator.journal.journal import Journal
from coordinator.journal.takeover import Lead
from coordinator.security.clients import ClientTokens, load_clients
from coordinator.security.sessions import Sessions
from coordinator.security.upload_tokens import UploadTokens
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.log_archive import LogArchive
from coordinator.stores.logs import LogStore
from coordinator.stores.timings import TimingStore
from infra.cache.cache import Cache
from infra.clock import Clock
from workers.wire.messages import FarmInfo

#: Bytes of log beyond the limit that a worker may still send (it counts what it drops and reports the count).
LOG_SLACK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Stores:
    """Stores of a coordinator on disk and in databases, and the ways by which workers and clients write to them."""

    journal: Journal
    derivations: DerivationStore
    logs: LogStore
    timings: TimingStore
    environments: EnvironmentStore
    #: The default one first.
    caches: Sequence[OpenCache]
    #: Tokens of the API and their owners.
    clients: ClientTokens
    upload_tokens: UploadTokens
    sessions: Sessions
    #: What the farm's own workers read the default cache with, where that is not public.
    farm_token: str

    @property
    def cache(self) -> Cache:
        """The default cache, which the farm publishes to."""
        return self.caches[0].cache


async def open_stores(stack: AsyncExitStack, settings: Settings, clock: Clock, lead: Lead) -> Stores:
    """Open, or make, all that lies below the state directory or in databases; `stack` closes it."""
    secrets, farm_token = lead.secrets, token_urlsafe()
    caches = await open_caches(
        stack, settings, clock, lead.journal.fencing_token, secrets=secrets, farm_token=farm_token
    )
    derivations = DerivationStore.open(settings.database_url("derivations"), settings.store_dir)
    stack.push_async_callback(derivations.close)
    await derivations.prepare()
    log_bytes = settings.limits.log_bytes + LOG_SLACK_BYTES
    logs = LogStore(settings.state_dir / "logs", log_bytes, LogArchive(caches[0].cache.objects, log_bytes))
    stack.push_async_callback(logs.close)
    # Made ready by its writer: a farm starts whatever is wrong with it.
    timings = TimingStore.open(settings.database_url("timings"))
    stack.push_async_callback(timings.close)
    environments = EnvironmentStore.open(settings.database_url("environments"), lead.journal.fencing_token)
    stack.push_async_callback(environments.close)
    await environments.prepare()
    upload_tokens = UploadTokens(secrets.upload_secret.encode())
    sessions = Sessions(secrets.upload_secret, secrets.api_token)
    clients = load_clients(secrets.api_token, {owner.name: owner.tokens for owner in settings.owners})
    return Stores(
        lead.journal,
        derivations,
        logs,
        timings,
        environments,
        caches,
        clients,
        upload_tokens,
        sessions,
        farm_token,
    )


async def farm_info(settings: Settings, url: str, stores: Stores) -> FarmInfo:
    """Return what workers must know of the farm."""
    cache = stores.cache
    return FarmInfo(
        cache_url=f"{url}/cache",
        public_keys=tuple(str(public) for public in cache.public_keys),
        object_store_url=settings.objects_url,
        epoch=stores.journal.epoch,
        store_dir=settings.store_dir,
        cache_token="" if stores.caches[0].access.public else stores.farm_token,
        store_mark=await cache.objects.check_marker(),
        takes_uploads=True,
        compression=cache.compression,
    )
