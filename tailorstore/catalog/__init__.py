"""Catalog floor: the rows of a store, in SQLite or PostgreSQL. The only place that speaks SQL.

Imports the ground floor, SQLAlchemy and, to create or upgrade a schema, Alembic. It never meets ``storage``.
"""

from tailorstore.catalog.catalog import Catalog, StoreCatalog, upgrade

__all__ = ["Catalog", "StoreCatalog", "upgrade"]
