"""Reads the results, learning curves and manifest of runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.evaluation.registry import describe, infos
from analysis.evaluation.scores import AVERAGE, COLUMNS
from probing.runs.directory import Run, is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json, reading

TEACHERS = ("depth", "seg", "gen")
TITLES = {"depth": "Depth", "seg": "Segmentation", "gen": "Generation"}
FINAL = "final"
"""In the column `layer`: the state after the final norm."""
MEASURE = ("cosine_centred", "strict")
"""Metric and protocol that are shown first."""
SERIES = ["teacher", "probe", "control", "metric", "protocol", "variant"]
"""Columns of `results.csv` that tell one curve from another."""


def sort_teachers(teachers: Iterable[str]) -> list[str]:
    """Sorts unique names of teachers: those of the paper in its order, then the others."""
    unique = set(teachers)
    return [name for name in TEACHERS if name in unique] + sorted(unique - set(TEACHERS))


def teacher_title(teacher: str) -> str:
    """Returns the heading of a teacher; plain encoders have their own names."""
    return TITLES.get(teacher, teacher)


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


def interval_text(row: pd.Series | Mapping[str, Any] | None, digits: int = 3, sign: str = "") -> str:
    """Formats value and interval of a row; empty without a row, and the value alone without an interval."""
    if row is None:
        return ""
    if not row["n"]:
        return "no finite score"
    # Rounded first, and 0 added: a small negative number would become -0.
    numbers = (round(row[name], digits) + 0.0 for name in ("value", "ci_low", "ci_high"))
    value, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
    return (value if math.isnan(row["ci_low"]) else f"{value} [{low}, {high}]").replace("-", "−")


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

    @property
    def identity(self) -> str:
        """Returns what identifies the checkpoint: its hash, or its path if it has none."""
        checkpoint = self.manifest["checkpoint"]
        return str(checkpoint["path"] if str(checkpoint["sha256"]).endswith("None") else checkpoint["sha256"])

    @cached_property
    def _pooled(self) -> pd.DataFrame:
        """The results in the order of the layers; of a curve over several seeds only the rows that pool them."""
        r, pooled = self.results, self.results["seed"] == "all"
        r = r[pooled | ~pooled.groupby([r[name] for name in SERIES]).transform("any")]
        return r.iloc[r["layer"].map(layer_rank).argsort(kind="stable")]

    def rows(self, **values: str) -> pd.DataFrame:
        """Selects rows by the values of columns, in the order of the layers, pooled over seeds if there are several."""
        rows = self._pooled
        for name, value in values.items():
            rows = rows[rows[name] == value]
        return rows

    def layers(self, **values: str) -> pd.DataFrame:
        """Selects rows in the same way, of the layers alone, and with a finite score."""
        rows = self.rows(**values)
        return rows[(rows["layer"] != AVERAGE) & rows["value"].notna()]


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

    def curve(
        self, teacher: str, probe: str, control: str, metric: str, protocol: str, variant: str = ""
    ) -> pd.DataFrame:
        """Returns the finite scores of one curve by layer, pooled over seeds if there are several."""
        return self.layers(
            teacher=teacher, probe=probe, control=control, metric=metric, protocol=protocol, variant=variant
        )

    def row(
        self, teacher: str, probe: str, control: str, metric: str, protocol: str, layer: str = ""
    ) -> pd.Series | None:
        """Returns the row of a layer: by default none, as of the mean target; `AVERAGE` for the mean over layers.

        Returns:
            None if this was not run or has no finite score.
        """
        rows = self.rows(teacher=teacher, probe=probe, control=control, metric=metric, protocol=protocol, variant="")
        rows = rows[(rows["layer"] == layer) & rows["value"].notna()]
        return rows.iloc[0] if len(rows) else None

    def mean_target_score(self, teacher: str, metric: str, protocol: str) -> float | None:
        """Returns the score of the mean target; None if this was not run."""
        row = self.row(teacher, "constant", "mean", metric, protocol)
        return None if row is None else float(row["value"])

    @cached_property
    def measures(self) -> list[tuple[str, str]]:
        """Returns metric and protocol of the features' scores, registered metrics first; `reports.use` has the rest."""
        scores = self.results[(self.results["variant"] == "") & (self.results["probe"] != "")]
        return sort_measures(zip(scores["metric"], scores["protocol"], strict=True))

    def teachers_of(self, metric: str, protocol: str) -> list[str]:
        """Returns the teachers for which a metric was computed."""
        return sort_teachers(self.rows(metric=metric, protocol=protocol)["teacher"])


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
                Run.open(run)  # raises, and says how to finish it
        if not (path / "results.csv").exists():
            raise UserError(f"{path} has no results yet; run: probing evaluate {path}")
        loaded.append((*read_run(path), _learning_curves(runs)))
    labels = unique_labels([run_name(path, entry[2]) for path, entry in zip(paths, loaded, strict=True)], paths)
    return [RunResults(label, *entry) for label, entry in zip(labels, loaded, strict=True)]


def read_run(path: Path) -> tuple[Path, pd.DataFrame, dict[str, Any], Path]:
    """Reads the fields of `Results` but for the label, of a run or a folder of runs."""
    runs = runs_in(path) or [path]
    return runs[0], read_results(path / "results.csv"), _merged_manifest(path, runs), path


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


def _merged_manifest(path: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """Returns the first run's manifest with the warnings of all runs."""
    first, *others = (read_json(run / "manifest.json", RESTORE_ADVICE) for run in runs)
    for manifest in others:
        for key in ("convergence", "not_finite"):
            first[key] = [*first.get(key, []), *manifest.get(key, [])]
        new = [one for one in manifest.get("skipped", []) if one not in first.get("skipped", [])]
        first["skipped"] = [*first.get("skipped", []), *new]
        first["seconds"] = first.get("seconds", 0) + manifest.get("seconds", 0)
    return first | ({"runs": len(runs)} if runs_in(path) else {})
