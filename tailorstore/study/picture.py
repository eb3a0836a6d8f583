"""The picture: quality lost against bytes written, one curve a strategy, the frontier marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailorstore.domain.errors import InvalidInputError
from tailorstore.study.contenders import FULL, NUDGED, parse_contender
from tailorstore.study.results import Mean, Record, Summary, summarise
from tailorstore.study.tasks import require

_BOUND = 0.1
"""Percent: what a composite may cost."""
_LINEAR = 0.1
"""Percent: below this the scale is linear."""
_PANELS = (("restored", "as restored"), ("resumed", "after training on for {resume} steps"))
_SELECTION_MARKERS = "ovsPX^<>Dhdp*"
_SELECTION_COLOURS = ("#b2182b", "#ef8a62", "#d6604d", "#f4a582", "#c51b7d", "#8c510a", "#bf812d", "#dfc27d")
_LIGHT_COLOURS = ("#2166ac", "#1b7837", "#762a83", "#01665e", "#4393c3", "#5aae61", "#9970ab")


def draw(folder: Path, name: str, records: Sequence[Record]) -> list[Path]:
    """Draw one task, size and optimizer as ``NAME.svg`` and ``NAME.png``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidInputError: there is nothing to draw.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = summarise(records)
    if not summaries:
        msg = f"there are no results of {name} to draw"
        raise InvalidInputError(msg)
    plan = records[0].plan
    figure: Any = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS), sharex=True, sharey=True)
    for axis, (when, title) in zip(axes, _PANELS, strict=True):
        _panel(axis, summaries, when)
        axis.set_title(title.format(resume=plan.resume), fontsize=10)
    axes[0].set_ylabel("held-out loss above the full checkpoint's, %")
    figure.supxlabel("bytes written over the run, relative to full commits", fontsize=10)
    seeds = len({record.plan.seed for record in records})
    figure.suptitle(
        f"{plan.task}: {records[0].parameters / 1e6:.1f} M parameters, {plan.optimizer}, {plan.commits} commits"
        f" {plan.every} steps apart, {seeds} seed{'s' * (seeds != 1)}",
        fontsize=11,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7.5, frameon=False)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Without a date, equal results give equal files.
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=160)
    return paths


def _panel(axis: Any, summaries: Sequence[Summary], when: str) -> None:  # noqa: ANN401
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=_LINEAR, linscale=1.5)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.axhline(_BOUND, color="0.2", linewidth=0.9, linestyle="--", label=f"{_BOUND} %")
    for summary in summaries:
        if summary.contender == NUDGED:
            mean: Mean = getattr(summary, when)
            band = abs(mean.value) + 2 * mean.error
            axis.axhspan(-band, band, color="0.85", zorder=0, linewidth=0, label="chance (nudged weights), ±2 s.e.")
    drawn = [summary for summary in summaries if summary.contender != NUDGED]
    front = frontier([(summary.share, getattr(summary, when).value) for summary in drawn])
    axis.plot(*zip(*front, strict=True), color="#fdd835", linewidth=7, alpha=0.55, zorder=1, label="frontier")
    selections = 0
    for at, (strategy, found) in enumerate(_curves(drawn).items()):
        light = parse_contender(found[0].contender).bits is not None
        if strategy == FULL:
            look = {"color": "black", "marker": "*", "markersize": 11}
        elif light:
            look = {"color": _LIGHT_COLOURS[(at - selections) % len(_LIGHT_COLOURS)], "marker": "o", "markersize": 4.5}
        else:
            look = {
                "color": _SELECTION_COLOURS[selections % len(_SELECTION_COLOURS)],
                "marker": _SELECTION_MARKERS[selections % len(_SELECTION_MARKERS)],
                "markersize": 6.5,
            }
            selections += 1
        _curve(axis, strategy, found, when, look)
    axis.grid(visible=True, which="major", color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_formatter(_as_fraction)
    axis.xaxis.set_minor_formatter("")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _as_fraction(value: float, _: int) -> str:
    return f"1/{1 / value:.0f}" if value < 1 else f"{value:g}"


def _curve(axis: Any, strategy: str, found: Sequence[Summary], when: str, look: dict[str, Any]) -> None:  # noqa: ANN401
    ordered = sorted(found, key=lambda summary: summary.share)
    means: list[Mean] = [getattr(summary, when) for summary in ordered]
    axis.errorbar(
        [summary.share for summary in ordered],
        [mean.value for mean in means],
        yerr=[mean.error for mean in means],
        label=strategy,
        linewidth=1.1,
        elinewidth=0.8,
        capsize=2,
        zorder=3,
        **look,
    )
    for summary, mean in zip(ordered, means, strict=True):
        if (bits := parse_contender(summary.contender).bits) is not None:
            axis.annotate(
                bits,
                (summary.share, mean.value),
                xytext=(3, 4),
                textcoords="offset points",
                fontsize=6.5,
                color=look["color"],
            )


def _curves(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Put what differs in bits alone into one curve."""
    curves: dict[str, list[Summary]] = {}
    for summary in summaries:
        contender = parse_contender(summary.contender)
        codec = f" + {contender.codec}" if contender.codec != "none" else ""
        curves.setdefault(f"{contender.strategy}{codec}", []).append(summary)
    return curves


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both bytes and quality, by growing bytes.

    What a composite seems to gain is chance: no point beats another by it.

    Examples:
        >>> frontier([(1.0, 0.0), (0.5, -0.01), (0.25, 0.5), (0.3, 0.7)])
        [(0.25, 0.5), (0.5, -0.01)]
    """
    best = float("inf")
    front = []
    for share, lost in sorted(points):
        if max(lost, 0.0) < best:
            best = max(lost, 0.0)
            front.append((share, lost))
    return front
