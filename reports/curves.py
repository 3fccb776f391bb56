"""Tables of what charts show: a row per point, for figures and page alike.

Columns: `panel`, the title of the chart; `checkpoint` and `control`, which determine colour and dash; `layer`, its
position `x`, `value`, `ci_low`, `ci_high` and `n`.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from analysis.evaluation.registry import describe
from reports.results import (
    AVERAGE,
    FINAL,
    MEASURE,
    Results,
    RunResults,
    layer_rank,
    sort_measures,
    sort_teachers,
    teacher_title,
)
from reports.theme import CEILING, CHECKPOINT, CONTROLS, MEAN

PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}
MOST_TICKS = 9
DENSE = 16
"""With more layers than this, points would hide the dashes of their lines."""
LAYER = "LLM layer (0 = projector output)"
LEVELS = {MEAN: ("constant", "mean"), CEILING: ("target", "teacher")}
"""Flat lines of charts: name → probe and control in `results.csv`."""


def panel_title(teacher: str, probe: str) -> str:
    """Returns teacher and probe."""
    return f"{teacher_title(teacher)}, {PROBES[probe]}"


def with_positions(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `x`: `final` is separate from the layers, and the tower comes before 0."""
    deepest = max((int(layer) for layer in frame["layer"] if layer.isdecimal()), default=0)
    apart = deepest + max(1, round(0.13 * deepest))
    return frame.assign(x=[apart if layer == FINAL else int(layer_rank(layer)) for layer in frame["layer"]])


def with_panels(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `panel`, teacher and probe, and sorts by it: the teachers of a probe after each other."""
    order = {name: rank for rank, name in enumerate([*PROBES, *sort_teachers(frame["teacher"])])}
    frame = frame.sort_values(["probe", "teacher"], key=lambda names: names.map(order), kind="stable")
    return frame.assign(panel=[panel_title(*pair) for pair in zip(frame["teacher"], frame["probe"], strict=True)])


def stack(runs: Sequence[Results], controls: Mapping[str, str], **values: str) -> pd.DataFrame:
    """Selects rows of layers from every run, with the controls' names in charts, in their order."""
    parts = [run.rows(**values).assign(checkpoint=run.label) for run in runs]
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[(rows["layer"] != AVERAGE) & rows["control"].isin(controls)]
    rows = rows.sort_values("control", key=lambda names: names.map([*controls].index), kind="stable")
    return rows.assign(control=rows["control"].map(controls))


def layer_ticks(frame: pd.DataFrame) -> list[tuple[int, str]]:
    """Returns position and name of at most nine evenly spaced layers, and of `final`."""
    ticks = sorted(set(zip(frame["x"], frame["layer"].astype(str), strict=True)))
    step = -(-len(ticks) // MOST_TICKS)
    shown = ticks[::step]
    if ticks[-1][1] == FINAL and shown[-1] != ticks[-1]:
        shown = [*(tick for tick in shown if tick[0] <= ticks[-2][0] - step / 2), ticks[-1]]
    return shown


def teachers_of(runs: Sequence[RunResults], metric: str, protocol: str) -> list[str]:
    """Returns the teachers for which any of the runs has a metric."""
    return sort_teachers(teacher for run in runs for teacher in run.teachers_of(metric, protocol))


def layer_frame(runs: Sequence[RunResults], metric: str, protocol: str) -> pd.DataFrame:
    """Returns a metric by layer of every checkpoint and control, with mean target and teacher as flat lines.

    Layers without a finite score have an empty value.
    """
    rows = stack(runs, CONTROLS, metric=metric, protocol=protocol, variant="")
    rows = rows[rows["probe"].isin(PROBES)]
    finite = rows.groupby(["checkpoint", "teacher", "probe", "control"])["value"].transform("count")
    parts = [rows[finite > 0]]
    places = parts[0][["teacher", "probe", "layer"]].drop_duplicates()
    for name, (probe, control) in LEVELS.items():
        values = {}
        for teacher in places["teacher"].unique():
            found = [run.row(teacher, probe, control, metric, protocol) for run in runs]
            values[teacher] = next((row["value"] for row in found if row is not None), None)  # of the first that has it
        level = places.assign(value=places["teacher"].map(values), checkpoint=name, control=CHECKPOINT)
        parts.append(level[level["value"].notna()])
    return with_positions(with_panels(pd.concat(parts, ignore_index=True)))


def difference_frame(differences: pd.DataFrame, metric: str, protocol: str) -> pd.DataFrame:
    """Returns paired differences by layer, with the column `reference`."""
    d = differences[(differences["metric"] == metric) & (differences["protocol"] == protocol)]
    d = d[(d["layer"] != AVERAGE) & d["probe"].isin(PROBES) & d["value"].notna()]
    return with_positions(with_panels(d.assign(control=CHECKPOINT)))


def direction(metric: str) -> str:
    """Returns what the label of an axis adds for a metric of which less is better."""
    return "" if describe(metric).higher_is_better else " ↓"


def references(differences: pd.DataFrame) -> list[str]:
    """Returns every checkpoint that can be the reference, the first one first."""
    return list(dict.fromkeys([*differences["reference"], *differences["checkpoint"]]))


def differences_from(differences: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Selects the differences from one reference.

    Each pair is compared once; if the reference is the other checkpoint of a pair, value and interval are negated.
    """
    direct = differences[differences["reference"] == reference]
    reverse = differences[(differences["checkpoint"] == reference) & (differences["reference"] != reference)]
    negated = reverse.assign(
        checkpoint=reverse["reference"],
        reference=reference,
        value=-reverse["value"],
        ci_low=-reverse["ci_high"],
        ci_high=-reverse["ci_low"],
        seeds=[", ".join(reversed(str(seeds).split(", "))) for seeds in reverse["seeds"]],
        higher="",
    )
    return pd.concat([negated, direct], ignore_index=True)


def compared_metrics(differences: pd.DataFrame) -> list[tuple[str, str]]:
    """Returns metric and protocol of all differences of probes, the headline before the others."""
    probed = differences[differences["probe"] != ""]
    metrics = sort_measures(zip(probed["metric"], probed["protocol"], strict=True))
    return sorted(metrics, key=lambda metric: metric != MEASURE)
