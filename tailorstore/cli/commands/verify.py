"""``tailorstore verify``: read everything and compare it with its digests."""

import click

from tailorstore.cli.progress import progress_bars
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.cli.verified import leads_back, print_report


@make_command(
    "verify",
    examples=[
        "tailorstore verify",
        "tailorstore verify latest",
        "tailorstore verify best --json",
        "tailorstore verify --repair",
    ],
)
@click.argument("ref", required=False)
@click.option(
    "--repair",
    is_flag=True,
    help="Make documents again that follow from others, and put damaged layers into quarantine.",
)
def command(settings: Settings, ref: str | None, repair: bool) -> None:
    """Compare every object with its digest.

    Reads all objects of a commit, or without REF of the whole store; that takes as long as restoring them.
    Exits with 5 if anything is missing, cut short or altered, and names the commits that hold it. Of the whole store
    it also lists objects that nothing explains.

    With --repair a damaged layer is never taken for unchanged again: the next commit writes it anew. Nothing is
    deleted, and no composite is changed.
    """
    with settings.open() as store:
        with progress_bars() as tell:
            report = store.verify(ref, repair=repair, progress=tell)
        way_back = leads_back(store, report)
    print_report(settings, report, way_back=way_back, repaired=repair)
