"""The picture: quality lost against bytes written, one curve a strategy, the frontier marked."""

from collections.abc import Iterator, Sequence
from itertools import cycle
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
_SELECTION_MARKERS = "svP^<>XDhd"
_SELECTION_COLOURS = ("#b2182b", "#e08214", "#8c510a", "#c51b7d", "#bf812d", "#d6604d")
_LIGHT_MARKERS = "osD^v"
_LIGHT_COLOURS = ("#2166ac", "#1b7837", "#762a83", "#01665e", "#4393c3", "#5aae61", "#9970ab")
_PARTS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
_TICKS = (-1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(folder: Path, name: str, records: Sequence[Record]) -> list[Path]:
    """Draw one task, size and optimizer as ``NAME.svg`` and ``NAME.png``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidInputError: there is nothing to draw.
    """
    require("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = summarise(records)
    if not summaries:
        msg = f"there are no results of {name} to draw"
        raise InvalidInputError(msg)
    plan = records[0].plan
    figure: Any = Figure(figsize=(11, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS), sharex=True, sharey=True)
    for axis, (when, title) in zip(axes, _PANELS, strict=True):
        _panel(axis, summaries, when)
        axis.set_title(title.format(resume=plan.resume), fontsize=10)
        axis.set_xlabel("bytes written over the run, of those of full commits", fontsize=9)
    axes[0].set_ylabel("held-out loss above the full checkpoint's, %", fontsize=9)
    seeds = len({record.plan.seed for record in records})
    figure.suptitle(
        f"{plan.group}: {records[0].parameters / 1e6:.1f} M parameters, {plan.commits} commits {plan.every} steps"
        f" apart, {seeds} seed{'s' * (seeds != 1)}",
        fontsize=11,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Without a date and with names of its own for what it repeats, equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(paths[0], metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(paths[1], dpi=110, bbox_inches="tight")
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
            axis.axhspan(-band, band, color="0.85", zorder=0, linewidth=0, label="chance: nudged weights, ± 2 s.e.")
    drawn = [summary for summary in summaries if summary.contender != NUDGED]
    front = frontier([(summary.share, getattr(summary, when).value) for summary in drawn])
    axis.plot(*zip(*front, strict=True), color="#fdd835", linewidth=7, alpha=0.5, zorder=1, label="frontier")
    looks = _looks()
    for name, found in _curves(drawn).items():
        _curve(axis, name, found, when, next(looks[_kind(found[0])]))
    _scales(axis, [summary.share for summary in drawn])


def _scales(axis: Any, shares: Sequence[float]) -> None:  # noqa: ANN401
    least = min(shares) * 0.8
    axis.set_xlim(least, 1.25)
    axis.set_xticks([1 / part for part in _PARTS if 1 / part >= least])
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(lambda value, _: f"1/{1 / value:.0f}" if value < 1 else "1")
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


def _kind(summary: Summary) -> str:
    if summary.contender == FULL:
        return "full"
    return "light" if "light" in summary.contender or parse_contender(summary.contender).bits else "selection"


def _looks() -> dict[str, Iterator[dict[str, Any]]]:
    """Return, for each kind of contender, the looks of one after the other."""
    return {
        "full": cycle([{"color": "black", "marker": "*", "markersize": 11, "linestyle": "none"}]),
        "selection": (
            {"color": color, "marker": marker, "markersize": 6.5, "linestyle": "none"}
            for color, marker in zip(cycle(_SELECTION_COLOURS), cycle(_SELECTION_MARKERS), strict=False)
        ),
        "light": (
            {"color": color, "marker": marker, "markersize": 4.5}
            for color, marker in zip(cycle(_LIGHT_COLOURS), cycle(_LIGHT_MARKERS), strict=False)
        ),
    }


def _curve(axis: Any, name: str, found: Sequence[Summary], when: str, look: dict[str, Any]) -> None:  # noqa: ANN401
    ordered = sorted(found, key=lambda summary: summary.share)
    means: list[Mean] = [getattr(summary, when) for summary in ordered]
    axis.errorbar(
        [summary.share for summary in ordered],
        [mean.value for mean in means],
        yerr=[mean.error for mean in means],
        label=name,
        linewidth=1.1,
        elinewidth=0.8,
        capsize=2,
        zorder=3,
        **look,
    )
    for at, (summary, mean) in enumerate(zip(ordered, means, strict=True)):
        if (bits := parse_contender(summary.contender).bits) is not None:
            axis.annotate(
                bits,
                (summary.share, mean.value),
                # Above and below in turn, as neighbours are close.
                xytext=(2, 4 if at % 2 else -9),
                textcoords="offset points",
                fontsize=6.5,
                color=look["color"],
            )


def _curves(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Put what differs in bits alone into one curve; what is made with the bounds of a store is one of its own."""
    curves: dict[str, list[Summary]] = {}
    for summary in summaries:
        contender = parse_contender(summary.contender)
        name = contender.strategy.replace("bytes_per_commit={filter}", "bytes of the filter")
        codec = f" + {contender.codec}" if contender.codec != "none" else ""
        defaults = ", defaults" if _kind(summary) == "light" and contender.bits is None else ""
        curves.setdefault(f"{name}{codec}{defaults}", []).append(summary)
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
