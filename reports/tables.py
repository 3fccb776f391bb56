"""Tables of the page: decoded metrics by checkpoint (Table 8 of OLA-VLM), and paired differences."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.alignment.headlines import HEADLINE_METRICS
from analysis.benchmarks.tasks import part_label
from analysis.evaluation.registry import ACCURACY, MetricInfo, describe
from reports.curves import PROBES, compared_metrics, teachers_of
from reports.results import AVERAGE, RunResults, best_layer, interval_text, teacher_title

CONTROLS = {"none": "", "random": ", random weights"}
REFERENCES = (
    ("floor: mean target", "constant", "mean"),
    ("image row alone", "image_row", "baseline"),
    ("ceiling: teacher's feature, decoded in the same way", "target", "teacher"),
    ("teacher, unmodified", "teacher", "teacher"),
)
"""Rows that belong to no checkpoint: name, probe, control."""


def decoded_columns(runs: Sequence[RunResults]) -> list[tuple[str, str, str, MetricInfo]]:
    """Returns teacher, metric, protocol and description of the metrics that have a column, by its position."""
    measures = dict.fromkeys(measure for run in runs for measure in run.measures)
    columns = [(t, *measure, describe(*measure)) for measure in measures for t in teachers_of(runs, *measure)]
    return sorted((column for column in columns if column[-1].column), key=lambda column: column[-1].column)


def decoded_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """Builds the table as text, averaged over layers and at the best layer; empty if nothing was decoded.

    The mean target is the floor, and the decoded teacher's feature the ceiling.
    """
    columns = decoded_columns(runs)
    titles = [f"{info.label} {'↑' if info.higher_is_better else '↓'}" for *_, info in columns]
    rows: dict[str, list[str]] = {}
    for run in runs:
        for control, suffix in CONTROLS.items():
            for probe, name in PROBES.items():
                title = f"{run.label}{suffix} · {name}"
                rows[f"{title}, mean over layers"] = [
                    interval_text(run.row(t, probe, control, m, p, AVERAGE), info.digits) for t, m, p, info in columns
                ]
                rows[f"{title}, best layer"] = [
                    _best(run.curve(t, probe, control, m, p), m, info) for t, m, p, info in columns
                ]
    for name, probe, control in REFERENCES:
        cells = {run.label: [_reference(run, *column, probe, control) for column in columns] for run in runs}
        same = len(set(map(tuple, cells.values()))) == 1  # the rule: same teachers, same images
        rows |= {name if same else f"{name} ({label})": row for label, row in cells.items()}
    return pd.DataFrame([row for row in rows.values() if any(row)], [k for k, row in rows.items() if any(row)], titles)


def _best(curve: pd.DataFrame, metric: str, info: MetricInfo) -> str:
    if curve.empty:
        return ""
    row = best_layer(curve, metric)
    return f"{interval_text(row, info.digits)} · layer {row['layer']}"


def _reference(
    run: RunResults, teacher: str, metric: str, protocol: str, info: MetricInfo, probe: str, control: str
) -> str:
    row = run.row(teacher, probe, control, metric, protocol)
    # The unmodified teacher uses its early stages, so it has no row for the blind protocol.
    if row is None and protocol == "blind" and probe == "teacher":
        row = run.row(teacher, probe, control, metric, "strict")
    return interval_text(row, info.digits)


def decoded_notes(runs: Sequence[RunResults]) -> Iterator[str]:
    """Yields the caveats below the table."""
    for _, metric, protocol, info in decoded_columns(runs):
        n = min(
            run.rows(metric=metric, protocol=protocol)["n"].min() for run in runs if (metric, protocol) in run.measures
        )
        if n < info.enough_images:
            yield (
                f"{info.label}: {n} images. Below {info.enough_images} it is biased upwards; "
                "compare only values over the same number of images."
            )
    yield "The mean over layers is over the probed layers 1 … L, without layer 0 and final."
    if any(run.manifest["fit"].get("imported") for run in runs):
        yield "For imported probes the mean includes final, the input of OLA-VLM's probes of the last layer."
    yield "The best layer is chosen on the images it is scored on, so its value is slightly optimistic."


def is_answer(differences: pd.DataFrame) -> pd.Series:
    """Returns which rows are differences of a benchmark's accuracy."""
    return (differences["metric"] == ACCURACY) & (differences["teacher"] == "") & (differences["layer"] == "")


def headline_rows(differences: pd.DataFrame) -> pd.DataFrame:
    """Selects means over layers of probes, and the headlines of `align`, also after the projector; by metric."""
    order = {key: rank for rank, key in enumerate([*compared_metrics(differences), *HEADLINE_METRICS])}
    kinds = differences["protocol"].where(differences["probe"] != "", differences["variant"])
    ranks = pd.Series([order.get(key, -1) for key in zip(differences["metric"], kinds, strict=True)], differences.index)
    layers = (differences["layer"] == AVERAGE) | ((differences["layer"] == "0") & (differences["probe"] == ""))
    return differences.loc[ranks[layers & (ranks >= 0)].sort_values(kind="stable").index]


def difference_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Builds a table of paired differences as text, with the columns that have content."""
    table = pd.DataFrame([_difference(row) for row in rows.to_dict("records")])
    return table.loc[:, (table != "").any()]


def _difference(row: dict[Any, Any]) -> dict[str, str]:
    probed, answered = row["probe"] != "", row["layer"] == ""
    metric = (
        describe(row["metric"], row["protocol"]).label
        if probed
        else HEADLINE_METRICS.get((row["metric"], row["variant"]))
    )
    return {
        "pair": f"{row['checkpoint']} − {row['reference']}",
        "teacher": teacher_title(row["teacher"]) if probed else "",
        "probe": PROBES.get(row["probe"], row["probe"]),
        "metric": metric or "",
        "part": part_label(row["variant"]) if answered else "",
        "layer": "" if probed or answered else "mean over layers" if row["layer"] == AVERAGE else "after the projector",
        "difference": interval_text(row, 4 if probed else 3, "+"),
        "excludes zero": "yes" if row["ci_low"] > 0 or row["ci_high"] < 0 else "no",
        "higher in pairs of seeds": row["higher"],
        "questions" if answered else "images": str(row["n"]),
    }
