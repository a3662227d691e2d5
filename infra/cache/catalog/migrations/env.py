"""Run by alembic: migrates over the connection, and inside the transaction, of `infra.cache.catalog.migrate`."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], version_table=context.config.attributes["version_table"]
)
context.run_migrations()
