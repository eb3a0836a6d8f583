"""What the commands ``tag`` and ``branch`` share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tailorstore.cli.output import ID_SHOWN, Column, ago, count, print_line, print_note, print_table
from tailorstore.domain.names import REFS_PREFIX
from tailorstore.domain.records import Reference

if TYPE_CHECKING:
    from tailorstore.engine.store import Store


def only_one(name: str | None, listing: bool, delete: str | None) -> None:
    """Refuse calls that ask for several things at once."""
    if sum((name is not None, listing, delete is not None)) > 1:
        msg = "give NAME [REF], or --list, or --delete NAME: one of them"
        raise click.UsageError(msg)


def warn_of_unread(store: "Store") -> None:
    """Say on stderr if more was in the root than what is listed."""
    unread = store.unread()
    if not unread:
        return
    records = sum(key.startswith(REFS_PREFIX) for key in unread)
    parts = [count(len(unread) - records, "manifest")] if len(unread) > records else []
    parts += [f"{count(records, 'record')} of tags or branches"] if records else []
    print_note(f"{' and '.join(parts)} could not be read: 'tailorstore rebuild --dry-run' lists them.")


def print_references(references: Sequence[Reference], kind: str) -> None:
    """Print a table of tags or branches."""
    if not references:
        print_line(f"No {kind} yet.")
        return
    columns = (
        Column(kind, style="green"),
        Column("step", right=True, style="bold"),
        Column("commit", style="yellow"),
        Column("made", spare=True),
    )
    print_table(
        columns,
        [
            [
                reference.name,
                "-" if reference.step is None else str(reference.step),
                (reference.commit or "-")[:ID_SHOWN],
                ago(reference.created_at),
            ]
            for reference in references
        ],
    )
