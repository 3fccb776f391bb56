"""The chapter on benchmarks: accuracies, and representation quality against accuracy, after Fig. 2 of OLA-VLM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.benchmarks.rank_correlation import FEW, LEAST, RankCorrelation, rank_correlation
from analysis.benchmarks.tasks import BENCHMARKS, part_label, title
from analysis.evaluation.registry import ACCURACY
from probing.runs.directory import runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json
from reports.charts import PROBES
from reports.images import picture
from reports.results import RunResults, load_runs, metric_label, read_results, teacher_title, unique_labels
from reports.styles import DOUBLE, LIGHT, PAPER, SCREEN, SINGLE, marker, tone
from reports.summary import METRIC, PROTOCOL

MIDDLE = (0.25, 0.75)
"""The layers over which a checkpoint's quality is averaged, as shares of its depth."""


@dataclass(frozen=True)
class BenchmarkResults:
    """One run of `probing bench`.

    Attributes:
        label: name for tables, unique for its benchmark.
        path: its folder.
        results: `results.csv`.
        manifest: what it was made of.
    """

    label: str
    path: Path
    results: pd.DataFrame
    manifest: dict[str, Any]

    @property
    def benchmark(self) -> str:
        """Which one."""
        return str(self.manifest["benchmark"])

    def row(self, part: str, metric: str = ACCURACY) -> pd.Series | None:
        """Returns the row of one part of the benchmark; None where it has none."""
        r = self.results
        rows = r[(r["variant"] == part) & (r["metric"] == metric)]
        return rows.iloc[0] if len(rows) else None

    @property
    def parts(self) -> list[str]:
        """Parts of the benchmark that have an accuracy, the whole one first."""
        return list(dict.fromkeys(self.results.loc[self.results["metric"] == ACCURACY, "variant"]))


def load_benchmarks(paths: Sequence[Path]) -> list[BenchmarkResults]:
    """Reads finished runs of `probing bench`, and folders of them.

    Raises:
        UserError: one has no results.
    """
    found = []
    for folder, run in ((path, run) for path in paths for run in runs_in(path) or [path]):
        if not (run / "results.csv").exists():
            raise UserError(f"{run} has no results; type the probing bench that made it once more")
        manifest = read_json(run / "manifest.json", RESTORE_ADVICE)
        name = f"{folder.resolve().name}, {run.name}" if runs_in(folder) else manifest["checkpoint"]["name"]
        found.append((name, run, read_results(run / "results.csv"), manifest))
    labels = labels_by_benchmark([(name, run, manifest["benchmark"]) for name, run, _, manifest in found])
    return [
        BenchmarkResults(label, run, results, manifest)
        for label, (_, run, results, manifest) in zip(labels, found, strict=True)
    ]


def arm_labels(paths: Sequence[Path]) -> list[str]:
    """A name for each run of `probing bench`, or folder of runs that are the seeds of one checkpoint.

    Raises:
        UserError: a manifest cannot be read.
    """
    found = []
    for path in paths:
        manifest = read_json((runs_in(path) or [path])[0] / "manifest.json", RESTORE_ADVICE)
        name = path.resolve().name if runs_in(path) else manifest["checkpoint"]["name"]
        found.append((name, path, manifest["benchmark"]))
    return labels_by_benchmark(found)


def labels_by_benchmark(runs: Sequence[tuple[str, Path, str]]) -> list[str]:
    """Names that are unique among the runs of a benchmark, from name, folder and benchmark of each."""
    labels: dict[int, str] = {}
    for benchmark in {benchmark for *_, benchmark in runs}:
        places = [place for place, run in enumerate(runs) if run[2] == benchmark]
        unique = unique_labels([runs[place][0] for place in places], [runs[place][1] for place in places])
        labels |= dict(zip(places, unique, strict=True))
    return [labels[place] for place in range(len(runs))]


def _title(runs: Sequence[BenchmarkResults], benchmark: str) -> str:
    return title(benchmark, {run.manifest["data"]["questions"] for run in runs if run.benchmark == benchmark})


def accuracy_table(runs: Sequence[BenchmarkResults], benchmark: str) -> dict[str, Any]:
    """Accuracies of one benchmark: a row per part, a column per checkpoint, and one for guessing."""
    there = [run for run in runs if run.benchmark == benchmark]
    parts = list(dict.fromkeys(part for run in there for part in run.parts))
    table = {part: [run.row(part) for run in there] for part in parts}
    chances = {part: next((r["chance"] for r in row if r is not None), math.nan) for part, row in table.items()}
    guesses = not all(map(math.isnan, chances.values()))
    rows = []
    for part, found in table.items():
        extra = ["" if math.isnan(chances[part]) else f"{chances[part]:.3f}"] if guesses else []
        rows.append([part_label(part), *map(_cell, found), *extra])
    head = ["part", *(run.label for run in there), *(["guessing"] if guesses else [])]
    return {"title": _title(runs, benchmark), "head": head, "rows": rows, "notes": _notes(there)}


def _cell(row: pd.Series | None) -> str:
    return "" if row is None else f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}], n = {row['n']}"


def answer_differences(differences: pd.DataFrame | None, benchmark: str) -> list[list[str]]:
    """Rows of a table of paired differences: pair, part, difference with its interval, questions."""
    if differences is None:
        return []
    return [
        [
            f"{row['checkpoint']} − {row['reference']}",
            part_label(row["variant"]),
            f"{row['value']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]".replace("-", "−")
            + (f" · higher in {row['higher']}" if row["higher"] else ""),
            str(row["n"]),
        ]
        for _, row in differences.iterrows()
        if row["protocol"] == benchmark
    ]


def _notes(runs: Sequence[BenchmarkResults]) -> list[str]:
    known, notes = BENCHMARKS[runs[0].benchmark], []
    if {run.manifest["data"]["questions"] for run in runs} != {known.size}:
        notes.append(f"Not {known.title} as published, which has {known.size} questions: not to be held against it.")
    for run in runs:
        unread, asked = run.manifest["unreadable"], run.manifest["data"]["questions"]
        if skipped := run.manifest.get("skipped"):
            notes.append(f"{run.label}: {len(skipped)} questions are left out, as their images cannot be read.")
        if unread:
            notes.append(f"{run.label}: {unread} of {asked} answers could not be read, and count as wrong.")
    if len({run.manifest["data"]["digest"] for run in runs}) > 1:
        notes.append("The checkpoints were not asked the same questions: their accuracies cannot be compared.")
    return notes


@dataclass(frozen=True)
class Panel:
    """Representation quality against accuracy, of one teacher, probe and benchmark.

    Attributes:
        benchmark: which one.
        name: what it is called.
        teacher: whose features are read.
        probe: by which probe.
        points: checkpoint, layers, quality, accuracy, ci_low, ci_high.
        correlation: None where there are too few checkpoints, or one of the two is the same for all.
    """

    benchmark: str
    name: str
    teacher: str
    probe: str
    points: pd.DataFrame
    correlation: RankCorrelation | None

    @property
    def title(self) -> str:
        """What it shows."""
        return f"{teacher_title(self.teacher)}, {PROBES[self.probe]}"

    @property
    def sentence(self) -> str:
        """What can be said of it."""
        count = len(self.points)
        if count < LEAST:
            have = "1 checkpoint has" if count == 1 else f"{count} checkpoints have"
            return f"{self.name}: {have} both probes and answers; no rank correlation of fewer than {LEAST}."
        place = f"{self.name}, {self.title}"
        if self.correlation is None:
            return f"{place}: no rank correlation, since one of the two is the same for all {count} checkpoints."
        rho, tau = (
            f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            for one in (self.correlation.rho, self.correlation.tau)
        )
        few = f" So few checkpoints (fewer than {FEW}) say little, whatever the number." if count < FEW else ""
        return f"{place}: Spearman's ρ = {rho}, Kendall's τ = {tau} over {count} checkpoints.{few}"


def same_checkpoint(manifest: dict[str, Any]) -> str:
    """What two runs of the same checkpoint share: its hash, or where there is none its path."""
    checkpoint = manifest["checkpoint"]
    return str(checkpoint["path"] if str(checkpoint["sha256"]).endswith("None") else checkpoint["sha256"])


def quality(run: RunResults, teacher: str, probe: str) -> tuple[float, str] | None:
    """Mean centred cosine over the probed layers in the middle of a checkpoint, and which they are; None without."""
    curve = run.curve(teacher, probe, "none", METRIC, PROTOCOL)
    low, high = (share * run.depth for share in MIDDLE)
    chosen = curve[[layer.isdecimal() and low <= int(layer) <= high for layer in curve["layer"]]]
    return (float(chosen["value"].mean()), " ".join(chosen["layer"])) if len(chosen) else None


def panels(probed: Sequence[RunResults], asked: Sequence[BenchmarkResults]) -> list[Panel]:
    """Joins runs with probes and runs of benchmarks by their checkpoints.

    Args:
        probed: one run per checkpoint.
        asked: any number per checkpoint; of one benchmark the first counts.
    """
    found = []
    for benchmark in dict.fromkeys(run.benchmark for run in asked):
        answers: dict[str, BenchmarkResults] = {}
        for one in (one for one in asked if one.benchmark == benchmark):
            answers.setdefault(same_checkpoint(one.manifest), one)
        both = [(run, answers[key]) for run in probed if (key := same_checkpoint(run.manifest)) in answers]
        for probe in PROBES:
            for teacher in dict.fromkeys(name for run in probed for name in run.teachers):
                rows = []
                for run, answered in both:
                    read, row = quality(run, teacher, probe), answered.row("")
                    if read is not None and row is not None:
                        place = {"checkpoint": run.label, "layers": read[1], "quality": read[0]}
                        rows.append(place | {name: float(row[name]) for name in ("value", "ci_low", "ci_high")})
                if rows:
                    points = pd.DataFrame(rows).rename(columns={"value": "accuracy"})
                    name = _title(asked, benchmark)
                    found.append(Panel(benchmark, name, teacher, probe, points, _correlation(points)))
    return found


def _correlation(points: pd.DataFrame) -> RankCorrelation | None:
    if len(points) < LEAST or points["quality"].nunique() < 2 or points["accuracy"].nunique() < 2:
        return None
    return rank_correlation(points["quality"].to_numpy(), points["accuracy"].to_numpy())


def not_alike(probed: Sequence[RunResults]) -> list[str]:
    """Why the qualities of some checkpoints cannot be held against each other, a sentence each."""
    said = []
    for what, values in {
        "held-out images": {run.manifest["data"]["eval_digest"] for run in probed},
        "training images": {run.manifest["data"]["train_digest"] for run in probed},
        "teachers": {str({n: t["sha256"] for n, t in run.manifest["teachers"].items()}) for run in probed},
    }.items():
        if len(values) > 1:
            said.append(f"The runs with probes differ in their {what}: their qualities cannot be compared.")
    return said


def quality_figure(drawn: Sequence[Panel], place: Mapping[str, int], paper: bool = False) -> Figure:
    """A panel per teacher and a row per probe, a point per checkpoint; all of one benchmark.

    Args:
        drawn: the panels.
        place: the number of every checkpoint, see `reports.styles`.
        paper: in the size of a paper.
    """
    teachers = list(dict.fromkeys(panel.teacher for panel in drawn))
    probes = list(dict.fromkeys(panel.probe for panel in drawn))
    names = list(dict.fromkeys(name for panel in drawn for name in panel.points["checkpoint"]))
    with mpl.rc_context(PAPER if paper else SCREEN):
        width = (SINGLE if len(teachers) == 1 else DOUBLE) if paper else 3.4 * len(teachers)
        height = (2.0 if paper else 2.9) * len(probes) + 0.5
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(len(probes), len(teachers), squeeze=False, sharey=True)
        for panel in drawn:
            axes = grid[probes.index(panel.probe), teachers.index(panel.teacher)]
            for _, point in panel.points.iterrows():
                number = place[point["checkpoint"]]
                error = np.array([[point["accuracy"] - point["ci_low"]], [point["ci_high"] - point["accuracy"]]])
                axes.errorbar(
                    point["quality"], point["accuracy"], yerr=error.clip(min=0), label=point["checkpoint"],
                    color=LIGHT[tone(number)], marker=marker(number), capsize=2, linewidth=1,
                )  # fmt: skip
            rho = "" if panel.correlation is None else f"\nρ = {panel.correlation.rho.value:+.2f}"
            few = f", {len(panel.points)} checkpoints" if rho else ""
            axes.set_title(f"{panel.title}{rho}{few}", loc="left")
            axes.set_xlabel(f"{metric_label(METRIC, PROTOCOL)}, middle layers")
        for row in grid:
            row[0].set_ylabel(f"accuracy, {drawn[0].name}")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    return figure


@dataclass(frozen=True)
class Chapter:
    """The chapter on benchmarks.

    Attributes:
        runs: of benchmarks.
        panels: by benchmark, those that can be drawn.
        points: all that stands in the panels; None without.
        sentences: what can be said of them.
        place: the number of every checkpoint that has both probes and answers.
        differences: of accuracies, from `probing compare`.
    """

    runs: Sequence[BenchmarkResults]
    panels: dict[str, list[Panel]]
    points: pd.DataFrame | None
    sentences: list[str]
    place: dict[str, int]
    differences: pd.DataFrame | None = None

    def values(self) -> dict[str, Any]:
        """What the page's template asks for."""
        return {
            "benchmark_runs": self.runs,
            "benchmark_tables": [
                accuracy_table(self.runs, name) | {"differences": answer_differences(self.differences, name)}
                for name in self.panels
            ],
            "benchmark_figures": [
                {
                    "src": picture(quality_figure(drawn, self.place), dpi=130),
                    "alt": f"Quality of the representations against accuracy, {drawn[0].name}",
                }
                for name, drawn in self.panels.items()
                if drawn
            ],
            "benchmark_sentences": self.sentences,
        }


def chapter(
    probed: Sequence[Path], asked: Sequence[BenchmarkResults], differences: pd.DataFrame | None = None
) -> Chapter:
    """Joins runs with probes and runs of benchmarks, checkpoint by checkpoint.

    Args:
        probed: runs with probes, and folders of them, in the order that gives checkpoints their numbers.
        asked: runs of benchmarks.
        differences: of accuracies, from `probing compare`.
    """
    single = [
        (run, number)
        for number, path in enumerate(probed)
        for run in runs_in(path) or [path]
        if (run / "results.csv").exists()
    ]
    runs = load_runs([run for run, _ in single])
    joined = panels(runs, asked)
    sentences = list(dict.fromkeys(panel.sentence for panel in joined)) + (not_alike(runs) if joined else [])
    if runs and not joined:
        sentences = ["No checkpoint has both probes and answers: none of the runs are of the same weights."]
    points = [p.points.assign(benchmark=p.benchmark, teacher=p.teacher, probe=p.probe) for p in joined]
    drawn = {
        name: [panel for panel in joined if panel.benchmark == name and panel.correlation is not None]
        for name in dict.fromkeys(run.benchmark for run in asked)
    }
    place = {run.label: number for run, (_, number) in zip(runs, single, strict=True)}
    return Chapter(asked, drawn, pd.concat(points) if points else None, sentences, place, differences)
