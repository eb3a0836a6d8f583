"""SQL is never made of values: not in the sources, and not by any name that a database could take for SQL."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import TailorError
from tests.catalog.kit import plain_sql
from tests.kit.models import assert_same

CHECKOUT = Path(__file__).parent.parent.parent

FIXED = {
    ("tailorstore/catalog/database.py", "table"),  # the names of tables that this floor defines
    ("tailorstore/catalog/database.py", "right"),
    ("tailorstore/catalog/database.py", "wanted"),
    ("tailorstore/catalog/postgres.py", "LOCK_WAIT_SECONDS"),
    ("tailorstore/catalog/postgres.py", "IDLE_SECONDS"),
    ("tailorstore/catalog/schema.py", "_ADVISORY_LOCK"),
    ("tailorstore/catalog/sqlite.py", "'OFF' if self._migrating else 'ON'"),
    ("migrations/versions/0005_lines_and_withdrawn.py", "by_key"),
}
"""What stands in SQL texts that are put together: all of it is written down in the sources."""

WORDS = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "CREATE ", "DROP ", "ALTER ", "SET ", "PRAGMA ", "has_table_")


def texts_put_together() -> Iterator[tuple[str, str]]:
    """Yield the file and each expression of all SQL that is put together from more than one text."""
    files = [*CHECKOUT.glob("tailorstore/catalog/*.py"), *CHECKOUT.glob("migrations/**/*.py")]
    for file in files:
        name = str(file.relative_to(CHECKOUT))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                fixed = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
                if any(fixed.lstrip().startswith(word) for word in WORDS):
                    yield from (
                        (name, ast.unparse(part.value)) for part in node.values if isinstance(part, ast.FormattedValue)
                    )
            calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
            if calls and isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("text", "exec_driver_sql", "execute", "scalar", "scalars", "literal_column"):
                    for argument in node.args[:1]:
                        if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Mod | ast.Add):
                            yield name, ast.unparse(argument)
                        if isinstance(argument, ast.Call) and ast.unparse(argument.func).endswith(".format"):
                            yield name, ast.unparse(argument)


def test_no_sql_text_is_built_from_values() -> None:
    found = set(texts_put_together())
    assert found <= FIXED
    # The search finds what is there to be found.
    assert {expression for _, expression in found} >= {"table", "right", "_ADVISORY_LOCK", "by_key"}


NASTY = [
    "'; DROP TABLE commits; --",
    '"; DELETE FROM versions; --',
    "100% %s %(x)s :name ?1 $1 {0}",
    "back\\slash \\' \\\\ \\x00",
    "nul\x00 bell\x07 newline\n tab\t",
    "ünïcödé \N{SNOWMAN} \N{PILE OF POO} \u202e \ud800",
    "a' OR '1'='1",
    "/* comment */ -- x",
]


def test_names_that_look_like_sql_are_names(catalog_url: str, tmp_path: Path) -> None:
    state = {f"{name}.w": torch.full((2,), float(at)) for at, name in enumerate(NASTY)}
    root = tmp_path / 'it\'s 50% "good"; DROP'
    rule = {f"{name}.w": name for name in NASTY}
    with ts.open_store(root, catalog=catalog_url, layers=lambda tensor: rule[tensor]) as store:
        for step, text in enumerate(NASTY):
            made = store.commit(step, state, message=text, metrics={text: float(step)}, extra={text: text})
            assert (made.message, dict(made.metrics)) == (text, {text: float(step)})
        for step, text in enumerate(NASTY):
            with store.checkout(step) as checkpoint:
                assert_same(checkpoint.model_state_dict(), state)
                assert checkpoint.extra == {text: text}
                assert dict(checkpoint.metrics) == {text: float(step)}
        assert {layer.name for layer in store.layers()} == {*NASTY, "@extra"}
        store.tag("a/tag+b_c.d-e", 1)
        store.branch("a/branch+b_c.d-e", 1)
        for text in NASTY:
            for call in (
                lambda text=text: store.checkout(text),
                lambda text=text: store.show(f"{text}@1"),
                lambda text=text: store.log(text),
                lambda text=text: store.tag(text),
                lambda text=text: store.branch(text),
                lambda text=text: store.branch(text, move=True),
                lambda text=text: store.delete_tag(text),
                lambda text=text: store.delete_branch(text),
                lambda text=text: store.updates(text),
            ):
                with pytest.raises(TailorError):
                    call()
        assert len(store.log()) == len(NASTY)
        assert [tag.name for tag in store.tags()] == ["a/tag+b_c.d-e"]
        store.gc(ts.KeepBest(NASTY[0], 1) | ts.KeepLast(2))
        assert store.verify().ok
        assert store.rebuild_catalog().commits == len(store.log())
        assert {layer.name for layer in store.layers()} == {*NASTY, "@extra"}
    with plain_sql(catalog_url) as connection:
        found = connection.execute("SELECT count(*) FROM layers").fetchall()
    assert [int(row[0]) for row in found] == [len(NASTY) + 1]
