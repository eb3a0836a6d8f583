"""``tailorstore rebuild``: take a root over."""

import sys

import click

from tailorstore.cli.output import count, print_json, print_line, print_note
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command


@make_command(
    "rebuild",
    examples=["tailorstore rebuild --store s3://bucket/run", "tailorstore rebuild --catalog sqlite:///new.db --yes"],
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(settings: Settings, yes: bool) -> None:
    """Fill a new catalog from the root, and take the root over.

    For when the catalog was lost, or the root was copied or handed on. The catalog that owned it can then only
    read: a trainer that still uses it is refused at its next commit. All that was published is found again.
    """
    with settings.open() as store:
        if not yes:
            if not sys.stdin.isatty():
                msg = "rebuild takes the root away from the catalog that owns it: confirm with --yes"
                raise click.UsageError(msg)
            question = f"Take {store.url} over with {store.catalog_url}? Its owner can then only read it."
            if not click.confirm(question, err=True):
                print_note("Nothing was changed.")
                return
        report = store.rebuild_catalog()
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
    print_line(f"{catalog} owns {url} now (epoch {report.epoch}): {', '.join(found)}.")
    if report.unplaced:
        print_line(f"{count(len(report.unplaced), 'commit')} left unpublished by a race or a crash; gc sweeps them.")
    for key in report.unreadable:
        print_line(f"Could not read {key}.")
