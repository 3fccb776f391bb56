"""Reads what runs left behind: results, learning curves, manifest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.evaluation.registry import describe, infos
from probing.runs.directory import is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json, reading

TEACHERS = ("depth", "seg", "gen")
TITLES = {"depth": "Depth", "seg": "Segmentation", "gen": "Generation"}
FINAL, AVERAGE = "final", "mean"
"""What `results.csv` calls the state after the final norm, and the mean over the probed layers 1 … L."""
KEYS = ("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "variant", "split", "seed")
"""Columns of `results.csv` that identify a number."""


def in_order(teachers: Iterable[str]) -> list[str]:
    """Names of teachers, each once: those of the paper in its order, then the others."""
    there = set(teachers)
    return [name for name in TEACHERS if name in there] + sorted(there - set(TEACHERS))


def teacher_title(teacher: str) -> str:
    """What a teacher is called in headings; plain encoders by their own names."""
    return TITLES.get(teacher, teacher)


def metric_label(metric: str, protocol: str) -> str:
    """Returns the name of a metric in figures and tables."""
    return describe(metric, protocol).label


def sort_measures(measures: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sorts pairs of metric and protocol as their descriptions are; those without one come last."""
    known = infos()

    def rank(measure: tuple[str, str]) -> int:
        matches = (info.matches(measure[0]) and info.protocol == measure[1] for info in known)
        return next((number for number, match in enumerate(matches) if match), len(known))

    return sorted(sorted(set(measures)), key=rank)


def best_layer(curve: pd.DataFrame, metric: str) -> pd.Series:
    """The row of the best layer of a curve."""
    return curve.loc[curve["value"].idxmax() if describe(metric).higher_is_better else curve["value"].idxmin()]


@dataclass(frozen=True)
class RunResults:
    """One evaluated run.

    Attributes:
        label: name for legends, unique among the runs of a report.
        path: the run's folder; of several runs the first's, whose pictures are shown.
        results: `results.csv`, with `layer` and `seed` as text.
        curves: `learning_curves.csv`.
        manifest: what the run was made of; of several runs the first's, with `runs`, their number.
        place: its number among the checkpoints of a report, which colour and marker follow from.
    """

    label: str
    path: Path
    results: pd.DataFrame
    curves: pd.DataFrame
    manifest: dict[str, Any]
    place: int = 0

    @property
    def teachers(self) -> list[str]:
        """Teachers with results, in the paper's order."""
        return in_order(self.results["teacher"])

    @property
    def depth(self) -> int:
        """Number L of decoder blocks."""
        return int(self.manifest["checkpoint"]["layers"])

    def _rows(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.DataFrame:
        r = self.results
        chosen = r[
            (r["teacher"] == teacher)
            & (r["probe"] == probe)
            & (r["control"] == control)
            & (r["metric"] == metric)
            & (r["protocol"] == protocol)
        ]
        if "all" in set(chosen["seed"]):
            chosen = chosen[chosen["seed"] == "all"]
        return chosen[["layer", "value", "ci_low", "ci_high", "n"]]

    def curve(
        self, teacher: str, probe: str, control: str, metric: str, protocol: str, with_empty: bool = False
    ) -> pd.DataFrame:
        """One curve, in the order of the layers, pooled over seeds where there were several.

        Returns:
            Columns layer, value, ci_low, ci_high, n; empty where this was not run. Layers at which no image counts have
            no value; they are left out unless `with_empty`.
        """
        rows = self._rows(teacher, probe, control, metric, protocol)
        rows = rows[(rows["layer"] != AVERAGE) & (rows["value"].notna() | with_empty)]
        return rows.iloc[rows["layer"].map(layer_rank).argsort(kind="stable")]

    def average(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.Series | None:
        """The mean over the probed layers 1 … L, with its interval; None where this was not run."""
        rows = self._rows(teacher, probe, control, metric, protocol)
        rows = rows[(rows["layer"] == AVERAGE) & rows["value"].notna()]
        return rows.iloc[0] if len(rows) else None

    def reference(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.Series | None:
        """A row that belongs to no layer, such as the mean target; None where this was not run."""
        rows = self._rows(teacher, probe, control, metric, protocol)
        rows = rows[rows["value"].notna()]
        return rows.iloc[0] if len(rows) else None

    def mean_target(self, teacher: str, metric: str, protocol: str) -> float | None:
        """What the mean target scores."""
        row = self.reference(teacher, "constant", "mean", metric, protocol)
        return None if row is None else float(row["value"])

    def own_feature(self, teacher: str, metric: str, protocol: str) -> float | None:
        """What the teacher's own feature scores, decoded as a probe's output is; None where nothing is decoded."""
        row = self.reference(teacher, "target", "teacher", metric, protocol)
        return None if row is None else float(row["value"])

    @property
    def measures(self) -> list[tuple[str, str]]:
        """Metric and protocol of everything that was evaluated, the known ones first."""
        return sort_measures(zip(self.results["metric"], self.results["protocol"], strict=True))

    def teachers_of(self, metric: str, protocol: str) -> list[str]:
        """Teachers that a metric was computed for."""
        r = self.results
        there = set(r[(r["metric"] == metric) & (r["protocol"] == protocol)]["teacher"])
        return [name for name in self.teachers if name in there]


def layer_rank(layer: str) -> float:
    """Orders layers as the data flows: 0 … L, then `final`."""
    return float("inf") if layer == FINAL else float(layer or -1)


def load_runs(paths: Sequence[Path]) -> list[RunResults]:
    """Reads evaluated runs, and folders of runs whose checkpoints differ by their seed alone.

    Raises:
        UserError: a folder is no run, or has not been evaluated.
    """
    found = []
    for path in paths:
        runs = runs_in(path)
        for run in runs or [path]:
            if is_alignment(run):
                raise UserError(f"{run} is a run of probing align, which has no probes to compare; leave it out")
            if is_benchmark(run):
                raise UserError(f"{run} is a run of probing bench, which has no probes to compare; leave it out")
            if not (run / "manifest.json").exists():
                raise UserError(f"no finished run at {run}; make one with: probing train --out {run}")
        if not (path / "results.csv").exists():
            raise UserError(f"{path} has no results yet; type: probing evaluate {path}")
        results = read_results(path / "results.csv")
        found.append((path, results, _curves(runs or [path]), _manifest(runs or [path]), runs))
    names = [path.resolve().name if runs else manifest["checkpoint"]["name"] for path, *_, manifest, runs in found]
    labelled = []
    for place, (label, entry) in enumerate(zip(unique_labels(names, paths), found, strict=True)):
        path, results, curves, manifest, runs = entry
        labelled.append(RunResults(label, (runs or [path])[0], results, curves, manifest, place))
    return labelled


def unique_labels(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of checkpoints; with the folder of the run, and its number, where two would be the same."""
    labels = [f"{n} ({p.resolve().name})" if names.count(n) > 1 else n for n, p in zip(names, paths, strict=True)]
    return [f"{label}, run {i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, start=1)]


def read_results(file: Path) -> pd.DataFrame:
    """Reads a `results.csv`; raises UserError where the file is something else."""
    text, numbers = dict.fromkeys(KEYS, str), dict.fromkeys(("value", "ci_low", "ci_high", "chance"), float)
    absent = {name: ["", "nan", "NaN"] for name in numbers}  # over no image; in the other columns both are text
    with reading(file, "remove it and evaluate again"):
        results = pd.read_csv(file, dtype=text | numbers, keep_default_na=False, na_values=absent)
        lacking = [name for name in (*text, *numbers, "n") if name not in results]
        if lacking:
            raise ValueError(f"there is no column {lacking[0]}")
    return results


def _curves(runs: Sequence[Path]) -> pd.DataFrame:
    """Learning curves of one run, or of several, whose number stands for the seed then."""
    curves = []
    for run in runs:
        with reading(run / "learning_curves.csv", RESTORE_ADVICE):
            curves.append(pd.read_csv(run / "learning_curves.csv", dtype={"layer": str}))
    if len(runs) == 1:
        return curves[0]
    return pd.concat([one.assign(seed=number) for number, one in enumerate(curves)])


def _manifest(runs: Sequence[Path]) -> dict[str, Any]:
    """What the first run was made of, with what was noticed while training any of them."""
    manifests = [read_json(run / "manifest.json", RESTORE_ADVICE) for run in runs]
    if len(runs) == 1:
        return manifests[0]
    keys = ("convergence", "skipped", "not_finite")
    noticed = {key: [row for one in manifests for row in one.get(key, [])] for key in keys}
    return {**manifests[0], **noticed, "seconds": sum(one["seconds"] for one in manifests), "runs": len(runs)}
