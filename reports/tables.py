"""Table 8 of OLA-VLM: decoded metrics by checkpoint, between what a constant and what the teacher scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.evaluation.registry import MetricInfo, describe
from reports.charts import PROBES
from reports.results import RunResults, best_layer

CONTROLS = {"none": "", "random": ", random weights"}
REFERENCES = (
    ("floor: mean target", "constant", "mean"),
    ("image row alone", "image_row", "baseline"),
    ("ceiling: teacher's own feature, decoded in the same way", "target", "teacher"),
    ("teacher as it is", "teacher", "teacher"),
)
"""Rows that belong to no checkpoint, with their probe and control."""


@dataclass(frozen=True)
class Column:
    """One metric of the table."""

    teacher: str
    metric: str
    protocol: str

    @property
    def info(self) -> MetricInfo:
        """What is known of the metric."""
        return describe(self.metric, self.protocol)

    @property
    def title(self) -> str:
        """Its name, and which way is better."""
        return f"{self.info.label} {'↑' if self.info.higher_is_better else '↓'}"


@dataclass(frozen=True)
class DecodedTable:
    """The table, as text.

    Attributes:
        columns: the metrics.
        rows: name of the row, and a cell per column; a cell is empty where nothing was computed.
        notes: what a reader must know.
    """

    columns: list[Column]
    rows: list[tuple[str, list[str]]]
    notes: list[str]

    def frame(self) -> pd.DataFrame:
        """The table with its titles."""
        titles = [column.title for column in self.columns]
        return pd.DataFrame([cells for _, cells in self.rows], columns=titles, index=[name for name, _ in self.rows])


def decoded_columns(runs: Sequence[RunResults]) -> list[Column]:
    """The metrics with a column, by its position."""
    measures = dict.fromkeys(measure for run in runs for measure in run.measures)
    columns = [
        Column(teacher, *measure)
        for measure in measures
        for teacher in dict.fromkeys(teacher for run in runs for teacher in run.teachers_of(*measure))
    ]
    return sorted((column for column in columns if column.info.column), key=lambda column: column.info.column)


def decoded_table(runs: Sequence[RunResults]) -> DecodedTable | None:
    """Checkpoints × metrics, averaged over layers and at the best layer; None where nothing was decoded."""
    columns = decoded_columns(runs)
    if not columns:
        return None
    rows: list[tuple[str, list[str]]] = []
    for run in runs:
        for control, suffix in CONTROLS.items():
            for probe, name in PROBES.items():
                place = f"{run.label}{suffix} · {name}"
                rows.append((f"{place}, mean over layers", [_mean(run, c, probe, control) for c in columns]))
                rows.append((f"{place}, best layer", [_best(run, c, probe, control) for c in columns]))
    for name, probe, control in REFERENCES:
        cells = {run.label: [_reference(run, c, probe, control) for c in columns] for run in runs}
        same = len({tuple(own) for own in cells.values()}) == 1  # as is the rule: same teachers, same images
        rows += [(name, own) if same else (f"{name} ({label})", own) for label, own in cells.items()]
    rows = list({name: (name, cells) for name, cells in rows if any(cells)}.values())
    return DecodedTable(columns, rows, _notes(runs, columns))


def _cell(row: pd.Series | None, metric: str) -> str:
    if row is None:
        return ""
    digits = describe(metric).digits
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def _mean(run: RunResults, column: Column, probe: str, control: str) -> str:
    row = run.average(column.teacher, probe, control, column.metric, column.protocol)
    return _cell(row, column.metric)


def _best(run: RunResults, column: Column, probe: str, control: str) -> str:
    curve = run.curve(column.teacher, probe, control, column.metric, column.protocol)
    if curve.empty:
        return ""
    row = best_layer(curve, column.metric)
    return f"{_cell(row, column.metric)} · layer {row['layer']}"


def _reference(run: RunResults, column: Column, probe: str, control: str) -> str:
    row = run.reference(column.teacher, probe, control, column.metric, column.protocol)
    # The teacher as it is sees its own early stages, so it has no value for the probe alone.
    if row is None and column.protocol == "blind" and probe == "teacher":
        row = run.reference(column.teacher, probe, control, column.metric, "strict")
    return _cell(row, column.metric)


def _notes(runs: Sequence[RunResults], columns: Sequence[Column]) -> list[str]:
    notes = []
    for column in columns:
        r = pd.concat([run.results[run.results["metric"] == column.metric] for run in runs])
        n = r.loc[r["protocol"] == column.protocol, "n"]
        if n.min() < column.info.enough_images:
            notes.append(
                f"{column.info.label}: {n.min()} images. Below {column.info.enough_images} it is biased upwards; "
                "compare only values of equally many images."
            )
    notes.append("The mean over layers is that of the probed layers 1 … L; layer 0 and final are not in it.")
    if any(run.manifest["fit"].get("imported") for run in runs):
        notes.append("Of imported probes it includes final, the state that OLA-VLM's probes of the last layer read.")
    notes.append("The best layer is chosen on the images that it is scored on, so its value is a little flattered.")
    return notes
