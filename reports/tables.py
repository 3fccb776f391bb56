"""Table 8 of OLA-VLM: decoded metrics by checkpoint, with the mean target as floor and the teacher as ceiling."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.evaluation.registry import MetricInfo, describe
from reports.curves import PROBES
from reports.results import RunResults, best_layer, interval_text

CONTROLS = {"none": "", "random": ", random weights"}
REFERENCES = (
    ("floor: mean target", "constant", "mean"),
    ("image row alone", "image_row", "baseline"),
    ("ceiling: teacher's feature, decoded in the same way", "target", "teacher"),
    ("teacher, unmodified", "teacher", "teacher"),
)
"""Rows that belong to no checkpoint: name, probe, control."""


@dataclass(frozen=True)
class Column:
    """One metric of the table."""

    teacher: str
    metric: str
    protocol: str

    @property
    def info(self) -> MetricInfo:
        """Returns the registered description of the metric."""
        return describe(self.metric, self.protocol)

    @property
    def title(self) -> str:
        """Returns label and direction of the metric."""
        return f"{self.info.label} {'↑' if self.info.higher_is_better else '↓'}"


@dataclass(frozen=True)
class DecodedTable:
    """The table, as text.

    Attributes:
        columns: the metrics.
        rows: name of the row, and a cell per column; empty where nothing was computed.
        notes: caveats below the table.
    """

    columns: list[Column]
    rows: list[tuple[str, list[str]]]
    notes: list[str]

    @property
    def lists(self) -> list[list[str]]:
        """Returns the rows as lists, the name first."""
        return [[name, *cells] for name, cells in self.rows]

    def frame(self) -> pd.DataFrame:
        """Returns the table as a data frame."""
        titles = [column.title for column in self.columns]
        return pd.DataFrame([cells for _, cells in self.rows], columns=titles, index=[name for name, _ in self.rows])


def decoded_columns(runs: Sequence[RunResults]) -> list[Column]:
    """Returns the metrics that have a column, by its position."""
    measures = dict.fromkeys(measure for run in runs for measure in run.measures)
    columns = [
        Column(teacher, *measure)
        for measure in measures
        for teacher in dict.fromkeys(teacher for run in runs for teacher in run.teachers_of(*measure))
    ]
    return sorted((column for column in columns if column.info.column), key=lambda column: column.info.column)


def decoded_table(runs: Sequence[RunResults]) -> DecodedTable | None:
    """Builds the table, averaged over layers and at the best layer; None if nothing was decoded."""
    columns = decoded_columns(runs)
    if not columns:
        return None
    rows: list[tuple[str, list[str]]] = []
    for run in runs:
        for control, suffix in CONTROLS.items():
            for probe, name in PROBES.items():
                title = f"{run.label}{suffix} · {name}"
                rows.append((f"{title}, mean over layers", [_mean(run, c, probe, control) for c in columns]))
                rows.append((f"{title}, best layer", [_best(run, c, probe, control) for c in columns]))
    for name, probe, control in REFERENCES:
        cells = {run.label: [_reference(run, c, probe, control) for c in columns] for run in runs}
        same = len(set(map(tuple, cells.values()))) == 1  # the rule: same teachers, same images
        rows += [(name, row) if same else (f"{name} ({label})", row) for label, row in cells.items()]
    rows = list({name: (name, cells) for name, cells in rows if any(cells)}.values())
    return DecodedTable(columns, rows, _notes(runs, columns))


def _mean(run: RunResults, column: Column, probe: str, control: str) -> str:
    row = run.average(column.teacher, probe, control, column.metric, column.protocol)
    return interval_text(row, column.info.digits)


def _best(run: RunResults, column: Column, probe: str, control: str) -> str:
    curve = run.curve(column.teacher, probe, control, column.metric, column.protocol)
    if curve.empty:
        return ""
    row = best_layer(curve, column.metric)
    return f"{interval_text(row, column.info.digits)} · layer {row['layer']}"


def _reference(run: RunResults, column: Column, probe: str, control: str) -> str:
    row = run.reference(column.teacher, probe, control, column.metric, column.protocol)
    # The unmodified teacher uses its early stages, so it has no row for the blind protocol.
    if row is None and column.protocol == "blind" and probe == "teacher":
        row = run.reference(column.teacher, probe, control, column.metric, "strict")
    return interval_text(row, column.info.digits)


def _notes(runs: Sequence[RunResults], columns: Sequence[Column]) -> list[str]:
    notes = []
    for column in columns:
        r = pd.concat([run.results[run.results["metric"] == column.metric] for run in runs])
        n = r.loc[r["protocol"] == column.protocol, "n"]
        if n.min() < column.info.enough_images:
            notes.append(
                f"{column.info.label}: {n.min()} images. Below {column.info.enough_images} it is biased upwards; "
                "compare only values over the same number of images."
            )
    notes.append("The mean over layers is over the probed layers 1 … L, without layer 0 and final.")
    if any(run.manifest["fit"].get("imported") for run in runs):
        notes.append("For imported probes the mean includes final, the input of OLA-VLM's probes of the last layer.")
    notes.append("The best layer is chosen on the images it is scored on, so its value is slightly optimistic.")
    return notes
