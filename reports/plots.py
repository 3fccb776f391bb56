"""Plots: as inline SVG with the values of every point as JSON, and as figures of matplotlib."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.results import layer_rank
from reports.styles import DARK, DASHES, LIGHT, PAPER, SCREEN, SHAPES, SINGLE, UNFILLED

LAYER = "LLM layer (0 = projector output)"
WIDTH, HEIGHT = 420, 290
RIGHT, TOP, BOTTOM = 10, 26, 42
LETTER = 7
"""Approximate width of a digit on the axes."""
MOST_TICKS = 6
DIGITS = 6
"""Significant digits of the values of the points."""


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: name in the legend.
        tone: a key of `styles.LIGHT`.
        dash: matplotlib's line style.
        marker: matplotlib's marker; empty for none.
        x: positions.
        value: values.
        low: lower ends of the intervals.
        high: upper ends of the intervals.
        thin: whether to draw it thin, as a control.
    """

    name: str
    tone: str
    dash: str
    marker: str
    x: Sequence[float]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    thin: bool = False


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: title of the plot.
        lines: lines from back to front.
        levels: name, tone, dash and value of horizontal lines.
        ticks: positions and labels on the x axis.
        labels: name of every x position.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        final_band: limits of the band of `final`.
        zero: whether the y axis starts at zero if all values are positive.
    """

    title: str
    lines: Sequence[Line]
    ticks: tuple[Sequence[float], Sequence[str]]
    labels: dict[float, str]
    levels: Sequence[tuple[str, str, str, float]] = ()
    xlabel: str = LAYER
    ylabel: str = ""
    final_band: tuple[float, float] | None = None
    zero: bool = False


def named_plot(title: str, lines: Sequence[tuple[Line, Sequence[str]]], **rest: Any) -> Plot:
    """Plots lines over named, equally spaced positions, such as layers with the tower before them.

    Args:
        title: title of the plot.
        lines: lines with the names of their positions, which replace `x`.
        rest: further fields of `Plot`.
    """
    names = sorted({name for _, positions in lines for name in positions}, key=layer_rank)
    placed = [replace(line, x=[float(names.index(name)) for name in positions]) for line, positions in lines]
    step = max(1, math.ceil(len(names) / 9))
    ticks = [float(index) for index in range(0, len(names), step)]
    return Plot(title, placed, (ticks, names[::step]), {float(i): name for i, name in enumerate(names)}, **rest)


def table_line(
    name: str, style: tuple[str, str, str], rows: pd.DataFrame, x: Sequence[float] = (), thin: bool = False
) -> Line:
    """Makes a line from tone, dash and marker, and the columns value, ci_low and ci_high."""
    value, low, high = (rows[column].tolist() for column in ("value", "ci_low", "ci_high"))
    return Line(name, *style, x, value, low, high, thin)


def nice_ticks(low: float, high: float) -> list[float]:
    """Returns at most `MOST_TICKS` round numbers within a range."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    step = 10 ** math.floor(math.log10(span / MOST_TICKS))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (step * factor) <= MOST_TICKS)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(plot: Plot) -> Markup:
    """Renders a plot as a figure element with SVG and its values."""
    heights = [h for line in plot.lines for part in (line.value, line.low, line.high) for h in part if math.isfinite(h)]
    heights += [level for *_, level in plot.levels]
    low, high = (min(heights), max(heights)) if heights else (0.0, 1.0)
    low = min(low, 0.0) if plot.zero else low
    margin = 0.05 * (high - low) or 0.05 * (abs(high) or 1.0)
    low, high = low - (0.0 if plot.zero and low == 0 else margin), high + margin
    positions = [x for line in plot.lines for x in line.x] + list(plot.ticks[0])
    left, right = min(positions, default=0.0), max([*positions, *(plot.final_band or ())], default=1.0)
    side = 0.02 * (right - left) or 0.5
    grid = nice_ticks(low, high)
    digits = _digits(grid)
    names = [_number(tick, digits) for tick in grid]
    start = 24 + LETTER * max(map(len, names))

    def across(x: float) -> float:
        return start + (x - left + side) / (right - left + 2 * side) * (WIDTH - start - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="2" y="15">{escape(_short(plot.title, 52))}</text>']
    if plot.final_band:
        a, b = map(across, plot.final_band)
        size = f'width="{b - a:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="final-band" x="{a:.1f}" y="{TOP}" {size}/>')
    for tick, text in zip(grid, names, strict=True):
        y = down(tick)
        parts.append(f'<path class="grid" d="M{start} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{start - 6}" y="{y + 4:.1f}">{text}</text>')
    for x, name in zip(*plot.ticks, strict=True):
        parts.append(f'<text class="x" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>')
    parts.append(f'<path class="axis" d="M{start} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (start + WIDTH - RIGHT) / 2
    parts.append(f'<text class="x" x="{middle:.0f}" y="{HEIGHT - 6}">{escape(plot.xlabel)}</text>')
    if plot.ylabel:
        centre = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'transform="translate(11 {centre:.0f})rotate(-90)"'
        parts.append(f'<text class="label" {turned}>{escape(_short(plot.ylabel, 36))}</text>')
    for name, tone, dash, level in plot.levels:
        y = down(level)
        parts.append(
            f'<g data-name="{escape(name)}"><path class="line thin {tone}" {_dash(dash)}'
            f'd="M{start} {y:.1f}H{WIDTH - RIGHT}"/></g>'
        )
    parts += [_drawn(line, across, down, plot.final_band) for line in plot.lines]
    parts.append(f'<path class="guide" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>')
    numbers = _quoted(json.dumps(_numbers(plot, across), ensure_ascii=False, separators=(",", ":")))
    label = escape(_described(plot))
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    # All text was escaped above.
    return Markup(f"<figure class=\"plot\" data-plot='{numbers}'>{opening}{''.join(parts)}</svg></figure>")


def _quoted(text: str) -> str:
    """Escapes JSON for an attribute in single quotes, since JSON contains double quotes."""
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;")):
        text = text.replace(sign, name)
    return text


def draw(axes: Axes, plot: Plot) -> None:
    """Draws a plot with matplotlib; points in the band of `final` are not joined to the others."""
    full = mpl.rcParams["lines.linewidth"]
    for name, tone, dash, level in plot.levels:
        axes.axhline(level, label=name, color=LIGHT[tone], linestyle=dash, linewidth=0.55 * full)
    if plot.final_band:
        axes.axvspan(*plot.final_band, color="#f4f4f4", zorder=0)
    start = plot.final_band[0] if plot.final_band else math.inf
    for line in plot.lines:
        colour = LIGHT[line.tone]
        width = 0.72 * full if line.thin else full
        style = {"color": colour, "linestyle": line.dash, "marker": line.marker or None, "linewidth": width}
        points = np.array([line.x, line.value, line.low, line.high])
        for x, value, low, high in (points[:, points[0] < start], points[:, points[0] >= start]):
            if len(x):
                axes.plot(x, value, markevery=max(len(x) // 16, 1), label=line.name, **style)
            if len(x) == 1:
                error = np.array([value - low, high - value]).clip(min=0)
                axes.errorbar(x, value, yerr=error, fmt="none", ecolor=colour, capsize=2, linewidth=0.55 * full)
            else:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_title(plot.title, loc="left")
    axes.set_xticks(*plot.ticks)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    if plot.zero:
        axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.0))


def draw_legend(figure: Figure) -> None:
    """Draws the legend of all panels below them, front lines first, in as many columns as fit."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*(reversed(part) for part in axes.get_legend_handles_labels()), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        letters = figure.get_figwidth() * 72 / (0.58 * mpl.rcParams["font.size"])
        columns = max(1, min(len(handles), 4, int(letters / (max(map(len, handles)) + 6))))
        figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=columns, frameon=False)


def figure(plot: Plot, paper: bool = False) -> Figure:
    """Draws one plot with matplotlib; for a paper one column wide."""
    with mpl.rc_context(PAPER if paper else SCREEN):
        size = (SINGLE, 2.0 + 0.07 * len([*plot.lines, *plot.levels])) if paper else (4.2, 3.0)
        drawn = Figure(figsize=size, layout="constrained")
        draw(drawn.subplots(), plot)
        draw_legend(drawn)
    return drawn


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _digits(ticks: Sequence[float]) -> int:
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    return max(0, min(6, next(d for d in range(12) if abs(step * 10**d - round(step * 10**d)) < 1e-6 or d == 11)))


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def _dash(dash: str) -> str:
    return f'stroke-dasharray="{DASHES[dash]}" ' if DASHES[dash] else ""


def _drawn(line: Line, across: Any, down: Any, band: tuple[float, float] | None) -> str:
    """Draws band, line and markers; points in the band of `final` are not joined to the others."""
    points = [p for p in zip(line.x, line.value, line.low, line.high, strict=True) if math.isfinite(p[1])]
    inside = [p for p in points if band and p[0] >= band[0]]
    rest = [p for p in points if p not in inside]
    shape = []
    kind = f"line thin {line.tone}" if line.thin else f"line {line.tone}"
    for group in (rest, inside):
        at = [(across(x), down(v), down(low), down(high)) for x, v, low, high in group]
        banded = [p for p in at if math.isfinite(p[2]) and math.isfinite(p[3])]
        if len(banded) > 1:
            upper = "L".join(f"{x:.1f} {h:.1f}" for x, _, _, h in banded)
            lower = "L".join(f"{x:.1f} {low:.1f}" for x, _, low, _ in reversed(banded))
            shape.append(f'<path class="band {line.tone}" d="M{upper}L{lower}Z"/>')
        elif banded:
            x, _, low, high = banded[0]
            shape.append(f'<path class="line thin {line.tone}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        if at:
            course = "L".join(f"{x:.1f} {v:.1f}" for x, v, *_ in at)
            mark = 'marker-start="{0}" marker-mid="{0}" marker-end="{0}" '
            mark = mark.format(f"url(#{marker_id(line.tone, line.marker)})") if line.marker else ""
            course += f"L{course}" if len(at) == 1 else ""  # a marker needs a line
            shape.append(f'<path class="{kind}" {_dash(line.dash)}{mark}d="M{course}"/>')
    return f'<g data-name="{escape(line.name)}">{"".join(shape)}</g>'


def marker_id(tone: str, sign: str) -> str:
    """Returns the identifier of a marker in the page."""
    return f"mark-{tone}-{[*SHAPES].index(sign)}" if sign else ""


def legend_of(plots: Sequence[Plot]) -> list[dict[str, Any]]:
    """Returns the legend entries of the unique lines of plots."""
    lines = {line.name: line for plot in plots for line in reversed(plot.lines)}
    return [
        legend_entry(x.name, x.tone, x.dash, x.marker, x.thin) for x in sorted(lines.values(), key=lambda x: x.thin)
    ]


def legend_entry(name: str, tone: str, dash: str, marker: str, thin: bool) -> dict[str, Any]:
    """Returns one legend entry of the page."""
    return {"label": name, "tone": tone, "dash": DASHES[dash], "marker": marker_id(tone, marker), "thin": thin}


def marker_definitions(used: Sequence[tuple[str, str]]) -> Markup:
    """Defines the SVG markers of the page, by tone and matplotlib's name."""
    return Markup("").join(
        Markup(
            f'<marker id="{marker_id(tone, sign)}" viewBox="-5 -5 10 10" markerWidth="10" markerHeight="10" '
            f'markerUnits="userSpaceOnUse"><path class="{"open" if sign in UNFILLED else "full"} {tone}" '
            f'd="{SHAPES[sign]}"/></marker>'
        )
        for tone, sign in dict.fromkeys(used)
        if sign
    )


def tones() -> Markup:
    """Defines the CSS classes of the tones, with their colours in the light and dark themes."""
    light, dark = (";".join(f"--{k}:{v}" for k, v in tones.items()) for tones in (LIGHT, DARK))
    classes = "".join(f".{name}{{--c:var(--{name})}}" for name in LIGHT)
    return Markup(
        f":root{{{light}}}@media screen{{:root[data-theme=dark]{{{dark}}}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}{classes}"
    )


def _numbers(plot: Plot, across: Any) -> dict[str, Any]:
    positions = sorted(plot.labels)

    def column(line: Line, values: Sequence[float]) -> list[float | None]:
        by_position = dict(zip(line.x, values, strict=True))
        return [_rounded(by_position.get(position)) for position in positions]

    lines = [
        {"name": line.name, "tone": line.tone}
        | {key: column(line, getattr(line, key)) for key in ("value", "low", "high")}
        for line in reversed(plot.lines)
    ]
    return {
        "title": plot.title,
        "x": [round(across(position), 1) for position in positions],
        "labels": [plot.labels[position] for position in positions],
        "axis": plot.xlabel,
        "lines": lines,
        "levels": [{"name": name, "tone": tone, "value": _rounded(level)} for name, tone, _, level in plot.levels],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _described(plot: Plot) -> str:
    """Describes a plot for screen readers: every line's ends and extremes."""
    sentences = [f"{plot.title}." if plot.title else ""]
    for line in [x for x in reversed(plot.lines) if not x.thin] or plot.lines:
        points = [(plot.labels.get(x, ""), v) for x, v in zip(line.x, line.value, strict=True) if math.isfinite(v)]
        if points:
            lowest, highest = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
            sentences.append(
                f"{line.name}: from {points[0][1]:.3f} at {points[0][0]} to {points[-1][1]:.3f} at {points[-1][0]}, "
                f"lowest {lowest[1]:.3f} at {lowest[0]}, highest {highest[1]:.3f} at {highest[0]}."
            )
    return " ".join(sentences)
