"""What ``verify`` and ``scrub`` say of what they read."""

from typing import TYPE_CHECKING

import click

from tailorstore.cli.errors import BROKEN
from tailorstore.cli.output import (
    ID_SHOWN,
    Column,
    count,
    plain,
    print_heading,
    print_json,
    print_line,
    print_table,
    size,
)
from tailorstore.domain.errors import BranchNotFoundError
from tailorstore.domain.names import REFS_PREFIX, version_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tailorstore.cli.settings import Settings
    from tailorstore.domain.records import Damage, Loss, Unknown, VerifyReport
    from tailorstore.engine.store import Store

_DAMAGES = (
    Column("damage", style="red"),
    Column("layer", style="cyan"),
    Column("step", right=True),
    Column("object"),
    Column("commits", right=True),
    Column("what", spare=True),
)
_LOSSES = (
    Column("step", right=True, style="bold"),
    Column("commit", style="yellow"),
    Column("branch", spare=True),
    Column("loses"),
)
_UNKNOWN = (Column("object"), Column("size", right=True))
_ROWS = 20

_WAY_BACK = (
    "Commits that lose no layer restore as before; 'tailorstore checkout latest --fallback' takes the newest of them."
)
_NO_WAY_BACK = "Every commit that led to the newest loses layers; their others can be read from a plain checkout."
_REPAIR = "'tailorstore verify --repair' "
_REPAIRABLE = "makes again what follows from what is known"
_NOT_IN_QUARANTINE = "puts damaged layers into quarantine, so that the next commit writes them anew"
_QUARANTINED = (
    "Nothing was deleted and no composite was changed: those that hold a layer in quarantine say so. The next commit"
    " that captures the layer writes it anew, whatever its mask says. What is put back by hand leaves quarantine at the"
    " next 'tailorstore verify --repair'."
)


def leads_back(store: "Store", report: "VerifyReport") -> bool | None:
    """Tell whether a fallback from the newest commit finds one that loses no layer; ``None`` where none is needed."""
    losing = {loss.commit for loss in report.losses if loss.layers}
    if not losing:
        return None
    try:
        return any(commit.id not in losing for commit in store.log())
    except BranchNotFoundError:
        return None


def print_report(
    settings: "Settings", report: "VerifyReport", *, way_back: bool | None, repaired: bool = False
) -> None:
    """Print a report, and end with the exit code that fits.

    Args:
        settings: of the call.
        report: what was found.
        way_back: as :func:`leads_back` told.
        repaired: whether it was to be repaired, too.
    """
    if settings.json:
        print_json({**plain(report), "ok": report.ok})
    else:
        _print_for_people(report, way_back=way_back, repaired=repaired)
    if not report.ok:
        raise click.exceptions.Exit(BROKEN)


def _print_for_people(report: "VerifyReport", *, way_back: bool | None, repaired: bool) -> None:
    read = f"{count(report.versions, 'layer version')}, {count(report.objects, 'object')}, {size(report.bytes_read)}"
    if report.damages:
        print_table(_DAMAGES, [_damage_row(damage, _is_away(damage, report)) for damage in report.damages])
        print_line()
        print_line(f"Found {count(len(report.damages), 'damage')} in {read}.")
    else:
        print_line(f"Everything is as it was written: {read}.")
    _print_losses(report.losses)
    mended = sum(damage.mended and not damage.key.startswith(REFS_PREFIX) for damage in report.damages)
    if mended:
        print_line(f"Made {count(mended, 'document')} again, exactly.")
    for prefix in report.quarantined:
        print_line(f"In quarantine: {prefix}")
    for prefix in report.lifted:
        print_line(f"Whole again, and out of quarantine: {prefix}")
    if report.quarantined:
        print_line(_QUARANTINED)
    for advice in _advice(report, way_back=way_back, repaired=repaired):
        print_line(advice)
    _print_names(report)
    _print_unknown(report.unknown)
    if report.awaiting_gc:
        print_line(
            f"{count(report.awaiting_gc, 'object')} of expired or unpublished commits wait for 'tailorstore gc'."
        )


def _advice(report: "VerifyReport", *, way_back: bool | None, repaired: bool) -> "Iterator[str]":
    """Yield what there is to do, as far as it applies."""
    if way_back is not None:
        yield _WAY_BACK if way_back else _NO_WAY_BACK
    left = [damage for damage in report.damages if not damage.mended and not _is_away(damage, report)]
    made_again = any(damage.readable or damage.version_id is None for damage in left)
    put_away = any(not damage.readable and damage.version_id is not None for damage in left)
    verbs = [_REPAIRABLE] * made_again + [_NOT_IN_QUARANTINE] * put_away
    if verbs and not repaired:
        yield f"{_REPAIR}{', and '.join(verbs)}."


def _is_away(damage: "Damage", report: "VerifyReport") -> bool:
    """Tell whether a damage is of a layer version in quarantine."""
    return damage.version_id is not None and version_prefix(damage.layer, damage.version_id) in report.quarantined


def _damage_row(damage: "Damage", away: bool) -> list[str]:
    if damage.key.startswith(REFS_PREFIX):
        what = f"{damage.detail} - no longer needed, and deleted" if damage.mended else damage.detail
        return [damage.kind, "(tag or branch)", "", damage.key, "", what]
    layer = damage.layer if damage.version_id is not None else "(manifest)"
    what = damage.detail + (" - made again" if damage.mended else " - in quarantine" if away else "")
    return [damage.kind, layer, str(damage.step) if damage.commits else "", damage.key, str(len(damage.commits)), what]


def _print_names(report: "VerifyReport") -> None:
    if report.recorded:
        print_line(f"Recorded again: {', '.join(report.recorded)}.")
    if report.unrecorded:
        names = ", ".join(report.unrecorded)
        print_line(f"A rebuild would not find as they are: {names}. 'tailorstore verify --repair' records them.")


def _print_losses(losses: "Sequence[Loss]") -> None:
    if not losses:
        return
    print_heading("What commits lose")
    print_table(_LOSSES, [[str(one.step), one.commit[:ID_SHOWN], one.branch, _lost(one)] for one in losses])
    print_line()


def _lost(loss: "Loss") -> str:
    parts = [f"{count(len(loss.layers), 'layer')}: {', '.join(loss.layers)}"] if loss.layers else []
    parts += ["its manifest: a rebuild of the catalog would not find it"] if loss.manifest else []
    return "; ".join(parts)


def _print_unknown(unknown: "Sequence[Unknown]") -> None:
    if not unknown:
        return
    print_heading("Objects that nothing explains")
    print_table(_UNKNOWN, [[one.key, size(one.bytes)] for one in unknown[:_ROWS]])
    if len(unknown) > _ROWS:
        print_line(f"and {len(unknown) - _ROWS:,} more; --json lists all.")
    print_line("They do no harm. 'tailorstore gc' sweeps those that a crash left once they are a day old.")
