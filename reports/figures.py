"""Figures by seaborn, for Python and as files: curves over the layers, heat maps, losses."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from analysis.evaluation.registry import describe
from probing.utils.errors import UserError
from probing.utils.files import atomic_file
from reports.curves import DENSE, LAYER, PROBES, direction, layer_frame, layer_ticks
from reports.results import FINAL, RunResults, layer_rank, sign, sort_teachers, teacher_title
from reports.theme import CEILING, DOUBLE, REFERENCES, SINGLE, dash, palette, style

Style = Literal["screen", "paper"]
"""`screen`: PNG, SVG and PDF. `paper`: SVG and PDF, 3.25 or 6.75 inches wide, font size 7."""


def line_plot(
    frame: pd.DataFrame,
    ylabel: str = "",
    colours: Mapping[str, str] | None = None,
    paper: bool = False,
    zero: bool = False,
) -> Figure:
    """Draws lines with confidence bands: a panel per value of the column `panel`, at most three in a row.

    Args:
        frame: rows of `reports.curves`; with a column `teacher`, a column of panels per teacher.
        ylabel: label of the vertical axes.
        colours: by checkpoint; by default in the order of the frame.
        paper: whether to use the sizes of a paper.
        zero: whether to draw a line at zero.
    """
    checkpoints, controls = (list(dict.fromkeys(frame[name])) for name in ("checkpoint", "control"))
    colours = colours or palette([name for name in checkpoints if name not in REFERENCES])
    frame, dot = frame.assign(segment=frame["layer"] == FINAL), "o" if frame["x"].max() <= DENSE else ""
    positions, labels = zip(*layer_ticks(frame), strict=True)

    def draw(panel: str, axes: Axes) -> None:
        rows = frame[frame["panel"] == panel]
        sns.lineplot(
            rows, x="x", y="value", ax=axes, errorbar=None, estimator=None, units="segment", legend=False,
            hue="checkpoint", hue_order=checkpoints, palette={name: colours[name] for name in checkpoints},
            style="control", style_order=controls, dashes={name: dash(name) or "" for name in controls},
            marker=dot, markeredgewidth=0,
        )  # fmt: skip
        _draw_bands(axes, rows, colours)
        axes.set_xticks(positions, labels)
        if zero:
            axes.axhline(0, color="#333333", linewidth=0.8, zorder=1)

    with mpl.rc_context(style(paper)):
        columns = max(frame["teacher"].nunique(), 2) if "teacher" in frame else 3
        figure = draw_panels(list(dict.fromkeys(frame["panel"])), draw, columns, LAYER, ylabel, paper)
        handles = [Line2D([], [], color=colours[name], marker=dot, label=name) for name in checkpoints]
        if len(controls) > 1:
            ink = REFERENCES[CEILING][0]
            handles += [Line2D([], [], color=ink, dashes=dash(name) or (None, None), label=name) for name in controls]
        add_legend(figure, handles)
    return figure


def draw_panels(
    titles: Sequence[str],
    draw: Callable[[str, Axes], None],
    columns: int,
    xlabel: str,
    ylabel: str,
    paper: bool = False,
) -> Figure:
    """Draws titled panels and labels the outer axes; seaborn's grids are slow, as they compute layouts in between."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    width, height = ((SINGLE if columns == 1 else DOUBLE), 1.7) if paper else (3.4 * columns, 2.6)
    figure = Figure(figsize=(width, height * rows + 0.1), layout="constrained")
    for number, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, number + 1, title=title)
        draw(title, axes)
        axes.set_xlabel(xlabel if number + columns >= len(titles) else "")
        axes.set_ylabel(ylabel if number % columns == 0 else "")
    return figure


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


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Adds a legend below the panels, in as many columns as fit, and the space for it."""
    if len(handles) < 2:
        return
    width, height = figure.get_size_inches()
    letters = width * 72 / (0.55 * mpl.rcParams["font.size"])
    ncols = max(1, min(len(handles), int(letters / (max(len(str(x.get_label())) for x in handles) + 8))))
    figure.set_size_inches(width, height + 0.2 * -(-len(handles) // ncols))
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
    return line_plot(frame, describe(metric, protocol).label + direction(metric), colours, paper)


def heat_map(run: RunResults, probe: str, paper: bool = False) -> Figure | None:
    """Draws layers × metrics for one probe, each row scaled from its worst layer to its best; None without layers."""
    rows: dict[str, pd.Series] = {}
    for metric, protocol in run.measures:
        for teacher in run.teachers_of(metric, protocol):
            curve = run.curve(teacher, probe, "none", metric, protocol).set_index("layer")["value"]
            if len(curve) > 1:
                rows[f"{teacher_title(teacher)}: {describe(metric, protocol).label}"] = curve * sign(metric)
    if not rows:
        return None
    table = pd.DataFrame(rows).T
    table = table[sorted(table.columns, key=layer_rank)]
    low, span = table.min(axis=1), (table.max(axis=1) - table.min(axis=1)).replace(0, 1)
    width, height, margin = (DOUBLE, 0.2, 0.9) if paper else (9, 0.3, 1.2)
    with mpl.rc_context(style(paper)):
        figure = Figure(figsize=(width, height * len(table) + margin), layout="constrained")
        axes = figure.subplots()
        bar = {"label": "from the worst to the best layer", "ticks": [0, 1]}
        scaled = table.sub(low, axis=0).div(span, axis=0)
        sns.heatmap(scaled, ax=axes, cmap="cividis", vmin=0, vmax=1, linewidths=0.5, cbar_kws=bar)
        axes.set(xlabel=LAYER, title=f"{run.label}, {PROBES[probe]}")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(visible=False)
    return figure


def learning_plot(run: RunResults) -> Figure:
    """Draws the training loss of every layer's probe, smoothed over a fortieth of the steps."""
    curves = run.curves[run.curves["control"] == "none"].sort_values("step")
    depth = curves["layer"].map(lambda layer: run.depth + 1 if layer == FINAL else int(layer))
    groups = curves.assign(layer=depth).groupby(["teacher", "layer", "seed"])
    steps = len(curves) // max(len(groups), 1)
    window, thin = max(steps // 40, 1), max(steps // 40, steps // 200, 1)  # more points are invisible
    frame = groups.rolling(window, on="step", center=True, min_periods=1)["loss"].mean().reset_index()
    frame = frame[frame.groupby(["teacher", "layer", "seed"]).cumcount() % thin == 0]
    frame["teacher"] = frame["teacher"].map(teacher_title)
    titles = [teacher_title(name) for name in sort_teachers(curves["teacher"])]
    legend: Literal["brief", "full"] = "brief" if frame["layer"].nunique() > 10 else "full"  # brief: round numbers

    def draw(title: str, axes: Axes) -> None:
        sns.lineplot(
            frame[frame["teacher"] == title], x="step", y="loss", hue="layer", palette="viridis", units="seed",
            estimator=None, ax=axes, legend=legend if title == titles[-1] else False,
        )  # fmt: skip
        if title == titles[-1]:
            sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), frameon=False)
            box = axes.get_legend()
            for text in box.get_texts() if box else ():
                if text.get_text() == str(run.depth + 1):
                    text.set_text(FINAL)

    with mpl.rc_context(style() | {"lines.linewidth": 1}):
        return draw_panels(titles, draw, 3, "optimiser step", "training loss (smooth L1)")


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


def png_data_uri(figure: Figure) -> str:
    """Encodes a figure as a PNG data URI with an adaptive palette of 256 colours: a third of the size."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    with Image.open(full) as image:
        image.convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def write_group(
    frame: pd.DataFrame, name: str, ylabel: str, zero: bool, out: Path, kind: Style, colours: Mapping[str, str]
) -> None:
    """Writes the figure of a group of charts.

    With a column `name`, a figure for each name. For a paper, where there are columns `teacher` and `probe`, also every
    panel, one column wide.
    """
    parts = (
        {name: frame} if "name" not in frame else {str(one): rows for one, rows in frame.groupby("name", sort=False)}
    )
    if kind == "paper" and {"teacher", "probe"}.issubset(frame):
        parts |= {f"{name}_{'_'.join(pair)}": rows for pair, rows in frame.groupby(["teacher", "probe"])}
    for stem, rows in parts.items():
        save_figure(line_plot(rows, ylabel, colours, kind == "paper", zero=zero), out, stem, kind)
