"""Pictures of layers over steps: a scale, its colours, and the same picture for a terminal or as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape

from tailorstore.cli.output import shown

Color = tuple[int, int, int]

_VIRIDIS: tuple[Color, ...] = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
"""The colour map viridis at equal distances, dark to bright: equal steps look equal, also to the colour-blind."""

RAMP = ".:-=+*#%@"
"""The same without colour, low to high."""

DAMAGED = "!"
_DAMAGED_COLOR = "#d62728"
_BLANK_COLOR = "#ffffff"
_SHADES = 64
"""Colours that a picture is reduced to, so that neighbours of one colour can be drawn as one."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Which figures are low and which are high."""

    low: float
    high: float
    log: bool

    def level(self, value: float) -> float:
        """Return where a figure stands between lowest (0) and highest (1)."""
        if self.high <= self.low or value <= self.low:
            return 0.0
        if self.log:
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, (value - self.low) / (self.high - self.low))

    def at(self, level: float) -> float:
        """Return the figure at a level."""
        if self.log and self.low > 0:
            return self.low * math.exp(level * math.log(self.high / self.low))
        return self.low + level * (self.high - self.low)


def scale_of(values: Iterable[float], *, linear: bool) -> Scale:
    """Return a scale on which all figures have a place: from the least above zero, or linear from zero."""
    found = [value for value in values if math.isfinite(value) and value > 0]
    if not found:
        return Scale(0.0, 0.0, log=False)
    return Scale(0.0, max(found), log=False) if linear else Scale(min(found), max(found), log=True)


def color_of(level: float) -> Color:
    """Return a level's colour.

    Examples:
        >>> color_of(0), color_of(0.5), color_of(1)
        ((68, 1, 84), (34, 144, 140), (253, 231, 37))
    """
    place = level * (len(_VIRIDIS) - 1)
    at = min(int(place), len(_VIRIDIS) - 2)
    red, green, blue = (round(a + (b - a) * (place - at)) for a, b in zip(_VIRIDIS[at], _VIRIDIS[at + 1], strict=True))
    return red, green, blue


def hex_of(color: Color) -> str:
    """Return a colour as it is written in styles."""
    return "#{:02x}{:02x}{:02x}".format(*color)


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Figures of layers (rows) at steps (columns)."""

    title: str
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    cells: tuple[tuple[float, ...], ...]
    """Per layer, one figure a step; NaN where there is none, infinite where the layer held NaN or infinities."""
    scale: Scale

    def thinned(self, columns: int) -> "Heatmap":
        """Return it with at most so many steps: every n-th, counted from the newest."""
        every = -(-len(self.steps) // max(columns, 1))
        if every <= 1:
            return self
        kept = slice((len(self.steps) - 1) % every, None, every)
        return replace(self, steps=self.steps[kept], cells=tuple(row[kept] for row in self.cells))

    @property
    def has_blanks(self) -> bool:
        """Whether some layer has no figure at some step."""
        return any(math.isnan(value) for row in self.cells for value in row)

    @property
    def has_damage(self) -> bool:
        """Whether some layer held NaN or infinities at some step."""
        return any(math.isinf(value) for row in self.cells for value in row)


def step_marks(steps: Sequence[int], letters: float) -> list[tuple[int, str]]:
    """Return the columns that have room for their step numbers, where a column is as wide as some letters.

    Examples:
        >>> step_marks([100, 200, 300, 400, 500, 600], 2)
        [(0, '100'), (3, '400')]
    """
    apart = math.ceil((max((len(str(step)) for step in steps), default=0) + 2) / letters)
    return [(at, str(steps[at])) for at in range(0, len(steps), apart)]


def figure(value: float) -> str:
    """Return a figure of a scale for people."""
    return f"{value:.3g}"


# --- SVG -----------------------------------------------------------------------------------------------------------

_FONT = 12
_LETTER = 7.2
_MAX_COLUMNS = 500


def svg(heatmap: Heatmap) -> str:
    """Return the picture as SVG: one rectangle for each run of cells of one colour, with axes and a legend."""
    drawn = heatmap.thinned(_MAX_COLUMNS)
    cell = max(2.0, min(28.0, 800 / max(len(drawn.steps), 1)))
    height = max(6.0, min(18.0, 900 / max(len(drawn.layers), 1)))
    left = 40 + _LETTER * max((len(shown(name)) for name in drawn.layers), default=0)
    top, width, tall = 56.0, cell * len(drawn.steps), height * len(drawn.layers)
    legend = left + max(width, 320.0) + 40
    total_width, total_height = legend + 110, max(top + tall, top + 220) + 78
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width:.0f}" height="{total_height:.0f}"'
        f' viewBox="0 0 {total_width:.0f} {total_height:.0f}" font-family="DejaVu Sans, Verdana, sans-serif"'
        f' font-size="{_FONT}" fill="#222222">'
    )
    parts = [
        head,
        f'<rect width="100%" height="100%" fill="{_BLANK_COLOR}"/>',
        _text(left, 28, heatmap.title, weight="bold", size=15),
        *_cells(drawn, left, top, cell, height),
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{tall:g}" fill="none" stroke="#888888"/>',
        *_layer_labels(drawn, left, top, height),
        *_step_labels(drawn, left, top + tall, cell),
        _text(left + width / 2, top + tall + 40, "step", anchor="middle"),
        _text(20, top + tall / 2, "layer", anchor="middle", turned=True),
        *_legend(drawn, legend, top),
        *_notes(heatmap, drawn, left, top + tall + 62),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _cells(heatmap: Heatmap, left: float, top: float, cell: float, height: float) -> list[str]:
    parts = []
    for row, values in enumerate(heatmap.cells):
        fills = [_fill(heatmap.scale, value) for value in values]
        start = 0
        for at in range(1, len(fills) + 1):
            if at < len(fills) and fills[at] == fills[start]:
                continue
            if fills[start] is not None:
                x, y, width = left + start * cell, top + row * height, (at - start) * cell
                parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fills[start]}"/>')
            start = at
    # Neighbours must not show a line where they meet.
    return ['<g shape-rendering="crispEdges">', *parts, "</g>"]


def _fill(scale: Scale, value: float) -> str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return _DAMAGED_COLOR
    return hex_of(color_of(round(scale.level(value) * (_SHADES - 1)) / (_SHADES - 1)))


def _layer_labels(heatmap: Heatmap, left: float, top: float, height: float) -> list[str]:
    every = math.ceil(_FONT / height)
    return [
        _text(left - 8, top + (row + 0.5) * height + 4, name, anchor="end")
        for row, name in enumerate(heatmap.layers)
        if row % every == 0
    ]


def _step_labels(heatmap: Heatmap, left: float, bottom: float, cell: float) -> list[str]:
    parts = []
    for at, text in step_marks(heatmap.steps, cell / _LETTER):
        x = left + (at + 0.5) * cell
        parts.append(f'<line x1="{x:g}" y1="{bottom:g}" x2="{x:g}" y2="{bottom + 5:g}" stroke="#888888"/>')
        parts.append(_text(x, bottom + 19, text, anchor="middle"))
    return parts


def _legend(heatmap: Heatmap, x: float, top: float) -> list[str]:
    scale, tall = heatmap.scale, 200.0
    stops = [
        f'<stop offset="{at / (len(_VIRIDIS) - 1):.4g}" stop-color="{hex_of(color)}"/>'
        for at, color in enumerate(_VIRIDIS)
    ]
    parts = [
        f'<defs><linearGradient id="scale" x1="0" y1="1" x2="0" y2="0">{"".join(stops)}</linearGradient></defs>',
        f'<rect x="{x:g}" y="{top:g}" width="16" height="{tall:g}" fill="url(#scale)" stroke="#888888"/>',
        _text(x, top + tall + 20, "log scale" if scale.log else "linear scale"),
    ]
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + tall * (1 - level)
        parts.append(f'<line x1="{x + 16:g}" y1="{y:g}" x2="{x + 21:g}" y2="{y:g}" stroke="#888888"/>')
        parts.append(_text(x + 26, y + 4, figure(scale.at(level))))
    return parts


def _notes(heatmap: Heatmap, drawn: Heatmap, left: float, y: float) -> list[str]:
    notes = []
    if len(drawn.steps) < len(heatmap.steps):
        notes.append(f"{len(drawn.steps)} of {len(heatmap.steps)} commits are drawn")
    if heatmap.has_blanks:
        notes.append("white: no figure, as there was nothing to compare with or to measure it by")
    if heatmap.has_damage:
        notes.append("red: NaN or infinities in the layer")
    return [_text(left, y, ";  ".join(notes))] if notes else []


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", size: int = 0, turned: bool = False
) -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-weight="{weight}"' if weight else ""
    more += f' font-size="{size}"' if size else ""
    more += f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(shown(text))}</text>'
