"""Tables of the catalog: columns, constraints and types. No behaviour.

Every row belongs to a store, so that one database can hold many. ``pk`` is a surrogate key that never leaves this
floor; ``…_id`` is the identity that people, manifests and object keys know. What each table means stands in its
comment. The view ``composite``, for people with psql or sqlite3, is made by its migration.
"""

import json
import re
from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

from tailorstore.domain.records import MEASURES


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC with microseconds: ``timestamptz`` on Postgres, sortable text without a zone on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Write UTC."""
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read UTC, whatever zone the session has."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


_ESCAPE = "\x1a"
_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


class AnyText(TypeDecorator[str]):
    """Any Python string, exactly.

    Layer names and messages are the caller's. Postgres cannot hold NUL, and neither database can hold a lone
    surrogate; these few characters are written as U+001A and four hex digits, everything else as it is.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape what databases cannot hold."""
        del dialect
        if value is None:
            return None
        return _UNSTORABLE.sub(lambda found: f"{_ESCAPE}{ord(found[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Undo it."""
        del dialect
        if value is None or _ESCAPE not in value:
            return value
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)


class JsonText(TypeDecorator[object]):
    """JSON in a text column: Postgres' own JSON types refuse NaN and infinities, which metrics may be."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:
        """Write JSON with Python's ``NaN`` and ``Infinity``."""
        del dialect
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> object:
        """Read it back."""
        del dialect
        return None if value is None else json.loads(value)


ID = String(20)
BIG_KEY = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only where the type is exactly INTEGER, which holds 64 bits there."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

catalog = Table(
    "catalog",
    metadata,
    Column("pk", Integer, primary_key=True, autoincrement=False),
    Column("catalog_id", ID, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("pk = 1", name="one_row"),
    comment="Identity of this database; one row.",
)

stores = Table(
    "stores",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_id", AnyText, nullable=False, unique=True),
    Column("root", AnyText, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    comment="Stores whose roots are bound to this catalog; root has no secrets.",
)

layers = Table(
    "layers",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("name", AnyText, nullable=False),
    Column("component", Text, nullable=False),
    UniqueConstraint("store_pk", "name"),
    UniqueConstraint("store_pk", "component"),
    comment="Names of layers and their path components. Rows are never deleted, so keys may be cached.",
)

lines = Table(
    "lines",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False, index=True),
    Column("parent_pk", ForeignKey("lines.pk"), index=True),
    Column("fork_step", BigInteger),
    Column("line_id", ID),
    CheckConstraint("(parent_pk IS NULL) = (fork_step IS NULL)", name="fork"),
    Index("uq_lines_store_pk_line_id", "store_pk", "line_id", unique=True),
    comment="Append-only runs of commits with growing steps; a fork continues its parent after fork_step.",
)

commits = Table(
    "commits",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("commit_id", ID, nullable=False),
    Column("line_pk", ForeignKey(lines.c.pk), nullable=False),
    Column("branch", Text, nullable=False),
    Column("parent_id", ID),
    Column("step", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("message", AnyText),
    Column("metrics", JsonText, nullable=False),
    Column("layers_written", JsonText, nullable=False),
    Column("bytes_written", BigInteger, nullable=False),
    Column("bytes_logical", BigInteger, nullable=False),
    Column("verified_at", UtcDateTime),
    Column("proof", String(32)),
    UniqueConstraint("store_pk", "commit_id"),
    UniqueConstraint("line_pk", "step"),
    Index(None, "store_pk", "step"),
    comment="Published commits. parent_id is text because the parent may be expired.",
)

branches = Table(
    "branches",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("name", Text, nullable=False),
    Column("line_pk", ForeignKey(lines.c.pk), nullable=False, index=True),
    Column("head_pk", ForeignKey(commits.c.pk), index=True),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("store_pk", "name"),
    comment="Moving names; publishing compares and sets head_pk.",
)

tags = Table(
    "tags",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("name", Text, nullable=False),
    Column("commit_pk", ForeignKey(commits.c.pk), nullable=False, index=True),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("store_pk", "name"),
    comment="Fixed names; they protect their commits from being expired.",
)

versions = Table(
    "versions",
    metadata,
    Column("pk", BIG_KEY, primary_key=True),
    Column("layer_pk", ForeignKey(layers.c.pk), nullable=False),
    Column("version_id", ID, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("fidelity", String(5), nullable=False),
    Column("base_pk", ForeignKey("versions.pk")),
    Column("error", Float(53)),
    Column("bytes_logical", BigInteger, nullable=False),
    Column("bytes_stored", BigInteger, nullable=False),
    Column("objects", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("doomed_at", UtcDateTime),
    Column("verified_at", UtcDateTime),
    Column("quarantined_at", UtcDateTime),
    Column("damage", AnyText),
    # Led by version_id: publishing and sweeping ask by commit; both columns are given when a single row is wanted.
    UniqueConstraint("version_id", "layer_pk"),
    CheckConstraint("fidelity IN ('full', 'light')", name="fidelity"),
    comment="Layer versions. version_id is the commit that wrote it, perhaps expired; doomed ones await the sweep.",
)
_HAS_BASE = versions.c.base_pk.is_not(None)
_IS_DOOMED = versions.c.doomed_at.is_not(None)
_IS_QUARANTINED = versions.c.quarantined_at.is_not(None)
Index("ix_versions_base_pk", versions.c.base_pk, sqlite_where=_HAS_BASE, postgresql_where=_HAS_BASE)
Index("ix_versions_doomed_at", versions.c.doomed_at, sqlite_where=_IS_DOOMED, postgresql_where=_IS_DOOMED)
Index(
    "ix_versions_quarantined_at",
    versions.c.quarantined_at,
    sqlite_where=_IS_QUARANTINED,
    postgresql_where=_IS_QUARANTINED,
)

composites = Table(
    "composites",
    metadata,
    Column("commit_pk", ForeignKey(commits.c.pk), nullable=False),
    Column("layer_pk", ForeignKey(layers.c.pk), nullable=False),
    Column("version_pk", ForeignKey(versions.c.pk), nullable=False, index=True),
    PrimaryKeyConstraint("commit_pk", "layer_pk"),
    comment="Every commit's full map, so that its ancestors may vanish.",
    # The rows are their own index: half the size, and one commit's map lies side by side.
    sqlite_with_rowid=False,
)

measures = Table(
    "measures",
    metadata,
    Column("commit_pk", ForeignKey(commits.c.pk), nullable=False),
    Column("layer_pk", ForeignKey(layers.c.pk), nullable=False),
    *(Column(name, Float(53)) for name in MEASURES),
    Column("finite", Boolean, nullable=False),
    PrimaryKeyConstraint("commit_pk", "layer_pk"),
    comment="How each layer moved, as found just before a commit; NULL: unknown, or not a finite number.",
    sqlite_with_rowid=False,
)

pending = Table(
    "pending",
    metadata,
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("commit_id", ID, nullable=False),
    Column("branch", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("parent_id", ID),
    Column("owner", AnyText, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("store_pk", "commit_id"),
    comment="Announced commits. Publishing needs the row; GC voids it once it has lapsed.",
)

withdrawn = Table(
    "withdrawn",
    metadata,
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False),
    Column("commit_id", ID, nullable=False),
    Column("reason", Text, nullable=False),
    Column("withdrawn_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("store_pk", "commit_id"),
    comment="Commit ids that lost their standing, until nothing of theirs is left in the root.",
)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", ID, primary_key=True),
    Column("store_pk", ForeignKey(stores.c.pk), nullable=False, index=True),
    Column("commit_pk", ForeignKey(commits.c.pk), nullable=False, index=True),
    Column("owner", AnyText, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    comment="Readers' claims on commits.",
)

receipts = Table(
    "receipts",
    metadata,
    Column("receipt_id", ID, primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    comment="Proof that a write that must not happen twice took effect, for a client that lost the reply.",
)
