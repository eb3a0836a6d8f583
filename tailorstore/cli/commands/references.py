"""What the commands ``tag`` and ``branch`` share."""

from collections.abc import Sequence

import click

from tailorstore.cli.output import ID_SHOWN, Column, ago, print_line, print_table
from tailorstore.domain.records import Reference


def only_one(name: str | None, listing: bool, delete: str | None) -> None:
    """Refuse calls that ask for several things at once."""
    if sum((name is not None, listing, delete is not None)) > 1:
        msg = "give NAME [REF], or --list, or --delete NAME: one of them"
        raise click.UsageError(msg)


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
