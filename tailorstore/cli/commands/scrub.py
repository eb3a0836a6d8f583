"""``tailorstore scrub``: verify a part of the store, what was not verified for longest first."""

import click

from tailorstore.cli.progress import progress_bars
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.cli.values import Share
from tailorstore.cli.verified import leads_back, print_report


@make_command("scrub", examples=["tailorstore scrub --fraction 1/30", "tailorstore scrub --fraction 3% --json"])
@click.option("--fraction", type=Share(), required=True, help="How much of all bytes: 1/30, 3%, 0.05.")
def command(settings: Settings, fraction: float) -> None:
    """Verify a part of the store, what was not verified for longest first.

    The catalog remembers what was read: run once a day with 1/30, everything is read within 30 days, as long as less
    than that is written each day. Exits with 5 if it finds damage, as 'tailorstore verify' does.
    """
    with settings.open() as store:
        with progress_bars() as tell:
            report = store.scrub(fraction, progress=tell)
        way_back = leads_back(store, report)
    print_report(settings, report, way_back=way_back)
