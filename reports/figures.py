"""Figures by seaborn, for Python and as files: curves over the layers, heat maps, losses."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from probing.utils.errors import UserError
from probing.utils.files import atomic_file
from reports.curves import (
    DENSE,
    LAYER,
    PROBES,
    compared_metrics,
    difference_frame,
    differences_from,
    direction,
    layer_frame,
    layer_ticks,
    panel_title,
    references,
)
from reports.results import FINAL, MEASURE, RunResults, layer_rank, metric_label, sign, sort_teachers, teacher_title
from reports.theme import CEILING, DOUBLE, REFERENCES, SINGLE, dash, palette, style

Style = Literal["screen", "paper"]
"""`screen`: PNG, SVG and PDF. `paper`: SVG and PDF, 3.25 or 6.75 inches wide, font size 7."""


def line_plot(
    frame: pd.DataFrame,
    ylabel: str = "",
    colours: Mapping[str, str] | None = None,
    paper: bool = False,
    xlabel: str = LAYER,
    zero: bool = False,
) -> Figure:
    """Draws lines with confidence bands: a panel per value of the column `panel`, at most three in a row.

    Args:
        frame: rows of `reports.curves`; without `panel`, a column of panels per teacher and a row per probe.
        ylabel: label of the vertical axes.
        colours: by checkpoint; by default in the order of the frame.
        paper: whether to use the sizes of a paper.
        xlabel: label of the horizontal axes.
        zero: whether to draw a line at zero.
    """
    checkpoints, controls = (list(dict.fromkeys(frame[name])) for name in ("checkpoint", "control"))
    colours = colours or palette([name for name in checkpoints if name not in REFERENCES])
    if "panel" not in frame:
        titles = [panel_title(*pair) for pair in zip(frame["teacher"], frame["probe"], strict=True)]
        frame = frame.assign(panel=titles)
        columns = frame["teacher"].nunique()
        order = [panel_title(t, p) for p in PROBES for t in sort_teachers(frame["teacher"])]
    else:
        columns, order = 3, list(dict.fromkeys(frame["panel"]))
    panels = [name for name in order if name in set(frame["panel"])]
    columns = min(columns if columns > 1 else 2, len(panels))
    ticks = layer_ticks(frame)
    frame, dot = frame.assign(segment=frame["layer"] == FINAL), "o" if frame["x"].max() <= DENSE else ""
    with mpl.rc_context(style(paper)):
        grid = sns.relplot(
            frame, x="x", y="value", kind="line", errorbar=None, estimator=None, units="segment", legend=False,
            hue="checkpoint", hue_order=checkpoints, palette={name: colours[name] for name in checkpoints},
            style="control", style_order=controls, dashes={name: dash(name) or "" for name in controls},
            col="panel", col_order=panels, col_wrap=columns, facet_kws={"sharey": False},
            marker=dot, markeredgewidth=0,
        )  # fmt: skip
        plt.close(grid.figure)  # it belongs to the caller, not to pyplot
        for panel, axes in grid.axes_dict.items():
            _draw_bands(axes, frame[frame["panel"] == panel], colours)
            axes.set_title(panel)
            if zero:
                axes.axhline(0, color="#333333", linewidth=0.8, zorder=1)
        positions, labels = zip(*ticks, strict=True)
        grid.set(xticks=positions)
        grid.set_xticklabels(labels)
        grid.set_axis_labels(xlabel, ylabel)
        handles = [Line2D([], [], color=colours[name], marker=dot, label=name) for name in checkpoints]
        if len(controls) > 1:
            ink = REFERENCES[CEILING][0]
            handles += [Line2D([], [], color=ink, dashes=dash(name) or (None, None), label=name) for name in controls]
        arrange(grid.figure, handles, (-(-len(panels) // columns), columns), paper)
    return grid.figure


def _draw_bands(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Draws the intervals of `results.csv`, which seaborn would compute from samples."""
    rows = rows.dropna(subset=["ci_low", "ci_high"])
    for (checkpoint, _, _), line in rows.groupby(["checkpoint", "control", "segment"], sort=False):
        x, low, high = (line[name] for name in ("x", "ci_low", "ci_high"))
        if len(line) == 1:  # a band needs two points
            axes.vlines(x, low, high, color=colours[checkpoint], linewidth=0.8)
            axes.scatter(x, line["value"], s=mpl.rcParams["lines.markersize"] ** 2, color=colours[checkpoint])
        else:
            axes.fill_between(x, low, high, color=colours[checkpoint], alpha=0.15, linewidth=0)


def arrange(figure: Figure, handles: Sequence[Line2D], shape: tuple[int, int], paper: bool) -> None:
    """Sets the size of a grid of panels, with one legend below them."""
    rows, columns = shape
    width = (SINGLE if columns == 1 else DOUBLE) if paper else 3.4 * columns
    letters = width * 72 / (0.55 * mpl.rcParams["font.size"])
    ncols = max(1, min(len(handles), int(letters / (max(len(str(x.get_label())) for x in handles) + 8))))
    figure.set_layout_engine("constrained")
    figure.set_size_inches(width, (1.7 if paper else 2.6) * rows + 0.2 * -(-len(handles) // ncols) + 0.1)
    if len(handles) > 1:
        figure.legend(handles=[*handles], loc="outside lower center", ncols=ncols, frameon=False)


def layer_plot(
    runs: Sequence[RunResults],
    metric: str,
    protocol: str = "strict",
    colours: Mapping[str, str] | None = None,
    paper: bool = False,
) -> Figure:
    """Draws a metric by layer: a panel per teacher and probe, colours for checkpoints, dashes for controls.

    Raises:
        UserError: no run has the metric.
    """
    frame = layer_frame(runs, metric, protocol)
    if frame.empty:
        raise UserError(f"no run has the metric {metric} ({protocol}); run: probing evaluate RUN --metric {metric}")
    return line_plot(frame, metric_label(metric, protocol) + direction(metric), colours, paper)


def heat_map(run: RunResults, probe: str = "ridge", paper: bool = False) -> Figure:
    """Draws layers × metrics for one probe: each row is scaled from its worst layer to its best."""
    rows: dict[str, pd.Series] = {}
    for metric, protocol in run.measures:
        for teacher in run.teachers_of(metric, protocol):
            curve = run.curve(teacher, probe, "none", metric, protocol).set_index("layer")["value"]
            if len(curve) > 1:
                rows[f"{teacher_title(teacher)}: {metric_label(metric, protocol)}"] = curve * sign(metric)
    table = pd.DataFrame(rows).T
    table = table[sorted(table.columns, key=layer_rank)]
    span = (table.max(axis=1) - table.min(axis=1)).replace(0, 1)
    with mpl.rc_context(style(paper)):
        figure = Figure(
            figsize=(DOUBLE, 0.2 * len(table) + 0.9) if paper else (9, 0.3 * len(table) + 1.2), layout="constrained"
        )
        axes = figure.subplots()
        scaled = table.sub(table.min(axis=1), axis=0).div(span, axis=0)
        bar = {"label": "from the worst to the best layer", "ticks": [0, 1]}
        sns.heatmap(scaled, ax=axes, cmap="cividis", vmin=0, vmax=1, linewidths=0.5, cbar_kws=bar)
        axes.set(xlabel=LAYER, title=f"{run.label}, {PROBES[probe]}")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(visible=False)
    return figure


def learning_plot(run: RunResults) -> Figure:
    """Draws the training loss of every layer's probe, smoothed over a fortieth of the steps."""
    parts = []
    curves = run.curves[run.curves["control"] == "none"]
    for (teacher, layer, seed), curve in curves.groupby(["teacher", "layer", "seed"]):
        ordered = curve.sort_values("step")
        window = max(len(ordered) // 40, 1)
        smooth = ordered["loss"].rolling(window, center=True, min_periods=1).mean()
        thin = max(window, len(ordered) // 200)  # more points are invisible
        depth = run.depth + 1 if layer == FINAL else int(layer)
        rows = {
            "step": ordered["step"],
            "loss": smooth,
            "teacher": teacher_title(teacher),
            "layer": depth,
            "seed": seed,
        }
        parts.append(pd.DataFrame(rows).iloc[::thin])
    frame = pd.concat(parts)
    titles = [teacher_title(name) for name in sort_teachers(curves["teacher"])]
    with mpl.rc_context(style() | {"lines.linewidth": 1}):
        grid = sns.relplot(
            frame, x="step", y="loss", hue="layer", palette="viridis", units="seed", estimator=None, kind="line",
            col="teacher", col_order=titles, height=2.8, aspect=1.2, facet_kws={"sharey": False},
        )  # fmt: skip
        plt.close(grid.figure)
        grid.set_titles("{col_name}", loc="left")
        grid.set_axis_labels("optimiser step", "training loss (smooth L1)")
    return grid.figure


def slug(text: str) -> str:
    """Makes a safe file name: names from tables must not act as paths."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def save_figure(figure: Figure, folder: Path, name: str, kind: Style) -> None:
    """Writes a figure into `figures/`; PDF with embedded fonts, SVG with text as paths."""
    formats: dict[str, dict[str, Any]] = {
        "svg": {"metadata": {"Date": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    if kind == "screen":
        formats["png"] = {"dpi": 160}
    with mpl.rc_context(style(kind == "paper")):  # the font type is read while saving
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keep the layout for all formats
        for suffix, options in formats.items():
            with atomic_file(folder / "figures" / f"{slug(name)}.{suffix}") as file:
                figure.savefig(file, format=suffix, **options)


def png_data_uri(figure: Figure, dpi: int = 110) -> str:
    """Encodes a figure as a PNG data URI with an adaptive palette of 256 colours: a third of the size."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=dpi)
    with Image.open(full) as image:
        image.convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def runs_with_metric(runs: Sequence[RunResults], metric: str, protocol: str) -> list[RunResults]:
    """Returns the runs that have a metric."""
    return [run for run in runs if (metric, protocol) in run.measures]


def write_curves(runs: Sequence[RunResults], out: Path, kind: Style, colours: Mapping[str, str]) -> None:
    """Writes the curves of every metric and a heat map of each run; for a paper also every panel, one column wide."""
    paper = kind == "paper"
    for metric, protocol in dict.fromkeys(measure for run in runs for measure in run.measures):
        frame, stem = layer_frame(runs, metric, protocol), f"layers_{metric}_{protocol}"
        if frame.empty:
            continue
        ylabel = metric_label(metric, protocol) + direction(metric)
        save_figure(line_plot(frame, ylabel, colours, paper), out, stem, kind)
        for (teacher, probe), panel in frame.groupby(["teacher", "probe"]) if paper else ():
            save_figure(line_plot(panel, ylabel, colours, paper), out, f"{stem}_{teacher}_{probe}", kind)
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{run.label}"
        for probe in PROBES:
            if sum(len(run.curve(t, probe, "none", *m)) > 1 for m in run.measures for t in run.teachers_of(*m)):
                save_figure(heat_map(run, probe, paper), out, f"heatmap_{probe}{suffix}", kind)


def write_differences(differences: pd.DataFrame, out: Path, kind: Style, colours: Mapping[str, str]) -> None:
    """Writes the paired differences from the first checkpoint."""
    first = differences_from(differences, references(differences)[0]) if len(differences) else differences
    for metric, protocol in compared_metrics(first, MEASURE):
        frame = difference_frame(first, metric, protocol)
        if len(frame):
            ylabel = f"difference from {first['reference'].iloc[0]}"
            drawn = line_plot(
                frame, ylabel + direction(metric).replace(" ", "\n", 1), colours, kind == "paper", zero=True
            )
            save_figure(drawn, out, f"differences_{metric}_{protocol}", kind)
