"""Signing a whole cache anew, after a key was added or taken away. NARs are not touched, readers notice nothing.

Each batch is one transaction that reads the rows in it as they are now, so a path that is published, repaired or
deleted meanwhile is right either way; publishing itself signs with the present keys already. Killed in between, some
rows have the new signatures and some the old ones, all of them true; running it again ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import paths, realisations, writing
from infra.cache.publishing.signer import Signer
from infra.nix import narinfo as narinfo_format
from infra.nix import realisation as realisation_format
from infra.nix.realisation import RealisationLayout

#: Rows of one transaction; a signature takes some 50 us, and other work waits for it.
BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class ResignReport:
    """Report of a key rotation: the number of rows with other signatures than before."""

    narinfos: int
    realisations: int


async def resign(catalog: Catalog, signer: Signer) -> ResignReport:
    """See `Cache.resign`."""
    return ResignReport(await _narinfos(catalog, signer), await _realisations(catalog, signer))


async def _narinfos(catalog: Catalog, signer: Signer) -> int:
    changed, last = 0, 0
    while True:
        async with writing(catalog.database) as connection:
            question = sa.select(paths.c.serial, paths.c.hash_part, paths.c.url, paths.c.narinfo)
            question = question.where(paths.c.serial > last).order_by(paths.c.serial).limit(BATCH)
            rows = (await connection.execute(question)).all()
            renewed = []
            for row in rows:
                info = narinfo_format.parse(row.narinfo, catalog.store_dir)
                text = info.signed(signer.sign(info.path.fingerprint())).render()
                if text != row.narinfo:
                    renewed.append({"at": row.serial, "text": text})
            if renewed:
                statement = paths.update().where(paths.c.serial == sa.bindparam("at"))
                await connection.execute(statement.values(narinfo=sa.bindparam("text")), renewed)
        catalog.forget((row.hash_part, row.url) for row in rows)
        changed += len(renewed)
        if len(rows) < BATCH:
            return changed
        last = rows[-1].serial


async def _realisations(catalog: Catalog, signer: Signer) -> int:
    changed = 0
    last = ("", "")
    table = realisations
    while True:
        async with writing(catalog.database) as connection:
            question = sa.select(table.c.layout, table.c.key, table.c.body)
            question = question.where(sa.tuple_(table.c.layout, table.c.key) > sa.tuple_(*last))
            rows = (await connection.execute(question.order_by(table.c.layout, table.c.key).limit(BATCH))).all()
            renewed = []
            for row in rows:
                known = realisation_format.parse(RealisationLayout(row.layout), row.key, row.body)
                body = replace(known, signatures=signer.sign(known.fingerprint())).render()
                if body != row.body:
                    renewed.append({"of": row.layout, "named": row.key, "text": body})
            if renewed:
                which = (table.c.layout == sa.bindparam("of")) & (table.c.key == sa.bindparam("named"))
                await connection.execute(table.update().where(which).values(body=sa.bindparam("text")), renewed)
        changed += len(renewed)
        if len(rows) < BATCH:
            return changed
        last = (rows[-1].layout, rows[-1].key)
