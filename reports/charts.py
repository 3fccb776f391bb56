"""Layerwise curves as files, after Fig. 3 of OLA-VLM: a panel per teacher, a line per checkpoint, controls dashed."""

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
from reports.results import AVERAGE, FINAL, RunResults, in_order, layer_rank, teacher_title
from reports.styles import DOUBLE, LIGHT, PAPER, SCREEN, SINGLE, marker, tone

SHOWN = {"blank": ("shown grey", "_"), "other": ("shown another image", "+"), "caption": ("told the caption", "*")}
"""What the checkpoint was given in place of the image: name and marker."""
PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}
LAYER = "LLM layer (0 = projector output)"


@dataclass(frozen=True)
class Series:
    """How one line looks and where it comes from; `tone` is a key of `styles.LIGHT`."""

    label: str
    run: RunResults
    control: str
    tone: str
    dash: str
    marker: str


def series(runs: Sequence[RunResults]) -> list[Series]:
    """The lines of every panel, checkpoints first; the same checkpoint has the same colour everywhere."""
    lines = [Series(run.label, run, "none", tone(run.place), "-", marker(run.place)) for run in runs]
    alone = len(runs) == 1
    for run in runs:
        ran = set(run.results["control"])
        suffix = "" if alone else f", {run.label}"
        if "random" in ran:
            colour = "ink" if alone else tone(run.place)
            lines.append(Series(f"random weights{suffix}", run, "random", colour, "--", "x"))
        if "shuffled" in ran:
            lines.append(Series(f"shuffled pairs{suffix}", run, "shuffled", "grey", ":", ""))
        for control, (name, sign) in SHOWN.items():
            if control in ran:
                colour = "violet" if alone else tone(run.place)
                lines.append(Series(f"{name}{suffix}", run, control, colour, ":", sign))
    return lines


MEAN_LABEL = "mean target"
MEAN_STYLE: dict[str, Any] = {"color": LIGHT["grey"], "linestyle": (0, (6, 2, 1, 2))}
OWN_LABEL = "teacher's own feature"
OWN_STYLE: dict[str, Any] = {"color": LIGHT["ink"], "linestyle": "-"}


def panel_title(teacher: str, probe: str) -> str:
    """What one panel is called."""
    return f"{teacher_title(teacher)}, {PROBES[probe]}"


def final_place(deepest: int) -> float:
    """Where `final` stands on the axis of the layers, apart on the right."""
    return deepest + max(1.0, 0.13 * deepest)


def layer_ticks(deepest: int, final: bool) -> tuple[list[float], list[str]]:
    """Places and names of at most ten layers, and of `final`."""
    step = max(1, int(np.ceil(deepest / 8)))
    ticks: list[float] = list(range(0, deepest + 1, step))
    labels = [str(tick) for tick in ticks]
    if final:
        if deepest - ticks[-1] < step / 2 and ticks[-1] != deepest:
            ticks, labels = ticks[:-1], labels[:-1]
        ticks, labels = [*ticks, final_place(deepest)], [*labels, FINAL]
    return ticks, labels


def draw_panel(
    axes: Axes, lines: Sequence[Series], teacher: str, probe: str, metric: str, protocol: str, ylabel: bool = True
) -> None:
    """Draws one teacher's curves; a layer's x is its number, `final` stands apart on the right."""
    deepest = max(line.run.depth for line in lines)
    final_at = final_place(deepest)
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
    mean, own = levels([line.run for line in lines], teacher, metric, protocol)
    if mean is not None:
        axes.axhline(mean, label=MEAN_LABEL, linewidth=0.66 * full, **MEAN_STYLE)
    if own is not None:
        axes.axhline(own, label=OWN_LABEL, linewidth=0.45 * full, **OWN_STYLE)
    axes.set_xticks(*layer_ticks(deepest, has_final))
    if has_final:
        half = (final_at - deepest) / 2
        axes.axvspan(final_at - half, final_at + half, color="#f4f4f4", zorder=0)
    axes.set_title(teacher_title(teacher), loc="left", fontweight="bold")
    axes.set_xlabel(LAYER)
    if ylabel:
        info = describe(metric, protocol)
        axes.set_ylabel(info.label + ("" if info.higher_is_better else ", less is better"))


def levels(runs: Sequence[RunResults], teacher: str, metric: str, protocol: str) -> tuple[float | None, float | None]:
    """What the mean target and the teacher's own feature score, as the first run has it that has either."""
    means = (run.mean_target(teacher, metric, protocol) for run in runs)
    own = (run.own_feature(teacher, metric, protocol) for run in runs)
    return next((x for x in means if x is not None), None), next((x for x in own if x is not None), None)


def teachers_of(runs: Sequence[RunResults], metric: str, protocol: str) -> list[str]:
    """Teachers that a metric was computed for in any of the runs."""
    return list(dict.fromkeys(teacher for run in runs for teacher in run.teachers_of(metric, protocol)))


def legend_handles(lines: Sequence[Series], own: bool = False) -> list[Line2D]:
    """One entry per line, the mean target, and where a metric decodes the teacher's own feature."""
    handles = [
        Line2D([], [], color=LIGHT[x.tone], linestyle=x.dash, marker=x.marker or None, label=x.label) for x in lines
    ]
    handles.append(Line2D([], [], label=MEAN_LABEL, **MEAN_STYLE))
    return [*handles, Line2D([], [], label=OWN_LABEL, linewidth=0.8, **OWN_STYLE)] if own else handles


def draw_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Below the panels, in as many columns as fit the width."""
    longest = max(len(str(handle.get_label())) for handle in handles) + 6
    letters = figure.get_figwidth() * 72 / (0.58 * mpl.rcParams["font.size"])
    columns = max(1, min(len(handles), 4, int(letters / longest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _size(columns: int, rows: int, paper: bool, handles: int) -> tuple[float, float]:
    """Inches; on paper the width of two columns, whatever is in it."""
    if paper:
        return DOUBLE, 1.75 * rows + 0.35 + 0.13 * handles / max(columns, 1)
    return 3.4 * columns, 2.7 * rows + 0.7


def layer_figure(runs: Sequence[RunResults], metric: str, protocol: str, paper: bool = False) -> Figure:
    """The whole figure: a column per teacher, a row per kind of probe, one legend below."""
    lines = series(runs)
    teachers = teachers_of(runs, metric, protocol)
    own = any(levels(runs, teacher, metric, protocol)[1] is not None for teacher in teachers)
    probes = shown_probes(runs)
    with mpl.rc_context(PAPER if paper else SCREEN):
        rows, columns = (len(probes), len(teachers)) if len(teachers) > 1 else (1, len(probes))
        handles = legend_handles(lines, own)
        figure = Figure(figsize=_size(columns, rows, paper, len(handles)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey="col" if len(teachers) > 1 else "row")
        panels = [(probe, teacher) for probe in probes for teacher in teachers]
        for index, (axes, (probe, teacher)) in enumerate(zip(grid.flat, panels, strict=True)):
            draw_panel(axes, lines, teacher, probe, metric, protocol, ylabel=index % columns == 0)
            axes.set_title(panel_title(teacher, probe), loc="left", fontweight="normal")
        draw_legend(figure, handles)
    return figure


def shown_probes(runs: Sequence[RunResults]) -> list[str]:
    """The kinds of probe that any of the runs has."""
    return [p for p in PROBES if any((run.results["probe"] == p).any() for run in runs)]


def column_figure(runs: Sequence[RunResults], teacher: str, probe: str, metric: str, protocol: str) -> Figure:
    """One panel with its legend, as wide as one column of a paper."""
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
    differences: pd.DataFrame, metric: str, protocol: str, place: Mapping[str, int], paper: bool = False
) -> Figure:
    """Paired differences from one reference by layer: a column per teacher, a row per probe, a line per checkpoint.

    Args:
        differences: of one reference.
        metric: which metric.
        protocol: how it is computed.
        place: the number of every checkpoint.
        paper: in the size of a paper.
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
            own = chosen[(chosen["teacher"] == teacher) & (chosen["probe"] == probe)]
            layers = sorted(set(own["layer"]), key=layer_rank)
            for name in names:
                part = own[own["checkpoint"] == name]
                part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
                colour = LIGHT[tone(place[name])]
                x = [layers.index(layer) for layer in part["layer"]]
                axes.plot(x, part["value"], color=colour, marker=marker(place[name]), label=name)
                axes.fill_between(x, part["ci_low"], part["ci_high"], color=colour, alpha=0.18, linewidth=0)
            step = max(1, int(np.ceil(len(layers) / 9)))
            axes.set_xticks(range(0, len(layers), step), layers[::step])
            axes.set_title(panel_title(teacher, probe), loc="left")
            axes.set_xlabel("LLM layer")
        for row in grid:
            less = ",\nless is better" if not describe(metric).higher_is_better else ""
            row[0].set_ylabel(f"difference from {d['reference'].iloc[0]}{less}")
        draw_legend(figure, figure.axes[0].get_legend_handles_labels()[0])
    return figure


def difference_teachers(differences: pd.DataFrame) -> list[str]:
    """The teachers of some differences, in the paper's order."""
    return in_order(differences["teacher"])


def learning_figure(run: RunResults) -> Figure:
    """Training loss of every layer's probe, smoothed over a fortieth of the steps."""
    with mpl.rc_context(SCREEN | {"lines.linewidth": 1}):
        figure = Figure(figsize=(3.4 * len(run.teachers), 2.8), layout="constrained")
        row = figure.subplots(1, len(run.teachers), squeeze=False)[0]
        colours = mpl.colormaps["viridis"]
        for axes, teacher in zip(row, run.teachers, strict=True):
            chosen = run.curves[(run.curves["control"] == "none") & (run.curves["teacher"] == teacher)]
            for (layer, _), curve in chosen.groupby(["layer", "seed"]):
                place = 1.0 if layer == FINAL else float(layer) / max(run.depth, 1)
                ordered = curve.sort_values("step")
                window = max(len(ordered) // 40, 1)
                smooth = ordered["loss"].rolling(window, center=True, min_periods=1).mean()
                thin = max(window, len(ordered) // 200)  # more points than that cannot be seen, and weigh in the page
                axes.plot(ordered["step"][::thin], smooth[::thin], color=colours(0.92 * place))
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
