"""Migrations of the metadata's schema: one module below `versions` for each change, run when a cache is opened.

A revision, once released, is never changed; a new one follows it. `tests/infra/cache/test_metadata.py` holds what the
revisions make against what `infra.cache.catalog.database` declares, on each database.
"""
