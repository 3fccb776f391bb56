"""Layerwise curves as files (OLA-VLM, Fig. 3): a panel per teacher, a line per checkpoint, controls dashed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.evaluation.registry import describe
from reports.results import AVERAGE, FINAL, RunResults, layer_rank, sort_teachers, teacher_title
from reports.styles import DOUBLE, LIGHT, PAPER, SCREEN, SINGLE, marker, tone

INPUT_CONTROLS = {
    "blank": ("shown grey", "_"),
    "other": ("shown another image", "+"),
    "caption": ("given the caption", "*"),
}
"""Controls that replace the checkpoint's input image: name and marker."""
PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}
LAYER = "LLM layer (0 = projector output)"


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
MEAN_STYLE: dict[str, Any] = {"color": LIGHT["grey"], "linestyle": (0, (6, 2, 1, 2))}
CEILING_LABEL = "teacher's feature"
CEILING_STYLE: dict[str, Any] = {"color": LIGHT["ink"], "linestyle": "-"}


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


def draw_panel(
    axes: Axes, lines: Sequence[Series], teacher: str, probe: str, metric: str, protocol: str, ylabel: bool = True
) -> None:
    """Draws one teacher's curves; x is the layer, with `final` separate on the right."""
    deepest = max(line.run.depth for line in lines)
    final_at = final_position(deepest)
    has_final = False
    full = mpl.rcParams["lines.linewidth"]
    for line in lines:
        curve = line.run.curve(teacher, probe, line.control, metric, protocol)
        if curve.empty:
            continue
        colour = LIGHT[line.tone]
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": line.dash,
            "linewidth": full if line.control == "none" else 0.72 * full,
            "marker": line.marker or None,
        }
        for part in (curve[curve["layer"] != FINAL], curve[curve["layer"] == FINAL]):
            if part.empty:
                continue
            at_final = part["layer"].iloc[0] == FINAL
            has_final |= at_final
            x = np.full(len(part), final_at) if at_final else part["layer"].astype(float).to_numpy()
            low, high = part["ci_low"].to_numpy(), part["ci_high"].to_numpy()
            axes.plot(x, part["value"], markevery=max(len(x) // 16, 1), label=line.label, **style)
            if at_final or len(part) == 1:
                error = [part["value"] - low, high - part["value"]]
                axes.errorbar(x, part["value"], yerr=error, fmt="none", ecolor=colour, capsize=2, linewidth=0.55 * full)
            else:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    mean, ceiling = levels([line.run for line in lines], teacher, metric, protocol)
    if mean is not None:
        axes.axhline(mean, label=MEAN_LABEL, linewidth=0.66 * full, **MEAN_STYLE)
    if ceiling is not None:
        axes.axhline(ceiling, label=CEILING_LABEL, linewidth=0.45 * full, **CEILING_STYLE)
    axes.set_xticks(*layer_ticks(deepest, has_final))
    if has_final:
        half = (final_at - deepest) / 2
        axes.axvspan(final_at - half, final_at + half, color="#f4f4f4", zorder=0)
    axes.set_title(teacher_title(teacher), loc="left", fontweight="bold")
    axes.set_xlabel(LAYER)
    if ylabel:
        info = describe(metric, protocol)
        axes.set_ylabel(info.label + ("" if info.higher_is_better else ", lower is better"))


def levels(runs: Sequence[RunResults], teacher: str, metric: str, protocol: str) -> tuple[float | None, float | None]:
    """Returns the scores of the mean target and of the teacher's feature, from the first run that has them."""
    means = (run.mean_target_score(teacher, metric, protocol) for run in runs)
    ceiling = (run.teacher_score(teacher, metric, protocol) for run in runs)
    return next((x for x in means if x is not None), None), next((x for x in ceiling if x is not None), None)


def teachers_of(runs: Sequence[RunResults], metric: str, protocol: str) -> list[str]:
    """Returns the teachers for which any of the runs has a metric."""
    return list(dict.fromkeys(teacher for run in runs for teacher in run.teachers_of(metric, protocol)))


def legend_handles(lines: Sequence[Series], ceiling: bool = False) -> list[Line2D]:
    """Returns a handle per line, for the mean target and, if decoded, for the teacher's feature."""
    handles = [
        Line2D([], [], color=LIGHT[x.tone], linestyle=x.dash, marker=x.marker or None, label=x.label) for x in lines
    ]
    handles.append(Line2D([], [], label=MEAN_LABEL, **MEAN_STYLE))
    return [*handles, Line2D([], [], label=CEILING_LABEL, linewidth=0.8, **CEILING_STYLE)] if ceiling else handles


def draw_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draws the legend below the panels, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles) + 6
    letters = figure.get_figwidth() * 72 / (0.58 * mpl.rcParams["font.size"])
    columns = max(1, min(len(handles), 4, int(letters / longest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _size(columns: int, rows: int, paper: bool, handles: int) -> tuple[float, float]:
    """Returns the figure size in inches; for a paper always two columns wide."""
    if paper:
        return DOUBLE, 1.75 * rows + 0.35 + 0.13 * handles / max(columns, 1)
    return 3.4 * columns, 2.7 * rows + 0.7


def layer_figure(runs: Sequence[RunResults], metric: str, protocol: str, paper: bool = False) -> Figure:
    """Draws a metric by layer: a column per teacher, a row per kind of probe."""
    lines = series(runs)
    teachers = teachers_of(runs, metric, protocol)
    ceiling = any(levels(runs, teacher, metric, protocol)[1] is not None for teacher in teachers)
    probes = shown_probes(runs)
    with mpl.rc_context(PAPER if paper else SCREEN):
        rows, columns = (len(probes), len(teachers)) if len(teachers) > 1 else (1, len(probes))
        handles = legend_handles(lines, ceiling)
        figure = Figure(figsize=_size(columns, rows, paper, len(handles)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey="col" if len(teachers) > 1 else "row")
        panels = [(probe, teacher) for probe in probes for teacher in teachers]
        for index, (axes, (probe, teacher)) in enumerate(zip(grid.flat, panels, strict=True)):
            draw_panel(axes, lines, teacher, probe, metric, protocol, ylabel=index % columns == 0)
            axes.set_title(panel_title(teacher, probe), loc="left", fontweight="normal")
        draw_legend(figure, handles)
    return figure


def shown_probes(runs: Sequence[RunResults]) -> list[str]:
    """Returns the kinds of probe in the runs."""
    return [p for p in PROBES if any((run.results["probe"] == p).any() for run in runs)]


def column_figure(runs: Sequence[RunResults], teacher: str, probe: str, metric: str, protocol: str) -> Figure:
    """Draws one panel with its legend, as wide as one column of a paper."""
    lines = [x for x in series(runs) if len(x.run.curve(teacher, probe, x.control, metric, protocol))]
    with mpl.rc_context(PAPER):
        handles = legend_handles(lines, levels(runs, teacher, metric, protocol)[1] is not None)
        figure = Figure(figsize=(SINGLE, 2.0 + 0.07 * len(handles)), layout="constrained")
        axes = figure.subplots()
        draw_panel(axes, lines, teacher, probe, metric, protocol)
        axes.set_title(panel_title(teacher, probe), loc="left", fontweight="normal")
        draw_legend(figure, handles)
    return figure


def difference_figure(
    differences: pd.DataFrame, metric: str, protocol: str, style_indices: Mapping[str, int], paper: bool = False
) -> Figure:
    """Draws paired differences by layer: a column per teacher, a row per probe, a line per checkpoint.

    Args:
        differences: paired differences from one reference.
        metric: metric in `differences`.
        protocol: protocol in `differences`.
        style_indices: by checkpoint.
        paper: whether to use the size of a paper.
    """
    d = differences
    chosen = d[(d["metric"] == metric) & (d["protocol"] == protocol) & (d["layer"] != AVERAGE)]
    teachers = difference_teachers(chosen)
    probes = [p for p in PROBES if p in set(chosen["probe"])]
    names = list(dict.fromkeys(d["checkpoint"]))
    with mpl.rc_context(PAPER if paper else SCREEN):
        rows, columns = (len(probes), len(teachers)) if len(teachers) > 1 else (1, len(probes))
        figure = Figure(figsize=_size(columns, rows, paper, len(names)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        panels = [(probe, teacher) for probe in probes for teacher in teachers]
        for axes, (probe, teacher) in zip(grid.flat, panels, strict=True):
            axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
            panel = chosen[(chosen["teacher"] == teacher) & (chosen["probe"] == probe)]
            layers = sorted(set(panel["layer"]), key=layer_rank)
            for name in names:
                part = panel[panel["checkpoint"] == name]
                part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
                colour = LIGHT[tone(style_indices[name])]
                x = [layers.index(layer) for layer in part["layer"]]
                axes.plot(x, part["value"], color=colour, marker=marker(style_indices[name]), label=name)
                axes.fill_between(x, part["ci_low"], part["ci_high"], color=colour, alpha=0.18, linewidth=0)
            step = max(1, int(np.ceil(len(layers) / 9)))
            axes.set_xticks(range(0, len(layers), step), layers[::step])
            axes.set_title(panel_title(teacher, probe), loc="left")
            axes.set_xlabel("LLM layer")
        for row in grid:
            direction = ",\nlower is better" if not describe(metric).higher_is_better else ""
            row[0].set_ylabel(f"difference from {d['reference'].iloc[0]}{direction}")
        draw_legend(figure, figure.axes[0].get_legend_handles_labels()[0])
    return figure


def difference_teachers(differences: pd.DataFrame) -> list[str]:
    """Returns the teachers of the differences, in the paper's order."""
    return sort_teachers(differences["teacher"])


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
