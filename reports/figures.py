"""The figures of a report as files: for the screen, or in the sizes of a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from probing.utils.files import atomic_file
from reports.charts import column_figure, difference_figure, layer_figure, shown_probes, teachers_of
from reports.differences import against, measures_of, references
from reports.results import RunResults
from reports.styles import PAPER, SCREEN
from reports.summary import METRIC, PROTOCOL

Style = Literal["screen", "paper"]
"""`screen`: PNG, SVG and PDF. `paper`: SVG and PDF, 3.25 or 6.75 inches wide, in letters of 7 points."""


def slug(text: str) -> str:
    """A name of a file; what a table says in its names can be no path."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def save(figure: Figure, folder: Path, name: str, style: Style) -> None:
    """Writes a figure into `figures/`; PDF with its fonts embedded, SVG with letters as paths."""
    kinds: dict[str, dict[str, Any]] = {
        "svg": {"metadata": {"Date": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    if style == "screen":
        kinds["png"] = {"dpi": 160}
    with mpl.rc_context(PAPER if style == "paper" else SCREEN):  # the kind of fonts is read while saving
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for every format again
        for kind, values in kinds.items():
            with atomic_file(folder / "figures" / f"{slug(name)}.{kind}") as file:
                figure.savefig(file, format=kind, **values)


def measures(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Metric and protocol of all that any of the runs was evaluated for."""
    return list(dict.fromkeys(measure for run in runs for measure in run.measures))


def having(runs: Sequence[RunResults], metric: str, protocol: str) -> list[RunResults]:
    """The runs that were evaluated for a metric."""
    return [run for run in runs if (metric, protocol) in run.measures]


def write_curves(runs: Sequence[RunResults], out: Path, style: Style) -> None:
    """Every metric's curves; on paper also every panel alone, one column wide."""
    for metric, protocol in measures(runs):
        there = having(runs, metric, protocol)
        stem = f"layers_{metric}_{protocol}"
        save(layer_figure(there, metric, protocol, style == "paper"), out, stem, style)
        if style == "paper":
            for teacher in teachers_of(there, metric, protocol):
                for probe in shown_probes(there):
                    if any(len(run.curve(teacher, probe, "none", metric, protocol)) for run in there):
                        figure = column_figure(there, teacher, probe, metric, protocol)
                        save(figure, out, f"{stem}_{teacher}_{probe}", style)


def write_differences(differences: pd.DataFrame, place: Mapping[str, int], out: Path, style: Style) -> None:
    """Paired differences from the first checkpoint."""
    first = against(differences, references(differences)[0]) if len(differences) else differences
    for metric, protocol in measures_of(first, (METRIC, PROTOCOL)):
        figure = difference_figure(first, metric, protocol, place, style == "paper")
        save(figure, out, f"differences_{metric}_{protocol}", style)
