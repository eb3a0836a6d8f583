"""Alembic's entry: runs the migrations on the connection, and in the transaction, that it is given.

``tailorstore.catalog.schema`` passes both. For a developer's ``alembic revision --autogenerate`` the database is
the one that ``TAILORSTORE_CATALOG`` names.
"""

import os

from alembic import context
from sqlalchemy import Connection

from tailorstore.catalog.database import Database
from tailorstore.catalog.schema import VERSION_TABLE
from tailorstore.catalog.tables import metadata
from tailorstore.catalog.urls import parse_url


def run(connection: Connection) -> None:
    """Run what was asked for; the caller commits."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        # SQLite changes a table by copying it.
        render_as_batch=True,
        # A migration that fails half way leaves nothing, on both databases.
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    database = Database(parse_url(os.environ["TAILORSTORE_CATALOG"]), create=True, migrating=True)
    database.write(run)
    database.close()
