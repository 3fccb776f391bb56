"""Layerwise curves, after Fig. 3 of OLA-VLM: one panel per teacher, one line per checkpoint, controls dashed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.frechet import is_distance
from reports.results import AVERAGE, FINAL, RunResults, in_order, layer_rank, metric_label, teacher_title

# Okabe & Ito's palette, darker ones first: told apart by colour-blind readers, and by lightness in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHOWN = {"blank": ("shown grey", "_"), "other": ("shown another image", "+"), "caption": ("told the caption", "*")}
"""What the checkpoint was given in place of the image: name and marker."""
PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a checkpoint may be called $x^2$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "mllm-probing",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Series:
    """How one line looks and where it comes from."""

    label: str
    run: RunResults
    control: str
    colour: str
    dash: str
    marker: str


def series(runs: Sequence[RunResults]) -> list[Series]:
    """The lines of every panel, checkpoints first; the same checkpoint has the same colour everywhere."""
    lines = [
        Series(run.label, run, "no", COLOURS[i % len(COLOURS)], "-", MARKERS[i % len(MARKERS)])
        for i, run in enumerate(runs)
    ]
    for i, run in enumerate(runs):
        ran = set(run.results["control"])
        suffix = f", {run.label}" if len(runs) > 1 else ""
        if "random" in ran:
            colour = "#333333" if len(runs) == 1 else COLOURS[i % len(COLOURS)]
            lines.append(Series(f"random weights{suffix}", run, "random", colour, "--", "x"))
        if "shuffled" in ran:
            lines.append(Series(f"shuffled pairs{suffix}", run, "shuffled", "#8a8a8a", ":", ""))
        for control, (name, marker) in SHOWN.items():
            if control in ran:
                colour = "#6a3d9a" if len(runs) == 1 else COLOURS[i % len(COLOURS)]
                lines.append(Series(f"{name}{suffix}", run, control, colour, ":", marker))
    return lines


MEAN_LABEL = "mean target"
MEAN_STYLE: dict[str, Any] = {"color": "#8a8a8a", "linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.2}
OWN_LABEL = "teacher's own feature"
OWN_STYLE: dict[str, Any] = {"color": "#333333", "linestyle": "-", "linewidth": 0.8}


def draw_panel(
    axes: Axes, lines: Sequence[Series], teacher: str, probe: str, metric: str, protocol: str, ylabel: bool = True
) -> None:
    """Draws one teacher's curves; a layer's x is its number, `final` stands apart on the right."""
    deepest = max(line.run.depth for line in lines)
    final_at = deepest + max(1.0, 0.06 * deepest)
    has_final = False
    for line in lines:
        curve = line.run.curve(teacher, probe, line.control, metric, protocol)
        if curve.empty:
            continue
        width = 1.8 if line.control == "no" else 1.3
        style: dict[str, Any] = {
            "color": line.colour,
            "linestyle": line.dash,
            "linewidth": width,
            "marker": line.marker or None,
        }
        for part in (curve[curve["layer"] != FINAL], curve[curve["layer"] == FINAL]):
            if part.empty:
                continue
            at_final = part["layer"].iloc[0] == FINAL
            has_final |= at_final
            x = np.full(len(part), final_at) if at_final else part["layer"].astype(float).to_numpy()
            low, high = part["ci_low"].to_numpy(), part["ci_high"].to_numpy()
            axes.plot(x, part["value"], markersize=4, markevery=max(len(x) // 16, 1), label=line.label, **style)
            if at_final or len(part) == 1:
                error = [part["value"] - low, high - part["value"]]
                axes.errorbar(x, part["value"], yerr=error, fmt="none", ecolor=line.colour, capsize=2, linewidth=1)
            else:
                axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)
    mean = lines[0].run.mean_target(teacher, metric, protocol)
    if mean is not None:
        axes.axhline(mean, label=MEAN_LABEL, **MEAN_STYLE)
    own = lines[0].run.own_feature(teacher, metric, protocol)
    if own is not None:
        axes.axhline(own, label=OWN_LABEL, **OWN_STYLE)
    step = max(1, int(np.ceil(deepest / 8)))
    ticks: list[float] = list(range(0, deepest + 1, step))
    labels = [str(tick) for tick in ticks]
    if has_final:
        if deepest - ticks[-1] < step / 2 and ticks[-1] != deepest:
            ticks, labels = ticks[:-1], labels[:-1]
        ticks, labels = [*ticks, final_at], [*labels, FINAL]
        axes.axvspan(deepest + (final_at - deepest) / 2, final_at + (final_at - deepest) / 2, color="#f4f4f4", zorder=0)
    axes.set_xticks(ticks, labels)
    axes.set_title(teacher_title(teacher), fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("LLM layer (0 = projector output)")
    if ylabel:
        axes.set_ylabel(metric_label(metric, protocol) + (", less is better" if is_distance(metric) else ""))


def legend_handles(lines: Sequence[Series], own: bool = False) -> list[Line2D]:
    """One entry per line, the mean target, and where a metric decodes the teacher's own feature."""
    handles = [
        Line2D([], [], color=x.colour, linestyle=x.dash, marker=x.marker or None, markersize=4, label=x.label)
        for x in lines
    ]
    handles.append(Line2D([], [], label=MEAN_LABEL, **MEAN_STYLE))
    return [*handles, Line2D([], [], label=OWN_LABEL, **OWN_STYLE)] if own else handles


def layer_figure(runs: Sequence[RunResults], metric: str, protocol: str) -> Figure:
    """The whole figure: a column per teacher, a row per kind of probe, one legend below."""
    lines = series(runs)
    teachers = runs[0].teachers_of(metric, protocol)
    own = any(runs[0].own_feature(teacher, metric, protocol) is not None for teacher in teachers)
    probes = [p for p in PROBES if any((run.results["probe"] == p).any() for run in runs)]
    with mpl.rc_context(STYLE):
        rows, columns = (len(probes), len(teachers)) if len(teachers) > 1 else (1, len(probes))
        figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey="col" if len(teachers) > 1 else "row")
        panels = [(probe, teacher) for probe in probes for teacher in teachers]
        for index, (axes, (probe, teacher)) in enumerate(zip(grid.flat, panels, strict=True)):
            draw_panel(axes, lines, teacher, probe, metric, protocol, ylabel=index % columns == 0)
            axes.set_title(f"{teacher_title(teacher)}, {PROBES[probe]}", fontsize=10, loc="left")
        handles = legend_handles(lines, own)
        wide = 4 if columns > 2 else 3
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), wide), frameon=False)
    return figure


def panel_figure(runs: Sequence[RunResults], teacher: str, probe: str, metric: str, protocol: str) -> Figure:
    """One panel alone, for the page, where panels stack on a narrow screen."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        draw_panel(figure.subplots(), series(runs), teacher, probe, metric, protocol)
    return figure


def difference_figure(differences: pd.DataFrame, metric: str, protocol: str) -> Figure:
    """Paired differences from the reference by layer: a column per teacher, a row per probe, a line per checkpoint."""
    d = differences
    chosen = d[(d["metric"] == metric) & (d["protocol"] == protocol) & (d["layer"] != AVERAGE)]
    teachers = in_order(chosen["teacher"])
    probes = [p for p in PROBES if p in set(chosen["probe"])]
    names = list(dict.fromkeys(d["checkpoint"]))
    with mpl.rc_context(STYLE):
        rows, columns = (len(probes), len(teachers)) if len(teachers) > 1 else (1, len(probes))
        figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        panels = [(probe, teacher) for probe in probes for teacher in teachers]
        for axes, (probe, teacher) in zip(grid.flat, panels, strict=True):
            axes.axhline(0, color="#333333", linewidth=0.8)
            for index, name in enumerate(names, start=1):  # the reference has the first colour everywhere
                own = (chosen["teacher"] == teacher) & (chosen["probe"] == probe) & (chosen["checkpoint"] == name)
                part = chosen[own]
                part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
                colour = COLOURS[index % len(COLOURS)]
                x = np.arange(len(part))
                axes.plot(
                    x, part["value"], color=colour, marker=MARKERS[index % len(MARKERS)], markersize=4, label=name
                )
                axes.fill_between(x, part["ci_low"], part["ci_high"], color=colour, alpha=0.18, linewidth=0)
                step = max(1, int(np.ceil(len(part) / 9)))
                axes.set_xticks(x[::step], part["layer"].iloc[::step])
            axes.set_title(f"{teacher_title(teacher)}, {PROBES[probe]}", fontsize=10, loc="left")
            axes.set_xlabel("LLM layer")
        for row in grid:
            less = ",\nless is better" if is_distance(metric) else ""
            row[0].set_ylabel(f"difference from {d['reference'].iloc[0]}{less}")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def learning_figure(run: RunResults) -> Figure:
    """Training loss of every layer's probe, smoothed over a fortieth of the steps."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(run.teachers), 2.8), layout="constrained")
        row = figure.subplots(1, len(run.teachers), squeeze=False)[0]
        colours = mpl.colormaps["viridis"]
        for axes, teacher in zip(row, run.teachers, strict=True):
            chosen = run.curves[(run.curves["control"] == "no") & (run.curves["teacher"] == teacher)]
            for (layer, _), curve in chosen.groupby(["layer", "seed"]):
                place = 1.0 if layer == FINAL else float(layer) / max(run.depth, 1)
                ordered = curve.sort_values("step")
                window = max(len(ordered) // 40, 1)
                smooth = ordered["loss"].rolling(window, center=True, min_periods=1).mean()
                thin = max(window, len(ordered) // 200)  # more points than that cannot be seen, and weigh in the page
                axes.plot(ordered["step"][::thin], smooth[::thin], color=colours(0.92 * place), linewidth=1)
            axes.set_title(teacher_title(teacher), fontsize=10, loc="left", fontweight="bold")
            axes.set_xlabel("optimiser step")
        row[0].set_ylabel("training loss (smooth L1)")
        norm = mpl.colors.Normalize(0, run.depth / 0.92)
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, colours), ax=row, pad=0.01, boundaries=np.linspace(0, run.depth, 64)
        )
        bar.set_label("layer")
        bar.set_ticks([0, run.depth // 2, run.depth])
    return figure
