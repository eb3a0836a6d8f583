"""``tailorstore verify``: read everything and compare it with its digests."""

import click

from tailorstore.cli.errors import BROKEN
from tailorstore.cli.output import ID_SHOWN, Column, count, plain, print_json, print_line, print_table, size
from tailorstore.cli.progress import progress_bars
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command

_COLUMNS = (
    Column("damage", style="red"),
    Column("layer", style="cyan"),
    Column("step", right=True),
    Column("object"),
    Column("commits", right=True),
    Column("what", spare=True),
)
_ADVICE = (
    "Commits without damage restore as before. A damaged layer can be had from another step: 'tailorstore log' lists"
    " them; the next full commit writes every layer anew."
)


@make_command("verify", examples=["tailorstore verify", "tailorstore verify latest", "tailorstore verify best --json"])
@click.argument("ref", required=False)
def command(settings: Settings, ref: str | None) -> None:
    """Compare every object with its digest.

    Reads all objects of a commit, or without REF of the whole store; that takes as long as restoring them.
    Exits with 5 if anything is missing, cut short or altered, and names the commits that hold it.
    """
    with settings.open() as store, progress_bars() as tell:
        report = store.verify(ref, progress=tell)
    if settings.json:
        print_json({**plain(report), "ok": report.ok})
    else:
        read = (
            f"{count(report.versions, 'layer version')}, {count(report.objects, 'object')}, {size(report.bytes_read)}"
        )
        if report.ok:
            print_line(f"Everything is as it was written: {read}.")
        else:
            print_table(
                _COLUMNS,
                [
                    [damage.kind, damage.layer, str(damage.step), damage.key, str(len(damage.commits)), damage.detail]
                    for damage in report.damages
                ],
            )
            print_line()
            holding = sorted({commit for damage in report.damages for commit in damage.commits})
            print_line(f"Found {count(len(report.damages), 'damage')} in {read}.")
            if holding:
                print_line(f"Commits that hold them: {', '.join(commit[:ID_SHOWN] for commit in holding)}.")
            print_line(_ADVICE)
    if not report.ok:
        raise click.exceptions.Exit(BROKEN)
