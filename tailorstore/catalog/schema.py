"""The schema's revision: created, checked and upgraded here; the steps themselves are in ``migrations``.

Opening reads one row. Alembic is imported only to create or upgrade.
"""

from importlib import import_module
from pathlib import Path

from sqlalchemy import Connection, String, column, inspect, select, table, text

from tailorstore.catalog.database import Database
from tailorstore.catalog.tables import catalog, metadata
from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import (
    CatalogUnavailableError,
    MissingDependencyError,
    SchemaOutdatedError,
    SchemaTooNewError,
    StoreNotFoundError,
)
from tailorstore.domain.names import new_id

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007")
"""Every revision this version knows, oldest first."""

HEAD = REVISIONS[-1]

VERSION_TABLE = "tailorstore_schema"
"""Not Alembic's default, which another application in the same database may be using."""

_ADVISORY_LOCK = 0x7461696C6F72
"""Key of the lock under which a schema is changed on Postgres: the letters ``tailor``."""


def read_revision(connection: Connection) -> str | None:
    """Return the revision of the schema; ``None`` if there is none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version = column("version_num", String)
    return connection.scalar(select(version).select_from(table(VERSION_TABLE)))


def check_revision(revision: str | None, url: CatalogUrl) -> None:
    """Accept the revision that this version of tailorstore writes, and no other.

    Raises:
        SchemaOutdatedError: it is older; the message has the command that upgrades it.
        SchemaTooNewError: it is newer.
        StoreNotFoundError: there is no catalog in the database.
    """
    if revision == HEAD:
        return
    if revision is None:
        msg = f"there is no catalog at {url.shown}"
        raise StoreNotFoundError(msg)
    if revision in REVISIONS:
        msg = (
            f"the catalog {url.shown} has schema {revision}, this version of tailorstore needs {HEAD}: "
            f"run `tailorstore upgrade --catalog '{url.shown}'`"
        )
        raise SchemaOutdatedError(msg)
    msg = (
        f"the catalog {url.shown} has schema {revision}, which is newer than this version of tailorstore knows "
        f"({HEAD}): upgrade the package"
    )
    raise SchemaTooNewError(msg)


def migrate(url: CatalogUrl, target: str = HEAD, *, create_only: bool = False) -> tuple[str | None, str | None]:
    """Bring the schema to a revision, up or down, in one transaction and one process at a time.

    Args:
        url: of the database; a missing SQLite file is made.
        target: a revision, or ``base`` for no schema at all.
        create_only: leave a schema that is there alone, whatever its revision.

    Returns:
        The revisions before and after.

    Raises:
        SchemaTooNewError: the schema is newer than this version knows. Nothing was changed.
        AccessDeniedError: this user may not change the schema. Nothing was changed.
        CatalogUnavailableError: the database does not answer. Nothing was changed.
    """
    database = Database(url, create=True, migrating=True)

    def work(connection: Connection) -> tuple[str | None, str | None]:
        if not database.is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
        before = read_revision(connection)
        if before is not None and create_only:
            return before, before
        if before is None:
            _refuse_foreign_tables(connection, url)
        elif before not in REVISIONS:
            check_revision(before, url)
        _run_alembic(connection, before, target)
        if target == "base":
            return before, None
        _give_identity(database, connection)
        return before, read_revision(connection)

    try:
        return database.write(work)
    finally:
        database.close()


def migrations_folder() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout.

    Raises:
        MissingDependencyError: neither is there.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    msg = f"the migrations are missing from {package}; install tailorstore again"
    raise MissingDependencyError(msg)


def _run_alembic(connection: Connection, before: str | None, target: str) -> None:
    # By name, when needed: it takes longer to import than everything else in this floor.
    command = import_module("alembic.command")
    config = import_module("alembic.config").Config()
    # ConfigParser would take a percent sign in the path for a variable.
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    order = (None, *REVISIONS)
    goal = None if target == "base" else target
    step = command.upgrade if order.index(goal) > order.index(before) else command.downgrade
    step(config, target)


def _refuse_foreign_tables(connection: Connection, url: CatalogUrl) -> None:
    taken = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
    if taken:
        msg = (
            f"the database {url.shown} has tables of another application named {', '.join(taken)}: "
            "give the catalog a database or schema of its own"
        )
        raise CatalogUnavailableError(msg)


def _give_identity(database: Database, connection: Connection) -> None:
    if connection.execute(select(catalog.c.catalog_id)).first() is None:
        now = database.now(connection)
        connection.execute(catalog.insert().values(pk=1, catalog_id=new_id(), created_at=now))
