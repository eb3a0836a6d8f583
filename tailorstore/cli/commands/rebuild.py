"""``tailorstore rebuild``: take a root over."""

import sys
from contextlib import ExitStack

import click

from tailorstore.cli.output import (
    ID_SHOWN,
    Column,
    count,
    print_json,
    print_line,
    print_note,
    print_table,
    without_warnings,
)
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.names import REFS_PREFIX
from tailorstore.domain.reports import RebuildReport

_LAYERS_SHOWN = 6


@make_command(
    "rebuild",
    examples=[
        "tailorstore rebuild --store s3://bucket/run",
        "tailorstore rebuild --dry-run",
        "tailorstore rebuild --catalog sqlite:///new.db --yes",
    ],
)
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be found; change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(settings: Settings, dry_run: bool, yes: bool) -> None:
    """Fill the catalog from the root, and take the root over.

    For when the catalog was lost or is older than the root, or the root was copied or handed on. A catalog that owned
    it can then only read: a trainer that still uses it is refused at its next commit. All that was published and is
    still there is found again; the rest is listed.

    A catalog that owns the root already first writes there what the root has lost and it still knows. To rebuild from
    the root alone, move the catalog away.
    """
    with ExitStack() as stack:
        with without_warnings("'tailorstore rebuild'"):
            store = stack.enter_context(settings.open())
        if not yes and not dry_run:
            if not sys.stdin.isatty():
                msg = "rebuild takes the root away from the catalog that owns it: confirm with --yes"
                raise click.UsageError(msg)
            question = f"Take {store.url} over with {store.catalog_url}? Its owner can then only read it."
            if not click.confirm(question, err=True):
                print_note("Nothing was changed.")
                return
        report = store.rebuild_catalog(dry_run=dry_run)
        url, catalog = store.url, store.catalog_url
    if settings.json:
        print_json(report)
        return
    found = (
        count(report.commits, "commit"),
        count(report.versions, "layer version"),
        count(len(report.branches), "branch", "branches"),
        count(len(report.tags), "tag"),
    )
    if dry_run:
        print_line(f"{url} holds {', '.join(found)}. Nothing was changed.")
    else:
        print_line(f"{catalog} owns {url} now (epoch {report.epoch}): {', '.join(found)}.")
    _print_rest(report)


def _print_rest(report: RebuildReport) -> None:
    if report.written:
        done = "Would write" if report.dry_run else "Wrote"
        print_line(f"{done} {count(len(report.written), 'document')} again first, which the root had lost.")
    if report.unplaced:
        print_line(
            f"{count(len(report.unplaced), 'commit')} left unpublished by a race or a crash, or copied here from"
            " another store; gc sweeps them."
        )
    if report.unclaimed:
        print_line(
            f"{count(len(report.unclaimed), 'commit')} whose manifest is gone, or that never got so far: their layers"
            " are kept for the grace period of gc."
        )
    for key in report.unreadable:
        rest = (
            "A branch or tag may stand elsewhere than it did, or be gone"
            if key.startswith(REFS_PREFIX)
            else "A branch may stand at an earlier step than it did"
        )
        print_line(f"Could not read {key}. {rest}.")
    if report.unreadable:
        print_line(
            "gc deletes nothing until that is put back from a backup, and the catalog rebuilt again, or until it is"
            " deleted."
        )
    if report.dangling:
        print_line(
            f"Cannot be found where they were, as the manifests of their commits are gone or could not be read:"
            f" {', '.join(report.dangling)}."
        )
    if report.incomplete:
        print_line(
            f"{count(len(report.incomplete), 'commit')} lost layers, as listed. Chunks are not looked at: 'tailorstore"
            " verify' reads them."
        )
        rows = [
            (
                str(one.step),
                one.id[:ID_SHOWN],
                one.branch,
                ", ".join(one.layers[:_LAYERS_SHOWN])
                + (f" and {len(one.layers) - _LAYERS_SHOWN} more" if len(one.layers) > _LAYERS_SHOWN else ""),
            )
            for one in report.incomplete
        ]
        print_table((Column("step", right=True), Column("commit"), Column("branch"), Column("lost")), rows)
