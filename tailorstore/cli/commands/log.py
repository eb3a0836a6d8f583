"""``tailorstore log``: list commits."""

from collections import defaultdict
from collections.abc import Sequence

import click

from tailorstore.cli.commands.references import warn_of_unread
from tailorstore.cli.output import ID_SHOWN, Column, ago, metrics, print_json, print_note, print_table, share, size
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.records import Commit, Reference

_ROWS = 20

COLUMNS = (
    Column("step", right=True, style="bold"),
    Column("commit", style="yellow"),
    Column("when", spare=True),
    Column("layers", right=True),
    Column("written", right=True),
    Column("of full", right=True, spare=True),
    Column("metrics"),
    Column("names", style="green"),
    Column("message", spare=True),
)

QUARANTINED = Column("in quarantine", style="red")
"""One column more, where any commit needs it."""


def rows(commits: Sequence[Commit], branches: Sequence[Reference], tags: Sequence[Reference]) -> list[list[str]]:
    """Return the rows of a log's table."""
    names: dict[str | None, list[str]] = defaultdict(list)
    for reference in (*branches, *tags):
        names[reference.commit].append(reference.name)
    return [
        [
            str(commit.step),
            commit.id[:ID_SHOWN],
            ago(commit.created_at),
            str(len(commit.layers_written)),
            size(commit.bytes_written),
            share(commit.bytes_written, commit.bytes_logical),
            metrics(commit.metrics),
            ", ".join(names[commit.id]),
            commit.message or "",
        ]
        for commit in commits
    ]


@make_command(
    "log",
    examples=["tailorstore log --store ./run", "tailorstore log --branch warmup --limit 5", "tailorstore log --json"],
)
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    help=f"How many commits; 0 for all.  [default: {_ROWS} in a table, all with --json]",
)
def command(settings: Settings, limit: int | None) -> None:
    """List the commits of a branch, newest first.

    "layers" counts the layers that a commit wrote, "of full" compares its bytes with a save of everything. Layers
    that a commit did not write, its composite has from earlier steps: see 'tailorstore show'. Commits that hold layers
    in quarantine, which 'tailorstore verify --repair' found damaged, are marked with their names.
    """
    if limit is None:
        limit = 0 if settings.json else _ROWS
    with settings.open() as store:
        warn_of_unread(store)
        commits = store.log(limit=limit + 1 if limit else None)
        shown = commits[:limit] if limit else commits
        held = store.quarantined()
        quarantined = {commit.id: held[commit.id] for commit in shown if commit.id in held}
        if settings.json:
            print_json({"branch": store.branch_name, "commits": shown, "quarantined": quarantined})
            return
        table = rows(shown, store.branches(), store.tags())
        if quarantined:
            marks = [", ".join(quarantined.get(commit.id, ())) for commit in shown]
            print_table((*COLUMNS, QUARANTINED), [[*row, mark] for row, mark in zip(table, marks, strict=True)])
        else:
            print_table(COLUMNS, table)
        if limit and len(commits) > limit:
            print_note("There are older commits: --limit 0 lists all.")
