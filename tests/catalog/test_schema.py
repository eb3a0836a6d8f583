"""Creating, checking and upgrading the schema, in both databases."""

import multiprocessing
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from tailorstore.catalog import Catalog, upgrade
from tailorstore.catalog.database import Database
from tailorstore.catalog.schema import (
    HEAD,
    REVISIONS,
    VERSION_TABLE,
    migrate,
    migrations_folder,
    read_revision,
)
from tailorstore.catalog.tables import metadata
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import (
    CatalogDamagedError,
    CatalogUnavailableError,
    MissingDependencyError,
    SchemaOutdatedError,
    SchemaTooNewError,
    StoreNotFoundError,
)
from tests.catalog.kit import at, commit, plain_sql


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    """Give an empty database."""
    opened = Database(parse_url(catalog_url), create=True)
    yield opened
    opened.close()


def test_the_constant_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [HEAD]
    assert tuple(one.revision for one in scripts.walk_revisions())[::-1] == REVISIONS


def test_migrations_make_the_tables_that_the_code_uses(catalog: Catalog, catalog_url: str) -> None:
    database = Database(parse_url(catalog_url))

    def differences(connection: Connection) -> list[object]:
        options = {"compare_type": True, "version_table": VERSION_TABLE}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    assert database.read(differences) == []
    database.close()
    assert catalog.catalog_id


def test_up_down_up(database: Database, catalog_url: str) -> None:
    url = parse_url(catalog_url)
    everything = {*metadata.tables, VERSION_TABLE}
    assert migrate(url) == (None, HEAD)
    for revision in reversed(REVISIONS[:-1]):
        before = database.read(read_revision)
        assert migrate(url, revision) == (before, revision)
    assert migrate(url, "base")[1] is None
    left = database.read(lambda connection: set(inspect(connection).get_table_names()))
    assert left <= {VERSION_TABLE}
    for revision in REVISIONS:
        migrate(url, revision)
        assert database.read(read_revision) == revision
    assert database.read(lambda connection: set(inspect(connection).get_table_names())) == everything
    assert database.read(lambda connection: inspect(connection).get_view_names()) == ["composite"]
    Catalog.open(catalog_url, create=False).close()


def test_a_catalog_is_created_once(catalog_url: str) -> None:
    first = Catalog.open(catalog_url)
    second = Catalog.open(catalog_url)
    third = Catalog.open(catalog_url, create=False)
    assert len({one.catalog_id for one in (first, second, third)}) == 1
    for one in (first, second, third):
        one.close()


def test_an_empty_database_is_no_catalog_unless_one_is_to_be_made(database: Database, catalog_url: str) -> None:
    assert database.read(read_revision) is None
    with pytest.raises(StoreNotFoundError, match="there is no catalog at"):
        Catalog.open(catalog_url, create=False)
    assert database.read(read_revision) is None


def test_a_missing_file_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no catalog at .*none\.db"):
        Catalog.open(f"sqlite:///{tmp_path}/none.db", create=False)
    with pytest.raises(StoreNotFoundError):
        Catalog.open(f"sqlite:///{tmp_path}/none.db?mode=ro")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path: Path) -> None:
    Catalog.open(f"sqlite:///{tmp_path}/with space/50%/ü/catalog.db").close()
    assert (tmp_path / "with space" / "50%" / "ü" / "catalog.db").is_file()


def test_an_older_catalog_tells_how_to_upgrade_it(catalog_url: str) -> None:
    url = parse_url(catalog_url)
    catalog = Catalog.open(catalog_url)
    store = catalog.register("store-1", "file:///data/run", 1)
    made = commit(store, 1)
    catalog.close()
    migrate(url, REVISIONS[0])
    for create in (False, True):
        with pytest.raises(SchemaOutdatedError) as refused:
            Catalog.open(catalog_url, create=create)
        assert f"tailorstore upgrade --catalog '{url.shown}'" in str(refused.value)
    assert upgrade(catalog_url) == (REVISIONS[0], HEAD)
    assert upgrade(catalog_url) == (HEAD, HEAD)
    again = Catalog.open(catalog_url)
    assert again.catalog_id == catalog.catalog_id
    kept = again.store("store-1")
    assert kept is not None
    assert at(kept, "latest").commit == made
    again.close()


def test_upgrading_an_empty_database_makes_a_catalog(catalog_url: str) -> None:
    assert upgrade(catalog_url) == (None, HEAD)
    Catalog.open(catalog_url, create=False).close()


def test_a_newer_catalog_is_left_alone(catalog: Catalog, catalog_url: str) -> None:
    with plain_sql(catalog_url) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0099'")  # noqa: S608
    with pytest.raises(SchemaTooNewError, match="0099"):
        Catalog.open(catalog_url)
    with pytest.raises(SchemaTooNewError, match="upgrade the package"):
        upgrade(catalog_url)
    with plain_sql(catalog_url) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")  # noqa: S608
    assert catalog.store("none") is None


def test_tables_of_another_application_are_left_alone(catalog_url: str) -> None:
    with plain_sql(catalog_url) as connection:
        connection.execute("CREATE TABLE commits (hash text)")
        connection.execute("CREATE TABLE alembic_version (version_num text)")
    with pytest.raises(CatalogUnavailableError, match="another application named commits"):
        Catalog.open(catalog_url)
    with plain_sql(catalog_url) as connection:
        assert connection.execute("SELECT count(*) FROM commits").fetchone() == (0,)


def test_a_migration_that_fails_half_way_leaves_nothing(
    database: Database, catalog_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    others = [path for path in migrations_folder().glob("versions/*.py") if not path.name.startswith("0002")]
    for name in ("env.py", "script.py.mako", *(f"versions/{path.name}" for path in others)):
        (folder / name).write_text((migrations_folder() / name).read_text())
    broken = (migrations_folder() / "versions/0002_composite_view.py").read_text()
    (folder / "versions" / "0002_broken.py").write_text(broken.replace("CREATE VIEW", "CREATE NONSENSE"))
    monkeypatch.setattr("tailorstore.catalog.schema.migrations_folder", lambda: folder)
    with pytest.raises(CatalogUnavailableError):
        Catalog.open(catalog_url)
    assert database.read(lambda connection: inspect(connection).get_table_names()) == []


def _open(url: str, barrier: Barrier, results: "multiprocessing.Queue[str]") -> None:
    barrier.wait(30)
    catalog = Catalog.open(url)
    results.put(catalog.catalog_id)
    catalog.close()


def test_processes_that_create_a_catalog_at_once_all_succeed(catalog_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    results: multiprocessing.Queue[str] = spawn.Queue()
    makers = [spawn.Process(target=_open, args=(catalog_url, barrier, results)) for _ in range(3)]
    for maker in makers:
        maker.start()
    assert len({results.get(timeout=60) for _ in makers}) == 1
    for maker in makers:
        maker.join(60)
        assert maker.exitcode == 0


def test_threads_that_create_a_catalog_at_once_all_succeed(catalog_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Catalog.open(catalog_url), range(4)))
    assert len({one.catalog_id for one in opened}) == 1
    for one in opened:
        one.close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and no database at all\n" * 50)
    before = path.read_bytes()
    with pytest.raises(CatalogDamagedError, match="not a SQLite database"):
        Catalog.open(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailableError, match="cannot be opened"):
        Catalog.open(f"sqlite:///{tmp_path}")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogUnavailableError, match=r"folder of the catalog .*catalog\.db"):
        Catalog.open(f"sqlite:///{tmp_path}/file/sub/catalog.db")


def test_missing_migrations_are_a_broken_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tailorstore.catalog.schema.__file__", str(tmp_path / "a" / "catalog" / "schema.py"))
    with pytest.raises(MissingDependencyError, match="migrations are missing"):
        migrations_folder()
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "env.py").write_text("")
    assert migrations_folder() == tmp_path / "migrations"


def test_sqlite_is_set_to_survive_a_power_cut(tmp_path: Path) -> None:
    catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
    database = Database(parse_url(f"sqlite:///{tmp_path}/catalog.db"))

    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert database.read(pragmas) == ["wal", 3, 1, 30_000]
    database.close()
    catalog.close()


def test_a_sqlite_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(MissingDependencyError, match="too old"):
        Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
