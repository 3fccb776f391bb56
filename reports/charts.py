"""Layerwise curves (OLA-VLM, Fig. 3): a panel per teacher, a line per checkpoint, controls dashed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.evaluation.registry import describe
from reports.plots import Plot, draw, draw_legend, named_plot, table_line
from reports.results import AVERAGE, FINAL, RunResults, layer_rank, metric_label, sort_teachers, teacher_title
from reports.styles import DOUBLE, PAPER, SCREEN, marker, tone

INPUT_CONTROLS = {
    "blank": ("shown grey", "_"),
    "other": ("shown another image", "+"),
    "caption": ("given the caption", "*"),
}
"""Controls that replace the checkpoint's input image: name and marker."""
PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}


@dataclass(frozen=True)
class Series:
    """Data and style of one line; `tone` is a key of `styles.LIGHT`."""

    label: str
    run: RunResults
    control: str
    tone: str
    dash: str
    marker: str


def series(runs: Sequence[RunResults]) -> list[Series]:
    """Returns the lines of a panel, checkpoints first; a checkpoint has the same colour in every panel."""
    lines = [Series(run.label, run, "none", tone(run.style_index), "-", marker(run.style_index)) for run in runs]
    single = len(runs) == 1
    for run in runs:
        controls = set(run.results["control"])
        suffix = "" if single else f", {run.label}"
        if "random" in controls:
            colour = "ink" if single else tone(run.style_index)
            lines.append(Series(f"random weights{suffix}", run, "random", colour, "--", "x"))
        if "shuffled" in controls:
            lines.append(Series(f"shuffled pairs{suffix}", run, "shuffled", "grey", ":", ""))
        for control, (name, sign) in INPUT_CONTROLS.items():
            if control in controls:
                colour = "violet" if single else tone(run.style_index)
                lines.append(Series(f"{name}{suffix}", run, control, colour, ":", sign))
    return lines


MEAN_LABEL = "mean target"
CEILING_LABEL = "teacher's feature"


def panel_title(teacher: str, probe: str) -> str:
    """Returns teacher and probe."""
    return f"{teacher_title(teacher)}, {PROBES[probe]}"


def final_position(deepest: int) -> float:
    """Returns the x position of `final`, to the right of the layers."""
    return deepest + max(1.0, 0.13 * deepest)


def layer_ticks(deepest: int, final: bool) -> tuple[list[float], list[str]]:
    """Returns positions and labels of at most ten layer ticks, and of `final`."""
    step = max(1, int(np.ceil(deepest / 8)))
    ticks: list[float] = list(range(0, deepest + 1, step))
    labels = [str(tick) for tick in ticks]
    if final:
        if deepest - ticks[-1] < step / 2 and ticks[-1] != deepest:
            ticks, labels = ticks[:-1], labels[:-1]
        ticks, labels = [*ticks, final_position(deepest)], [*labels, FINAL]
    return ticks, labels


def levels(runs: Sequence[RunResults], teacher: str, metric: str, protocol: str) -> tuple[float | None, float | None]:
    """Returns the scores of the mean target and of the teacher's feature, from the first run that has them."""
    means = (run.mean_target_score(teacher, metric, protocol) for run in runs)
    ceiling = (run.teacher_score(teacher, metric, protocol) for run in runs)
    return next((x for x in means if x is not None), None), next((x for x in ceiling if x is not None), None)


def teachers_of(runs: Sequence[RunResults], metric: str, protocol: str) -> list[str]:
    """Returns the teachers for which any of the runs has a metric."""
    return list(dict.fromkeys(teacher for run in runs for teacher in run.teachers_of(metric, protocol)))


def layer_plot(lines: Sequence[Series], teacher: str, probe: str, metric: str, protocol: str) -> Plot:
    """Plots the curves of one teacher and kind of probe."""
    deepest = max(line.run.depth for line in lines)
    final = final_position(deepest)
    drawn = []
    labels: dict[float, str] = {}
    for line in lines:
        curve = line.run.curve(teacher, probe, line.control, metric, protocol)
        if curve.empty:
            continue
        x = [final if layer == FINAL else float(layer) for layer in curve["layer"]]
        labels |= dict(zip(x, curve["layer"], strict=True))
        drawn.append(table_line(line.label, (line.tone, line.dash, line.marker), curve, x, line.control != "none"))
    mean, ceiling = levels([line.run for line in lines], teacher, metric, protocol)
    references = [] if mean is None else [(MEAN_LABEL, "grey", "-.", mean)]
    references += [] if ceiling is None else [(CEILING_LABEL, "ink", "-", ceiling)]
    half = (final - deepest) / 2
    return Plot(
        panel_title(teacher, probe),
        drawn[::-1],
        layer_ticks(deepest, final in labels),
        labels,
        references,
        ylabel=metric_label(metric, protocol) + _direction(metric),
        final_band=(final - half, final + half) if final in labels else None,
    )


def _direction(metric: str) -> str:
    return "" if describe(metric).higher_is_better else ", lower is better"


def _draw_panels(rows: Sequence[Sequence[Plot]], paper: bool) -> Figure:
    """Draws a row of plots per kind of probe above one legend; for a paper two columns wide."""
    sharey: Literal["row", "col"] = "col"
    if len(rows[0]) == 1:  # one teacher: both probes next to each other
        rows, sharey = [[plot for row in rows for plot in row]], "row"
    with mpl.rc_context(PAPER if paper else SCREEN):
        n, columns, plots = len(rows), len(rows[0]), [plot for row in rows for plot in row]
        names = {name for plot in plots for name in [line.name for line in plot.lines] + [x[0] for x in plot.levels]}
        size = (DOUBLE, 1.75 * n + 0.35 + 0.13 * len(names) / columns) if paper else (3.4 * columns, 2.7 * n + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(n, columns, squeeze=False, sharey=sharey)
        for axes, plot in zip(grid.flat, plots, strict=True):
            draw(axes, plot)
        for axes in grid[:, 1:].flat:
            axes.set_ylabel("")
        draw_legend(figure)
    return figure


def layer_figure(runs: Sequence[RunResults], metric: str, protocol: str, paper: bool = False) -> Figure:
    """Draws a metric by layer: a column per teacher, a row per kind of probe."""
    lines, teachers = series(runs), teachers_of(runs, metric, protocol)
    plots = [[layer_plot(lines, t, probe, metric, protocol) for t in teachers] for probe in shown_probes(runs)]
    return _draw_panels(plots, paper)


def shown_probes(runs: Sequence[RunResults]) -> list[str]:
    """Returns the kinds of probe in the runs."""
    return [p for p in PROBES if any((run.results["probe"] == p).any() for run in runs)]


def difference_plots(
    differences: pd.DataFrame, metric: str, protocol: str, style_indices: Mapping[str, int]
) -> list[list[Plot]]:
    """Plots paired differences by layer: a row per kind of probe, a plot per teacher, a line per checkpoint.

    Args:
        differences: paired differences from one reference.
        metric: metric in `differences`.
        protocol: protocol in `differences`.
        style_indices: by checkpoint.
    """
    d = differences
    chosen = d[(d["metric"] == metric) & (d["protocol"] == protocol) & (d["layer"] != AVERAGE)]

    def plot(probe: str, teacher: str) -> Plot:
        rows, lines = chosen[(chosen["teacher"] == teacher) & (chosen["probe"] == probe)], []
        for checkpoint, part in rows.groupby("checkpoint", sort=False):
            part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
            index = style_indices[checkpoint]
            lines.append((table_line(checkpoint, (tone(index), "-", marker(index)), part), list(part["layer"])))
        zero, ylabel = [("no difference", "ink", "-", 0.0)], f"difference from {chosen['reference'].iloc[0]}"
        return named_plot(panel_title(teacher, probe), lines[::-1], levels=zero, ylabel=ylabel)

    teachers = sort_teachers(chosen["teacher"])
    return [[plot(probe, teacher) for teacher in teachers] for probe in PROBES if probe in set(chosen["probe"])]


def difference_figure(
    differences: pd.DataFrame, metric: str, protocol: str, style_indices: Mapping[str, int], paper: bool = False
) -> Figure:
    """Draws `difference_plots`; for a paper two columns wide."""
    direction = _direction(metric).replace(" ", "\n", 1)
    rows = difference_plots(differences, metric, protocol, style_indices)
    return _draw_panels([[replace(plot, ylabel=f"{plot.ylabel}{direction}") for plot in row] for row in rows], paper)


def learning_figure(run: RunResults) -> Figure:
    """Draws the training loss of every layer's probe, smoothed over a fortieth of the steps."""
    with mpl.rc_context(SCREEN | {"lines.linewidth": 1}):
        figure = Figure(figsize=(3.4 * len(run.teachers), 2.8), layout="constrained")
        row = figure.subplots(1, len(run.teachers), squeeze=False)[0]
        colours = mpl.colormaps["viridis"]
        for axes, teacher in zip(row, run.teachers, strict=True):
            chosen = run.curves[(run.curves["control"] == "none") & (run.curves["teacher"] == teacher)]
            for (layer, _), curve in chosen.groupby(["layer", "seed"]):
                relative_depth = 1.0 if layer == FINAL else float(layer) / max(run.depth, 1)
                ordered = curve.sort_values("step")
                window = max(len(ordered) // 40, 1)
                smooth = ordered["loss"].rolling(window, center=True, min_periods=1).mean()
                thin = max(window, len(ordered) // 200)  # more points are invisible and enlarge the page
                axes.plot(ordered["step"][::thin], smooth[::thin], color=colours(0.92 * relative_depth))
            axes.set_title(teacher_title(teacher), loc="left", fontweight="bold")
            axes.set_xlabel("optimiser step")
        row[0].set_ylabel("training loss (smooth L1)")
        norm = mpl.colors.Normalize(0, run.depth / 0.92)
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, colours), ax=row, pad=0.01, boundaries=np.linspace(0, run.depth, 64)
        )
        bar.set_label("layer")
        bar.set_ticks([0, run.depth // 2, run.depth])
    return figure
