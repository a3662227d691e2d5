"""The cache as the coordinator sees it: what is published, publishing, keeping, collecting, and answering.

A thin front over the rooms that do it: `catalog` reads, `publishing` publishes, `roots` keeps, `collector` collects.
Here is the contract; each of them says how.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.closures import ClosurePage, PageBounds, find_page, read_page
from infra.cache.catalog.contents import holders
from infra.cache.catalog.database import Database, FencingToken, open_metadata
from infra.cache.counters import CacheCounters
from infra.cache.publishing.claims import ProvenObject, PublishOutcome
from infra.cache.publishing.key_rotation import ResignReport, resign
from infra.cache.publishing.publisher import Publisher
from infra.cache.publishing.realisations import Realisations, Registration
from infra.cache.publishing.signer import Signer
from infra.cache.repair.fsck import Fsck, FsckReport, RepairSource, Restored
from infra.cache.retention.collector import Collector, CollectPlan, CollectReport
from infra.cache.retention.roots import LEASE, PIN, Keeper, RootRow, Roots
from infra.cache.statistics import CacheInfo, inspect
from infra.nix.content import FixedContent
from infra.nix.narinfo import NarInfo
from infra.nix.realisation import Realisation, RealisationLayout
from infra.nix.signing import PublicKey, SecretKey
from infra.nix.store_path import StoreDir
from infra.objects.compression import COMPRESSION, Compression
from infra.objects.errors import CacheError
from infra.objects.store import ObjectStore

#: Claims of one `publish`.
MAX_BATCH = 10_000


class Cache:
    """One signed cache. Made by `open`; safe for any number of tasks of one event loop.

    Every method may raise MetadataError: the database failed, and nothing of the call was done.
    """

    def __init__(
        self,
        database: Database,
        objects: ObjectStore,
        store_dir: StoreDir,
        keys: Sequence[SecretKey],
        now: Callable[[], float],
        *,
        compression: Compression = COMPRESSION,
    ) -> None:
        #: For what has tables of its own beside the cache's.
        self.database = database
        self.objects = objects
        #: What is stored from now on is compressed with; what is there stays as it is.
        self.compression: Compression = compression
        self.store_dir = store_dir
        self.counters = CacheCounters()
        self.signer = Signer(keys)
        self._catalog = Catalog(database, objects, store_dir, now)
        self._publisher = Publisher(self._catalog, self.signer)
        self._roots = Roots(self._catalog)
        self._collector = Collector(self._catalog)
        self._realisations = Realisations(self._catalog, self.signer)

    @classmethod
    async def open(
        cls,
        database_url: str,
        objects: ObjectStore,
        *,
        store_dir: StoreDir,
        keys: Sequence[SecretKey],
        now: Callable[[], float],
        fence: FencingToken | None = None,
        compression: Compression = COMPRESSION,
    ) -> Cache:
        """Open, or make, the cache whose metadata is at `database_url` (see `open_metadata`).

        `now` gives Unix seconds. Every narinfo is signed by each of `keys`. With a `fence` a process that has the cache
        open under an earlier one writes nothing from now on.

        Raises:
            CacheFencedError: a later epoch has begun.
            SchemaTooNewError: a newer release wrote the database; nothing was touched.
            MetadataError: the database cannot be opened.
            ObjectStoreError: an object whose deletion was interrupted cannot be deleted.
        """
        database = await open_metadata(database_url, fence)
        try:
            cache = cls(database, objects, store_dir, keys, now, compression=compression)
            await cache._collector.resume()
        except BaseException:
            await database.close()
            raise
        return cache

    async def close(self) -> None:
        """Close the database."""
        await self._catalog.close()
        await self.database.close()

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """The keys that verify the signatures; `str()` of one is what `trusted-public-keys` wants."""
        return self.signer.public_keys

    @property
    def trouble(self) -> str:
        """Reason that the database cannot be used at the moment, "" while all is well."""
        return self.database.outage.trouble

    # Reading.

    @property
    def changes(self) -> int:
        """Count that grows with each path that this process publishes, tombstones, deletes or repairs."""
        return self.counters.published + self._catalog.forgotten

    async def missing(self, store_paths: Iterable[str]) -> set[str]:
        """Return those of the full store paths that cannot be fetched, in one question."""
        return await self._catalog.missing(store_paths)

    async def differing(self, claims: Mapping[str, str]) -> dict[str, bool]:
        """Return those of the claimed paths (full path -> NAR hash) that are published with other bits.

        The value is whether the claimed bits are a recorded conflict already.
        """
        return await self._catalog.differing(claims)

    async def narinfo(self, hash_part: str) -> bytes | None:
        """Return the signed narinfo of the path with this hash part, None if there is none that can be fetched."""
        return await self._catalog.narinfo(hash_part)

    def narinfo_in_memory(self, hash_part: str) -> bytes | None:
        """Return what `narinfo` answers where that takes no database; None if unknown. For callers that cannot wait.

        Raises:
            ObjectStoreError: the directory of the objects cannot be looked at.
        """
        return self._catalog.narinfo_in_memory(hash_part)

    def closure_in_memory(
        self, names: Collection[str], bounds: PageBounds, *, recursive: bool = True
    ) -> list[bytes] | None:
        """Return the narinfos of a small closure, references first, where that takes no database; else None.

        Raises as `narinfo_in_memory`.
        """
        rows = self._catalog.closure_in_memory(names, recursive=recursive, at_most=bounds.paths)
        if rows is None or sum(len(row.narinfo) for row in rows) > bounds.size_bytes:
            return None
        return [row.narinfo for row in rows]

    def small_object(self, url: str, at_most: int) -> bytes | None:
        """Return an object of at most `at_most` bytes where `object_size` takes no database and it is a file.

        None where it is unknown, larger, no file of this machine, or not whole. For callers that cannot wait.

        Raises:
            ObjectStoreError: the directory of the objects cannot be read.
        """
        return self._catalog.small_object(url, at_most)

    async def object_size(self, url: str) -> int | None:
        """Return the size of the object with key `url`, None unless a path names it and it can be fetched.

        The path may be tombstoned: who read its narinfo before may still fetch it until it is deleted.
        """
        return await self._catalog.object_size(url)

    async def closure(
        self, store_paths: Iterable[str], *, recursive: bool = True, at_most: int | None = None
    ) -> tuple[list[bytes], list[str]]:
        """Return the signed narinfos of all that the full store paths reach, references first, and what is missing.

        Missing are paths of the question, and lost members of the closure, that cannot be fetched: full paths, sorted.
        Without `recursive` the answer holds the paths of the question only. With `at_most` it holds so many of those
        that are reached, the nearest to the question.

        Raises:
            ClosureTooLargeError: more than MAX_CLOSURE paths, requested or reached.
        """
        return await self._catalog.closure(store_paths, recursive=recursive, at_most=at_most)

    async def holders(self, contents: Collection[FixedContent]) -> dict[FixedContent, NarInfo]:
        """Return a path that should hold each content, where there is one; that it does is for the caller to prove."""
        return await holders(self._catalog, contents)

    async def closure_page(
        self, names: Collection[str], bounds: PageBounds, *, recursive: bool = True, after: int = 0
    ) -> ClosurePage:
        """Return which paths a page of the closure of base names, or hash parts alone, holds; see `closures`.

        Raises:
            ClosureTooLargeError: more than MAX_CLOSURE paths are reached.
        """
        return await find_page(self._catalog, names, bounds, recursive=recursive, after=after)

    async def read_page(self, serials: Sequence[int]) -> tuple[list[bytes], list[str]]:
        """Return the narinfos of some paths of a page, in order, and the base names of those that were lost."""
        return await read_page(self._catalog, serials)

    async def realisation(self, layout: RealisationLayout, key: str) -> bytes | None:
        """Return the signed realisation with this key (`infra.nix.realisation.parse_key`) if its path is here."""
        return await self._realisations.body(layout, key)

    async def info(self) -> CacheInfo:
        """Return sums over everything that is stored and kept."""
        return await inspect(self._catalog)

    # Publishing.

    async def publish(
        self,
        batch: Sequence[NarInfo],
        verified: Callable[[], None] = lambda: None,
        *,
        proofs: Collection[ProvenObject] = frozenset(),
    ) -> list[PublishOutcome]:
        """Verify, sign and publish; returns one outcome for each claim, in order.

        A claim may refer to others of the batch, whatever their order. One that fails takes only those along that
        refer to it. All that is published becomes visible together, when this returns. What is published without
        being named by a root is kept for `CollectPlan.fresh_s`. `verified` is called once the bytes are verified.
        Objects of `proofs` were verified by this program before it wrote them: their bytes are not read again.

        Raises:
            CacheError: more than MAX_BATCH claims.
        """
        if len(batch) > MAX_BATCH:
            raise CacheError(f"{len(batch)} paths were offered at once; the limit is {MAX_BATCH}")
        began = time.perf_counter()
        outcomes = await self._publisher.publish(batch, verified, proofs)
        self.counters.count_outcomes(outcomes)
        self.counters.publish_seconds.add(time.perf_counter() - began)
        return outcomes

    async def register(self, offered: Realisation) -> Registration:
        """Sign and store a realisation; see `realisations`."""
        return await self._realisations.register(offered)

    # Keeping.

    async def lease(self, holder: str, store_paths: Iterable[str], ttl_s: float) -> set[str]:
        """Keep full store paths, published or not, for `ttl_s` seconds; returns those that cannot be fetched.

        What is not returned stays fetchable, with all that it refers to, as long as the lease lives; what is published
        meanwhile too. A holder may lease again: the paths add up, and the lease lives as long as the longer one.
        """
        return await self._roots.lease(holder, store_paths, ttl_s)

    async def renew(self, holder: str, ttl_s: float) -> bool:
        """Let a lease live for at least `ttl_s` seconds from now; False if it has expired: lease again and look."""
        return await self._roots.renew(holder, ttl_s)

    async def release(self, holder: str) -> None:
        """End a lease; there being none is no error."""
        await self._roots.drop(LEASE, holder)

    async def drop_lapsed_leases(self) -> None:
        """Remove leases whose time is over: they keep nothing, and their rows need not wait for a collection."""
        await self._roots.drop_lapsed_leases()

    async def pin(self, name: str, store_paths: Iterable[str], expires_at: float | None = None) -> None:
        """Keep full store paths, published or not, under a name; only these, if the name had others."""
        await self._roots.keep(PIN, name, store_paths, expires_at)

    async def unpin(self, name: str) -> bool:
        """Forget a pin; False if there was none."""
        return await self._roots.drop(PIN, name)

    async def keep(self, kind: str, name: str, store_paths: Iterable[str], expires_at: float | None) -> None:
        """Keep full store paths, published or not, as the root (`kind`, `name`) until `expires_at` (None: for ever).

        Again with other paths or another time: those hold from then on.

        Raises:
            CacheError: a path is not one of this cache's store, or there are more than MAX_ROOT_PATHS; or the kind or
                the name is empty or too long.
        """
        await self._roots.keep(kind, name, store_paths, expires_at)

    async def drop(self, kind: str, name: str) -> None:
        """Forget a root; there being none is no error."""
        await self._roots.drop(kind, name)

    async def roots(self) -> list[RootRow]:
        """Return the live roots but for leases, those last used first."""
        return await self._roots.living()

    async def why(self, store_path: str) -> list[Keeper]:
        """Return what keeps a path, leases too: at most MAX_KEEPERS, the nearest first."""
        return await self._roots.why(store_path)

    async def touch(self, hash_parts: Collection[str]) -> None:
        """Note that these paths were requested; it orders the roots that name them for a size budget.

        Meant to be called now and then with many: each call is a transaction.
        """
        await self._roots.touch(hash_parts)

    async def write_uses(self) -> None:
        """Note the paths whose narinfos were answered since the last call; to be called now and then."""
        used = self._catalog.take_used()
        if used:
            await self._roots.touch(used)

    async def collect(self, plan: CollectPlan) -> CollectReport:
        """Collect garbage as planned, one at a time; see `collector`.

        Raises:
            CollectorBusyError: another process collects.
            ObjectStoreError: an object could not be deleted or listed; the next collection goes on with it.
        """
        report = await self._collector.collect(plan)
        self.counters.count_collection(report)
        return report

    # Checking.

    async def verify(
        self, *, full: bool = False, repair: bool = False, sources: Sequence[RepairSource] = ()
    ) -> FsckReport:
        """Prove every narinfo, object and reference, and repair what is broken if asked to; see `fsck`.

        Raises:
            ObjectStoreError: the store does not answer; nothing more is judged.
        """
        return await Fsck(self._catalog, self.signer, self.compression).run(full=full, repair=repair, sources=sources)

    async def lost(self, inputs: Iterable[str], suspects: Iterable[str]) -> set[str]:
        """Return what the full store paths `inputs` stand on, themselves included, and that cannot be fetched.

        The objects of `suspects` are looked at even where that is not cheap; each is one question to the store.

        Raises:
            ObjectStoreError: the store does not answer.
            ClosureTooLargeError: as `closure`.
        """
        return await self._catalog.lost(inputs, suspects)

    async def restore(self, store_paths: Iterable[str], sources: Sequence[RepairSource]) -> Restored:
        """Have the objects of paths again from `sources`; what cannot be had is hidden with all that refers to it.

        Raises:
            ObjectStoreError: the store does not answer; nothing more is judged.
        """
        return await Fsck(self._catalog, self.signer).restore(store_paths, sources)

    async def resign(self) -> ResignReport:
        """Sign everything with the present keys, and with no other; see `key_rotation`."""
        return await resign(self._catalog, self.signer)
