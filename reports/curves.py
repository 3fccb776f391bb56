"""Tables of what charts show: a row per point, for figures and page alike.

Columns: `panel` (title of the chart) or `teacher` and `probe`; `checkpoint` and `control`, which determine colour and
dash; `layer`, its position `x`, `value`, `ci_low`, `ci_high` and `n`.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from analysis.evaluation.registry import describe
from reports.results import AVERAGE, CURVE, FINAL, RunResults, layer_rank, sort_measures, sort_teachers, teacher_title
from reports.theme import CEILING, CHECKPOINT, CONTROLS, MEAN

PROBES = {"resampler": "Perceiver resampler", "ridge": "ridge readout"}
MOST_TICKS = 9
DENSE = 16
"""With more layers than this, points would hide the dashes of their lines."""
LAYER = "LLM layer (0 = projector output)"


def panel_title(teacher: str, probe: str) -> str:
    """Returns teacher and probe."""
    return f"{teacher_title(teacher)}, {PROBES[probe]}"


def position(layer: str, deepest: int) -> int:
    """Returns the place of a layer on the axis: `final` is separate from the layers, and the tower comes before 0."""
    return deepest + max(1, round(0.13 * deepest)) if layer == FINAL else int(layer_rank(layer))


def with_positions(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `x`, and sorts by it."""
    deepest = max((int(layer) for layer in frame["layer"] if layer.isdecimal()), default=0)
    placed = frame.assign(x=[position(layer, deepest) for layer in frame["layer"]])
    return placed.sort_values("x", kind="stable", ignore_index=True)


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
    """Returns a metric by layer of every checkpoint and control, with mean target and teacher as flat lines."""
    parts = []
    for teacher in teachers_of(runs, metric, protocol):
        levels = {MEAN: "mean_target_score", CEILING: "teacher_score"}
        found = {
            name: [getattr(run, score)(teacher, metric, protocol) for run in runs] for name, score in levels.items()
        }
        for probe in PROBES:
            lines = [
                run.curve(teacher, probe, control, metric, protocol).assign(checkpoint=run.label, control=name)
                for control, name in CONTROLS.items()
                for run in runs
            ]
            lines = [line for line in lines if len(line)]
            layers = pd.DataFrame({"layer": list(dict.fromkeys(layer for line in lines for layer in line["layer"]))})
            for name, values in found.items():
                level = next((value for value in values if value is not None), None)
                if level is not None and lines:  # of the first run that has it
                    lines.append(layers.assign(value=level, checkpoint=name, control=CHECKPOINT))
            parts += [line.assign(teacher=teacher, probe=probe) for line in lines]
    return with_positions(_joined(parts))


def difference_frame(differences: pd.DataFrame, metric: str, protocol: str) -> pd.DataFrame:
    """Returns paired differences by layer, with the column `reference`."""
    d = differences[(differences["metric"] == metric) & (differences["protocol"] == protocol)]
    return with_positions(
        d[(d["layer"] != AVERAGE) & d["probe"].isin(PROBES) & d["value"].notna()].assign(control=CHECKPOINT)
    )


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    parts = list(parts)
    empty = pd.DataFrame(columns=[*CURVE, "teacher", "probe", "checkpoint", "control"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def direction(metric: str, text: str = ", lower is better") -> str:
    """Returns what the label of an axis adds for a metric of which less is better."""
    return "" if describe(metric).higher_is_better else text


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


def compared_metrics(differences: pd.DataFrame, first: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns metric and protocol of all differences of probes, `first` before the others."""
    probed = differences[differences["probe"] != ""]
    metrics = sort_measures(zip(probed["metric"], probed["protocol"], strict=True))
    return sorted(metrics, key=lambda metric: metric != first)
