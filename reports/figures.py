"""Writes the figures of a report as files, for the screen or for a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from probing.utils.files import atomic_file
from reports.charts import difference_figure, layer_figure, layer_plot, series, shown_probes, teachers_of
from reports.differences import compared_metrics, differences_from, references
from reports.plots import figure
from reports.results import RunResults
from reports.styles import PAPER, SCREEN
from reports.summary import METRIC, PROTOCOL

Style = Literal["screen", "paper"]
"""`screen`: PNG, SVG and PDF. `paper`: SVG and PDF, 3.25 or 6.75 inches wide, font size 7."""


def slug(text: str) -> str:
    """Makes a safe file name: names from tables must not act as paths."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def save_figure(figure: Figure, folder: Path, name: str, style: Style) -> None:
    """Writes a figure into `figures/`; PDF with embedded fonts, SVG with text as paths."""
    formats: dict[str, dict[str, Any]] = {
        "svg": {"metadata": {"Date": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    if style == "screen":
        formats["png"] = {"dpi": 160}
    with mpl.rc_context(PAPER if style == "paper" else SCREEN):  # the font type is read while saving
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keep the layout for all formats
        for suffix, options in formats.items():
            with atomic_file(folder / "figures" / f"{slug(name)}.{suffix}") as file:
                figure.savefig(file, format=suffix, **options)


def evaluated_metrics(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Returns metric and protocol of all results of the runs."""
    return list(dict.fromkeys(measure for run in runs for measure in run.measures))


def runs_with_metric(runs: Sequence[RunResults], metric: str, protocol: str) -> list[RunResults]:
    """Returns the runs that have a metric."""
    return [run for run in runs if (metric, protocol) in run.measures]


def write_curves(runs: Sequence[RunResults], out: Path, style: Style) -> None:
    """Writes the curves of every metric; for a paper also every panel alone, one column wide."""
    for metric, protocol in evaluated_metrics(runs):
        scored = runs_with_metric(runs, metric, protocol)
        stem = f"layers_{metric}_{protocol}"
        save_figure(layer_figure(scored, metric, protocol, style == "paper"), out, stem, style)
        if style == "paper":
            for teacher in teachers_of(scored, metric, protocol):
                for probe in shown_probes(scored):
                    if any(len(run.curve(teacher, probe, "none", metric, protocol)) for run in scored):
                        plot = layer_plot(series(scored), teacher, probe, metric, protocol)
                        save_figure(figure(plot, paper=True), out, f"{stem}_{teacher}_{probe}", style)


def write_differences(differences: pd.DataFrame, style_indices: Mapping[str, int], out: Path, style: Style) -> None:
    """Writes the paired differences from the first checkpoint."""
    first = differences_from(differences, references(differences)[0]) if len(differences) else differences
    for metric, protocol in compared_metrics(first, (METRIC, PROTOCOL)):
        drawn = difference_figure(first, metric, protocol, style_indices, style == "paper")
        save_figure(drawn, out, f"differences_{metric}_{protocol}", style)
