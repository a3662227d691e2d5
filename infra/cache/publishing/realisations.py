"""Realisations of one cache: which path a content-addressed output became, signed by the cache, in both layouts.

A realisation is taken only for a path that can be fetched, and (by hash) only if those that it was made with are here
too, with the same paths. The signatures that came with it are dropped: like a narinfo, it is trusted for our own keys.
The first is final; another path for the same key is a conflict, and changes nothing. It is absent while its path is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.catalog import Catalog, Row
from infra.cache.catalog.database import reading, realisations, writing
from infra.cache.catalog.tombstones import revive
from infra.cache.publishing.signer import Signer
from infra.nix import realisation as realisation_format
from infra.nix.realisation import Realisation, RealisationLayout
from infra.nix.store_path import base_name_of, hash_part_of


class Registered(StrEnum):
    """Outcomes of a realisation that was offered."""

    NEW = "new"
    SAME = "same"
    #: There is one with another path, which stays.
    CONFLICT = "conflict"
    #: Its path, or a realisation that it was made with, is not here.
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Registration:
    """Outcome of one realisation; for CONFLICT or MISSING also the path or key that it is about."""

    outcome: Registered
    about: str = ""


class Realisations:
    """The realisations of one cache."""

    def __init__(self, catalog: Catalog, signer: Signer) -> None:
        self._catalog = catalog
        self._signer = signer

    async def register(self, offered: Realisation) -> Registration:
        """See `Cache.register`."""
        async with writing(self._catalog.database) as connection:
            row = await self._row(connection, offered.out_path)
            if row is None or not self._catalog.is_intact(row):
                return Registration(Registered.MISSING, offered.out_path)
            for key, out_path in offered.dependents:
                known = await self._known(connection, offered.layout, key)
                if known is None or known.out_path != out_path:
                    return Registration(Registered.MISSING, key)
            known = await self._known(connection, offered.layout, offered.key)
            if known is not None:
                same = (known.out_path, known.dependents) == (offered.out_path, offered.dependents)
                return Registration(Registered.SAME) if same else Registration(Registered.CONFLICT, known.out_path)
            await revive(connection, [row.serial])
            signed = replace(offered, signatures=self._signer.sign(offered.fingerprint()))
            await connection.execute(
                realisations.insert().values(
                    layout=offered.layout.value,
                    key=offered.key,
                    out_path=row.store_path,
                    body=signed.render(),
                    published_at=self._catalog.now(),
                )
            )
            return Registration(Registered.NEW)

    async def body(self, layout: RealisationLayout, key: str) -> bytes | None:
        """See `Cache.realisation`."""
        async with reading(self._catalog.database) as connection:
            found = (await connection.execute(_named(layout, key))).first()
            if found is None:
                return None
            row = await self._row(connection, base_name_of(found.out_path))
        there = row is not None and row.tombstoned_at is None and self._catalog.is_intact(row)
        return bytes(found.body) if there else None

    async def _row(self, connection: AsyncConnection, base_name: str) -> Row | None:
        part = hash_part_of(base_name)
        row = (await self._catalog.rows(connection, [part])).get(part)
        return row if row is not None and row.base_name == base_name else None

    @staticmethod
    async def _known(connection: AsyncConnection, layout: RealisationLayout, key: str) -> Realisation | None:
        found = (await connection.execute(_named(layout, key))).first()
        return None if found is None else realisation_format.parse(layout, key, found.body)


def _named(layout: RealisationLayout, key: str) -> sa.Select[tuple[str, bytes]]:
    question = sa.select(realisations.c.out_path, realisations.c.body)
    return question.where(realisations.c.layout == layout.value, realisations.c.key == key)
