"""Reads what runs left behind: results, learning curves, manifest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probing.errors import UserError

TEACHERS = ("depth", "seg", "gen")
FINAL = "final"


@dataclass(frozen=True)
class RunResults:
    """One evaluated run.

    Attributes:
        label: name for legends, unique among the runs of a report.
        path: the run's folder.
        results: `results.csv`, with `layer` and `seed` as text.
        curves: `learning_curves.csv`.
        manifest: what the run was made of.
    """

    label: str
    path: Path
    results: pd.DataFrame
    curves: pd.DataFrame
    manifest: dict[str, Any]

    @property
    def teachers(self) -> list[str]:
        """Teachers with results, in the paper's order."""
        there = set(self.results["teacher"])
        return [name for name in TEACHERS if name in there] + sorted(there - set(TEACHERS))

    @property
    def depth(self) -> int:
        """Number L of decoder blocks."""
        return int(self.manifest["checkpoint"]["layers"])

    def curve(self, teacher: str, probe: str, control: str, metric: str, protocol: str) -> pd.DataFrame:
        """One curve, in the order of the layers, pooled over seeds where there were several.

        Returns:
            Columns layer, value, ci_low, ci_high, n; empty where this was not run.
        """
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
        order = chosen["layer"].map(layer_rank)
        return chosen.assign(rank=order).sort_values("rank")[["layer", "value", "ci_low", "ci_high", "n"]]

    def mean_target(self, teacher: str, metric: str, protocol: str) -> float | None:
        """What the mean target scores."""
        row = self.curve(teacher, "constant", "mean", metric, protocol)
        return float(row["value"].iloc[0]) if len(row) else None

    def own_feature(self, teacher: str, metric: str, protocol: str) -> float | None:
        """What the teacher's own feature scores, decoded as a probe's output is; None where nothing is decoded."""
        row = self.curve(teacher, "target", "teacher", metric, protocol)
        return float(row["value"].iloc[0]) if len(row) else None

    def teachers_of(self, metric: str, protocol: str) -> list[str]:
        """Teachers that a metric was computed for."""
        r = self.results
        there = set(r[(r["metric"] == metric) & (r["protocol"] == protocol)]["teacher"])
        return [name for name in self.teachers if name in there]


def layer_rank(layer: str) -> float:
    """Orders layers as the data flows: 0 … L, then `final`."""
    return float("inf") if layer == FINAL else float(layer or -1)


def load_runs(paths: Sequence[Path]) -> list[RunResults]:
    """Reads evaluated runs.

    Raises:
        UserError: a folder is no run, or has not been evaluated.
    """
    found = []
    for path in paths:
        if not (path / "manifest.json").exists():
            raise UserError(f"no finished run at {path}; make one with: probing train --out {path}")
        if not (path / "results.csv").exists():
            raise UserError(f"{path} has no results yet; type: probing evaluate {path}")
        results = pd.read_csv(path / "results.csv", dtype={"layer": str, "seed": str}, keep_default_na=False)
        curves = pd.read_csv(path / "learning_curves.csv", dtype={"layer": str})
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        found.append((manifest["checkpoint"]["name"], path, results, curves, manifest))
    names = [name for name, *_ in found]
    labelled = []
    for name, path, results, curves, manifest in found:
        label = f"{name} ({path.resolve().name})" if names.count(name) > 1 else name
        labelled.append(RunResults(label, path, results, curves, manifest))
    return labelled
