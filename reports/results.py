"""Reads the results, learning curves and manifest of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.evaluation.registry import describe, infos
from analysis.evaluation.scores import AVERAGE, COLUMNS
from probing.runs.directory import is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json, reading

TEACHERS = ("depth", "seg", "gen")
TITLES = {"depth": "Depth", "seg": "Segmentation", "gen": "Generation"}
FINAL = "final"
"""In the column `layer`: the state after the final norm."""
MEASURE = ("cosine_centred", "strict")
"""Metric and protocol that are shown first."""
CURVE = ["layer", "value", "ci_low", "ci_high", "n"]
"""Columns of one curve."""


def sort_teachers(teachers: Iterable[str]) -> list[str]:
    """Sorts unique names of teachers: those of the paper in its order, then the others."""
    unique = set(teachers)
    return [name for name in TEACHERS if name in unique] + sorted(unique - set(TEACHERS))


def teacher_title(teacher: str) -> str:
    """Returns the heading of a teacher; plain encoders have their own names."""
    return TITLES.get(teacher, teacher)


def metric_label(metric: str, protocol: str) -> str:
    """Returns the name of a metric in figures and tables."""
    return describe(metric, protocol).label


def sort_measures(measures: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sorts pairs of metric and protocol in the order of the registry; unregistered ones come last."""
    known = infos()

    def rank(measure: tuple[str, str]) -> int:
        matches = (info.matches(measure[0]) and info.protocol == measure[1] for info in known)
        return next((number for number, match in enumerate(matches) if match), len(known))

    return sorted(sorted(set(measures)), key=rank)


def sign(metric: str) -> int:
    """Returns 1 if more is better, else -1."""
    return 1 if describe(metric).higher_is_better else -1


def best_layer(curve: pd.DataFrame, metric: str) -> pd.Series:
    """Returns the row of the best layer of a curve."""
    return curve.loc[(sign(metric) * curve["value"]).idxmax()]


def interval_text(row: pd.Series | None, digits: int = 3, sign: str = "") -> str:
    """Formats value and interval of a row; empty without a row."""
    if row is None:
        return ""
    if not row["n"]:
        return "no finite score"
    value, low, high = (f"{row[name]:{sign}.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Results:
    """The results of one run, or of several that differ by their seed.

    Attributes:
        label: name in legends, unique within a report.
        path: the run's folder; of several runs the first, whose images are shown.
        results: `results.csv`, with `layer` and `seed` as text.
        manifest: `manifest.json`; of several runs the first, with `runs`, the number of runs.
        source: the folder that was given: the run, or the folder of several.
    """

    label: str
    path: Path
    results: pd.DataFrame
    manifest: dict[str, Any]
    source: Path


@dataclass(frozen=True)
class RunResults(Results):
    """Evaluated probes, with `learning_curves.csv`."""

    curves: pd.DataFrame

    @property
    def teachers(self) -> list[str]:
        """Returns the teachers that have results, in the paper's order."""
        return sort_teachers(self.results["teacher"])

    @property
    def depth(self) -> int:
        """Returns L, the number of decoder blocks."""
        return int(self.manifest["checkpoint"]["layers"])

    def _rows(
        self, teacher: str, probe: str, control: str, metric: str, protocol: str, variant: str = ""
    ) -> pd.DataFrame:
        rows = self._groups.get((teacher, probe, control, metric, protocol, variant))
        return self.results[CURVE].iloc[:0] if rows is None else rows

    @cached_property
    def _groups(self) -> dict[Any, pd.DataFrame]:
        """The rows of each curve, pooled over seeds if there are several."""
        groups = {}
        columns = ["teacher", "probe", "control", "metric", "protocol", "variant"]
        for key, rows in self.results.groupby(columns, sort=False):
            pooled = rows["seed"] == "all"
            groups[key] = rows.loc[pooled if pooled.any() else slice(None), CURVE]
        return groups

    def curve(
        self,
        teacher: str,
        probe: str,
        control: str,
        metric: str,
        protocol: str,
        with_empty: bool = False,
        variant: str = "",
    ) -> pd.DataFrame:
        """Returns one curve in the order of the layers, pooled over seeds if there are several.

        Returns:
            Columns layer, value, ci_low, ci_high, n; empty if this was not run. Layers without a finite score are
            dropped unless `with_empty`.
        """
        rows = self._rows(teacher, probe, control, metric, protocol, variant)
        rows = rows[(rows["layer"] != AVERAGE) & (rows["value"].notna() | with_empty)]
        return rows.iloc[rows["layer"].map(layer_rank).argsort(kind="stable")]

    def average(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.Series | None:
        """Returns the mean over the probed layers 1 … L with its interval; None if this was not run."""
        rows = self._rows(teacher, probe, control, metric, protocol)
        rows = rows[(rows["layer"] == AVERAGE) & rows["value"].notna()]
        return rows.iloc[0] if len(rows) else None

    def reference(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.Series | None:
        """Returns a row that belongs to no layer, such as the mean target; None if this was not run."""
        rows = self._rows(teacher, probe, control, metric, protocol)
        rows = rows[rows["value"].notna()]
        return rows.iloc[0] if len(rows) else None

    def mean_target_score(self, teacher: str, metric: str, protocol: str) -> float | None:
        """Returns the score of the mean target; None if this was not run."""
        row = self.reference(teacher, "constant", "mean", metric, protocol)
        return None if row is None else float(row["value"])

    def teacher_score(self, teacher: str, metric: str, protocol: str) -> float | None:
        """Returns the score of the teacher's feature, decoded like a probe's output; None if nothing is decoded."""
        row = self.reference(teacher, "target", "teacher", metric, protocol)
        return None if row is None else float(row["value"])

    @property
    def measures(self) -> list[tuple[str, str]]:
        """Returns metric and protocol of the features' scores, registered metrics first; `reports.use` has the rest."""
        scores = self.results[(self.results["variant"] == "") & (self.results["probe"] != "")]
        return sort_measures(zip(scores["metric"], scores["protocol"], strict=True))

    def teachers_of(self, metric: str, protocol: str) -> list[str]:
        """Returns the teachers for which a metric was computed."""
        r = self.results
        scored = set(r[(r["metric"] == metric) & (r["protocol"] == protocol)]["teacher"])
        return [name for name in self.teachers if name in scored]


def layer_rank(layer: str) -> float:
    """Returns the sort key of a layer: none or the tower, 0 … L, then `final`."""
    return float("inf") if layer == FINAL else float(layer) if layer.isdecimal() else -1.0


def load_runs(paths: Sequence[Path]) -> list[RunResults]:
    """Reads evaluated runs, and folders of runs whose checkpoints differ only by their seed.

    Raises:
        UserError: a folder is not a run, or has not been evaluated.
    """
    loaded = []
    for path in paths:
        runs = runs_in(path) or [path]
        for run in runs:
            for verb, matches in (("align", is_alignment), ("bench", is_benchmark)):
                if matches(run):
                    raise UserError(f"{run} is a run of probing {verb} and has no probes to compare; remove it")
            if not (run / "manifest.json").exists():
                raise UserError(f"{run} has no finished run; run: probing train --out {run}")
        if not (path / "results.csv").exists():
            raise UserError(f"{path} has no results yet; run: probing evaluate {path}")
        results = read_results(path / "results.csv")
        loaded.append((runs[0], results, _merged_manifest(runs), path, _learning_curves(runs)))
    labels = unique_labels([run_name(path, entry[2]) for path, entry in zip(paths, loaded, strict=True)], paths)
    return [RunResults(label, *entry) for label, entry in zip(labels, loaded, strict=True)]


def run_name(path: Path, manifest: dict[str, Any]) -> str:
    """Returns the name of a run's checkpoint, or of the folder that holds several runs."""
    return path.resolve().name if runs_in(path) else str(manifest["checkpoint"]["name"])


def unique_labels(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Makes names unique: of several that are the same by the folder of the run, else by both and a number."""
    folders = [path.resolve().name for path in paths]
    unique = [
        folder if names.count(name) > 1 and folder not in {*names} and folders.count(folder) == 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]
    labels = [
        f"{name} ({folder})" if unique.count(name) > 1 else name for name, folder in zip(unique, folders, strict=True)
    ]
    return [f"{label}, run {i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, start=1)]


def read_results(file: Path) -> pd.DataFrame:
    """Reads a `results.csv`; raises UserError if columns are missing."""
    text, numbers = dict.fromkeys(COLUMNS[:10], str), dict.fromkeys(("value", "ci_low", "ci_high", "chance"), float)
    missing = {name: ["", "nan", "NaN"] for name in numbers}  # in the other columns these are text
    with reading(file, "remove it and evaluate again"):
        results = pd.read_csv(file, dtype=text | numbers, keep_default_na=False, na_values=missing)
        absent = [name for name in (*text, *numbers, "n") if name not in results]
        if absent:
            raise ValueError(f"there is no column {absent[0]}")
    return results


def _learning_curves(runs: Sequence[Path]) -> pd.DataFrame:
    """Reads learning curves; of several runs, `seed` is the number of the run."""
    curves = []
    for run in runs:
        with reading(run / "learning_curves.csv", RESTORE_ADVICE):
            curves.append(pd.read_csv(run / "learning_curves.csv", dtype={"layer": str}))
    if len(runs) == 1:
        return curves[0]
    return pd.concat([frame.assign(seed=number) for number, frame in enumerate(curves)])


def _merged_manifest(runs: Sequence[Path]) -> dict[str, Any]:
    """Returns the first run's manifest with the warnings of all runs."""
    manifests = [read_json(run / "manifest.json", RESTORE_ADVICE) for run in runs]
    if len(runs) == 1:
        return manifests[0]
    keys = ("convergence", "skipped", "not_finite")
    warnings = {key: [row for manifest in manifests for row in manifest.get(key, [])] for key in keys}
    seconds = sum(manifest["seconds"] for manifest in manifests)
    return {**manifests[0], **warnings, "seconds": seconds, "runs": len(runs)}
