"""``tailorstore gc``: drop commits by policies, sweep what nothing refers to."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from tailorstore.cli.output import (
    ID_SHOWN,
    Column,
    ago,
    count,
    duration,
    plain,
    print_json,
    print_line,
    print_note,
    print_table,
    size,
)
from tailorstore.cli.progress import progress_bars
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.cli.values import Best, Duration
from tailorstore.domain.records import DEFAULT_GRACE, GcReport
from tailorstore.domain.retention import AnyOf, KeepBest, KeepEvery, KeepLast, KeepTagged, KeepWithin, RetentionPolicy

if TYPE_CHECKING:
    from tailorstore.engine.store import Store

_ROWS = 40

_COLUMNS = (
    Column("step", right=True, style="bold"),
    Column("commit", style="yellow"),
    Column("branch", spare=True),
    Column("made", spare=True),
    Column("", style="bold"),
    Column("why"),
)


@make_command(
    "gc",
    examples=[
        "tailorstore gc --keep-last 10 --keep-every 1000 --keep-best loss:3 --dry-run",
        "tailorstore gc --keep-within 7d --keep-best accuracy:1:max --yes",
        "tailorstore gc                          only sweep what crashed commits left behind",
    ],
)
@click.option("--keep-last", type=int, metavar="N", help="Keep the newest N commits of every branch.")
@click.option("--keep-every", type=int, metavar="STEPS", help="Keep one commit for each interval of STEPS steps.")
@click.option(
    "--keep-best", type=Best(), multiple=True, help="Keep the N best by a metric; least is best unless 'max'."
)
@click.option("--keep-within", type=Duration(), metavar="DURATION", help="Keep commits younger than this: 36h, 7d, 2w.")
@click.option("--keep-tagged", is_flag=True, help="Keep nothing but what is always kept (see above).")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done; change nothing.")
@click.option(
    "--grace",
    type=Duration(),
    metavar="DURATION",
    default=DEFAULT_GRACE,
    show_default="24h",
    help="How long objects that nothing refers to any more are left alone, for readers that are still at them.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Where there is no terminal, nothing is asked anyway.")
def command(
    settings: Settings,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: Sequence[KeepBest],
    keep_within: timedelta | None,
    keep_tagged: bool,
    dry_run: bool,
    grace: timedelta,
    yes: bool,
) -> None:
    """Delete what no kept commit needs.

    A commit is kept if any --keep option keeps it. The newest commit of every branch, tagged commits and those
    being read or built on are always kept. Without a --keep option every commit is kept, and only leftovers of
    crashed commits and what lost its standing before are swept. Safe beside trainers, and to stop at any time.
    While there are manifests, or records of tags and branches, of which nobody knows what they said, it refuses.
    """
    policies: list[RetentionPolicy] = [*keep_best]
    if keep_last is not None:
        policies.append(KeepLast(keep_last))
    if keep_every is not None:
        policies.append(KeepEvery(keep_every))
    if keep_within is not None:
        policies.append(KeepWithin(keep_within))
    if keep_tagged:
        policies.append(KeepTagged())
    policy = AnyOf(tuple(policies)) if policies else None
    with settings.open() as store:
        if not dry_run and not yes and sys.stdin.isatty() and not _agreed(settings, store, policy, grace):
            print_note("Nothing was changed.")
            return
        with progress_bars() as tell:
            report = store.gc(policy, dry_run=dry_run, grace=grace, progress=tell)
        if settings.json:
            print_json({**plain(report), "bytes_to_free": report.bytes_to_free})
        else:
            if policy is not None:
                _print_plan(store, report)
            _print_summary(report)


def _agreed(settings: Settings, store: "Store", policy: RetentionPolicy | None, grace: timedelta) -> bool:
    """Show what would be done, and ask. Whatever changes in between, gc decides anew by the same rules."""
    with progress_bars() as tell:
        plan = store.gc(policy, dry_run=True, grace=grace, progress=tell)
    if not plan.expired and not plan.bytes_to_free and not plan.leftovers_swept:
        return True
    if not settings.json:
        if policy is not None:
            _print_plan(store, plan)
        _print_summary(plan)
    question = f"Drop {count(len(plan.expired), 'commit')} and free {size(plan.bytes_to_free)}?"
    return click.confirm(question, err=True)


def _print_plan(store: "Store", report: GcReport) -> None:
    """Print kept commits with their reasons, and dropped ones."""
    listed = [(store.show(commit_id), "; ".join(reasons)) for commit_id, reasons in list(report.kept.items())[:_ROWS]]
    rows = [
        (commit.step, [str(commit.step), commit.id[:ID_SHOWN], commit.branch, ago(commit.created_at), word, reason])
        for word, group in (
            ("keep", listed),
            ("drop", [(commit, "no policy keeps it") for commit in report.expired[-_ROWS:]]),
        )
        for commit, reason in group
    ]
    print_table(_COLUMNS, [row for _, row in sorted(rows, key=lambda row: -row[0])])
    hidden = max(0, len(report.kept) - _ROWS) + max(0, len(report.expired) - _ROWS)
    if hidden:
        print_line(f"… and {count(hidden, 'commit')} more; --json has all.")
    print_line()


def _print_summary(report: GcReport) -> None:
    dry = report.dry_run
    print_line(
        f"{'Would drop' if dry else 'Dropped'} {count(len(report.expired), 'commit')} and"
        f" {'keep' if dry else 'kept'} {len(report.kept):,}."
    )
    if report.versions_doomed:
        print_line(
            f"{count(report.versions_doomed, 'layer version')}, {size(report.bytes_doomed)}, that no kept commit needs"
            f" can be deleted once the grace period ({duration(report.grace)}) is over."
        )
    print_line(
        f"{'Would delete' if dry else 'Deleted'} {count(report.versions_swept, 'layer version')} whose grace period is"
        f" over, and {count(report.leftovers_swept, 'leftover')} of crashed commits: {size(report.bytes_freed)}."
    )
    if report.deletes_failed:
        print_line(f"{count(report.deletes_failed, 'object')} could not be deleted; the next run tries again.")
