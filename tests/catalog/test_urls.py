"""Which URLs are understood, and what is shown of them."""

from pathlib import Path

import pytest

from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import InvalidInputError


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_all_spellings_of_postgres_mean_psycopg(scheme: str) -> None:
    parsed = parse_url(f"{scheme}://ada:s3cr3t@db.example:5433/runs?sslmode=require&sslpassword=pw2")
    assert parsed.url.drivername == "postgresql+psycopg"
    assert parsed.url.password == "s3cr3t"
    assert parsed.path is None
    assert "s3cr3t" not in parsed.shown
    assert "pw2" not in parsed.shown
    assert "db.example:5433/runs?" in parsed.shown
    assert "sslmode=require" in parsed.shown
    assert parsed.scrub("x s3cr3t y pw2") == "x *** y ***"


def test_a_password_in_the_options_is_hidden() -> None:
    parsed = parse_url("postgresql:///runs?host=/tmp&password=s3cr3t")
    assert "s3cr3t" not in parsed.shown
    assert parsed.scrub("s3cr3t") == "***"


def test_a_relative_file_is_pinned_to_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_url("sqlite:///sub/catalog.db").path == tmp_path / "sub" / "catalog.db"
    assert parse_url("sqlite:////abs/catalog.db").path == Path("/abs/catalog.db")
    assert parse_url("sqlite:///~/catalog.db").path == Path.home() / "catalog.db"
    assert parse_url("sqlite+pysqlite:///c.db?mode=ro").asks_read_only


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("catalog.db", "cannot be read"),
        ("/data/catalog.db", "cannot be read"),
        ("mysql://u:s3cr3t@h/d", "mysql"),
        ("postgresql+asyncpg://u:s3cr3t@h/d", "asyncpg"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://host/path", "no host"),
        ("sqlite:///c.db?cache=s3cr3t", "cache"),
        ("sqlite:///c.db?mode=memory", "mode"),
        ("postgresql://u:s3cr3t@h:port/d", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_other_urls_are_refused_without_repeating_a_password(text: str, reason: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        parse_url(text)
    assert reason in str(refused.value)
    assert "s3cr3t" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
