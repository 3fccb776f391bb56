"""The chapter on benchmarks: accuracies, and representation quality against accuracy, after Fig. 2 of OLA-VLM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.benchmarks.rank_correlation import FEW, LEAST, RankCorrelation, rank_correlation
from analysis.benchmarks.tasks import BENCHMARKS, part_label, title
from analysis.evaluation.registry import ACCURACY
from probing.runs.directory import runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json
from reports.charts import legend, scatter_chart
from reports.curves import PROBES, panel_title
from reports.figures import arrange, png_data_uri
from reports.results import (
    MEASURE,
    Results,
    RunResults,
    interval_text,
    load_runs,
    metric_label,
    read_results,
    run_name,
    unique_labels,
)
from reports.theme import palette, style

MIDDLE = (0.25, 0.75)
"""Range of layers over which probe quality is averaged, as fractions of the depth."""
QUALITY = f"{metric_label(*MEASURE)}, middle layers"


@dataclass(frozen=True)
class BenchmarkResults(Results):
    """One run of `probing bench`; its label is unique within its benchmark."""

    @property
    def benchmark(self) -> str:
        """Returns the name of the benchmark."""
        return str(self.manifest["benchmark"])

    def row(self, part: str, metric: str = ACCURACY) -> pd.Series | None:
        """Returns the row of one part of the benchmark; None if there is none."""
        r = self.results
        rows = r[(r["variant"] == part) & (r["metric"] == metric)]
        return rows.iloc[0] if len(rows) else None

    @property
    def parts(self) -> list[str]:
        """Returns the parts of the benchmark that have an accuracy, the overall one first."""
        return list(dict.fromkeys(self.results.loc[self.results["metric"] == ACCURACY, "variant"]))


def load_benchmarks(paths: Sequence[Path]) -> list[BenchmarkResults]:
    """Reads finished runs of `probing bench`, and folders of them.

    Raises:
        UserError: a run has no results.
    """
    loaded = []
    for folder, run in ((path, run) for path in paths for run in runs_in(path) or [path]):
        if not (run / "results.csv").exists():
            raise UserError(f"{run} has no results; repeat its probing bench command")
        manifest = read_json(run / "manifest.json", RESTORE_ADVICE)
        name = f"{folder.resolve().name}, {run.name}" if runs_in(folder) else manifest["checkpoint"]["name"]
        loaded.append((name, run, read_results(run / "results.csv"), manifest))
    labels = labels_by_benchmark([(name, run, manifest["benchmark"]) for name, run, _, manifest in loaded])
    return [
        BenchmarkResults(label, run, results, manifest, run)
        for label, (_, run, results, manifest) in zip(labels, loaded, strict=True)
    ]


def run_labels(paths: Sequence[Path]) -> list[str]:
    """Returns a label for each run of `probing bench`, or folder of runs over the seeds of a checkpoint.

    Raises:
        UserError: a manifest cannot be read.
    """
    runs = []
    for path in paths:
        manifest = read_json((runs_in(path) or [path])[0] / "manifest.json", RESTORE_ADVICE)
        runs.append((run_name(path, manifest), path, manifest["benchmark"]))
    return labels_by_benchmark(runs)


def labels_by_benchmark(runs: Sequence[tuple[str, Path, str]]) -> list[str]:
    """Makes names unique within each benchmark, from name, folder and benchmark of each run."""
    labels: dict[int, str] = {}
    for benchmark in {benchmark for *_, benchmark in runs}:
        indices = [index for index, run in enumerate(runs) if run[2] == benchmark]
        unique = unique_labels([runs[index][0] for index in indices], [runs[index][1] for index in indices])
        labels |= dict(zip(indices, unique, strict=True))
    return [labels[index] for index in range(len(runs))]


def _title(runs: Sequence[BenchmarkResults], benchmark: str) -> str:
    return title(benchmark, {run.manifest["data"]["questions"] for run in runs if run.benchmark == benchmark})


def accuracy_table(runs: Sequence[BenchmarkResults], benchmark: str) -> dict[str, Any]:
    """Builds the table of accuracies: a row per part, a column per checkpoint, and a column for chance."""
    selected = [run for run in runs if run.benchmark == benchmark]
    parts = list(dict.fromkeys(part for run in selected for part in run.parts))
    table = {part: [run.row(part) for run in selected] for part in parts}
    chances = {part: next((r["chance"] for r in row if r is not None), math.nan) for part, row in table.items()}
    has_chance = not all(map(math.isnan, chances.values()))
    rows = []
    for part, accuracies in table.items():
        chance = ["" if math.isnan(chances[part]) else f"{chances[part]:.3f}"] if has_chance else []
        cells = ["" if row is None else f"{interval_text(row)}, n = {row['n']}" for row in accuracies]
        rows.append([part_label(part), *cells, *chance])
    head = ["part", *(run.label for run in selected), *(["chance"] if has_chance else [])]
    return {"title": _title(runs, benchmark), "head": head, "rows": rows, "notes": _notes(selected)}


def answer_differences(differences: pd.DataFrame | None, benchmark: str) -> list[list[str]]:
    """Builds the rows of the table of paired differences: pair, part, difference, questions."""
    if differences is None:
        return []
    return [
        [
            f"{row['checkpoint']} − {row['reference']}",
            part_label(row["variant"]),
            interval_text(row, sign="+").replace("-", "−") + (f" · higher in {row['higher']}" if row["higher"] else ""),
            str(row["n"]),
        ]
        for _, row in differences.iterrows()
        if row["protocol"] == benchmark
    ]


def _notes(runs: Sequence[BenchmarkResults]) -> list[str]:
    published, notes = BENCHMARKS[runs[0].benchmark], []
    if {run.manifest["data"]["questions"] for run in runs} != {published.size}:
        title = f"{published.title} as published, which has {published.size} questions"
        notes.append(f"Not {title}: the accuracies are not comparable with published ones.")
    for run in runs:
        unparsed, questions = run.manifest["unreadable"], run.manifest["data"]["questions"]
        if skipped := run.manifest.get("skipped"):
            notes.append(f"{run.label}: {len(skipped)} questions are skipped because their images cannot be read.")
        if unparsed:
            notes.append(f"{run.label}: {unparsed} of {questions} answers could not be parsed and count as wrong.")
    if len({run.manifest["data"]["digest"] for run in runs}) > 1:
        notes.append("The checkpoints answered different questions: their accuracies cannot be compared.")
    return notes


@dataclass(frozen=True)
class Panel:
    """Probe quality against accuracy, for one teacher, probe and benchmark.

    Attributes:
        benchmark: its name in recipes.
        name: its title.
        teacher: name of the teacher.
        probe: kind of probe.
        points: columns checkpoint, layers, quality, accuracy, ci_low, ci_high.
        correlation: None if there are too few checkpoints, or quality or accuracy is constant.
    """

    benchmark: str
    name: str
    teacher: str
    probe: str
    points: pd.DataFrame
    correlation: RankCorrelation | None

    @property
    def sentence(self) -> str:
        """Describes the rank correlation."""
        count = len(self.points)
        if count < LEAST:
            have = "1 checkpoint has" if count == 1 else f"{count} checkpoints have"
            return f"{self.name}: {have} both probes and answers; a rank correlation needs {LEAST}."
        subject = f"{self.name}, {panel_title(self.teacher, self.probe)}"
        if self.correlation is None:
            return f"{subject}: no rank correlation, since quality or accuracy is the same for all {count} checkpoints."
        rho, tau = (
            f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            for one in (self.correlation.rho, self.correlation.tau)
        )
        few = f" With fewer than {FEW} checkpoints this is weak evidence." if count < FEW else ""
        return f"{subject}: Spearman's ρ = {rho}, Kendall's τ = {tau} over {count} checkpoints.{few}"


def checkpoint_key(manifest: dict[str, Any]) -> str:
    """Returns the identity of a checkpoint: its hash, or its path if it has none."""
    checkpoint = manifest["checkpoint"]
    return str(checkpoint["path"] if str(checkpoint["sha256"]).endswith("None") else checkpoint["sha256"])


def middle_layer_quality(run: RunResults, teacher: str, probe: str) -> tuple[float, str] | None:
    """Returns the mean centred cosine over the middle layers, and their names; None without scores."""
    curve = run.curve(teacher, probe, "none", *MEASURE)
    low, high = (fraction * run.depth for fraction in MIDDLE)
    middle = curve[[layer.isdecimal() and low <= int(layer) <= high for layer in curve["layer"]]]
    return (float(middle["value"].mean()), " ".join(middle["layer"])) if len(middle) else None


def panels(probed: Sequence[RunResults], benchmarks: Sequence[BenchmarkResults]) -> list[Panel]:
    """Joins runs with probes and runs of benchmarks by checkpoint.

    Args:
        probed: one run per checkpoint.
        benchmarks: any number of runs per checkpoint; the first of each benchmark is used.
    """
    result = []
    for benchmark in dict.fromkeys(run.benchmark for run in benchmarks):
        answers: dict[str, BenchmarkResults] = {}
        for run in benchmarks:
            if run.benchmark == benchmark:
                answers.setdefault(checkpoint_key(run.manifest), run)
        joined = [(probes, answers[key]) for probes in probed if (key := checkpoint_key(probes.manifest)) in answers]
        for probe in PROBES:
            for teacher in dict.fromkeys(name for run in probed for name in run.teachers):
                rows = []
                for probes, answered in joined:
                    quality, row = middle_layer_quality(probes, teacher, probe), answered.row("")
                    if quality is not None and row is not None:
                        point = {"checkpoint": probes.label, "layers": quality[1], "quality": quality[0]}
                        rows.append(point | {name: float(row[name]) for name in ("value", "ci_low", "ci_high")})
                if rows:
                    points = pd.DataFrame(rows).rename(columns={"value": "accuracy"})
                    name = _title(benchmarks, benchmark)
                    result.append(Panel(benchmark, name, teacher, probe, points, _correlation(points)))
    return result


def _correlation(points: pd.DataFrame) -> RankCorrelation | None:
    if len(points) < LEAST or points["quality"].nunique() < 2 or points["accuracy"].nunique() < 2:
        return None
    return rank_correlation(points["quality"].to_numpy(), points["accuracy"].to_numpy())


def comparability_warnings(probed: Sequence[RunResults]) -> list[str]:
    """Explains why probe quality cannot be compared between runs, one sentence per reason."""
    warnings = []
    for name, values in {
        "held-out images": {run.manifest["data"]["eval_digest"] for run in probed},
        "training images": {run.manifest["data"]["train_digest"] for run in probed},
        "teachers": {
            str({key: teacher["sha256"] for key, teacher in run.manifest["teachers"].items()}) for run in probed
        },
    }.items():
        if len(values) > 1:
            warnings.append(f"The runs with probes differ in their {name}: their qualities cannot be compared.")
    return warnings


def quality_title(panel: Panel) -> str:
    """Returns teacher, probe, and the rank correlation if there is one."""
    name = panel_title(panel.teacher, panel.probe)
    if panel.correlation is None:
        return name
    return f"{name}: ρ = {panel.correlation.rho.value:+.2f}, {len(panel.points)} checkpoints"


def quality_frame(panels: Sequence[Panel]) -> pd.DataFrame:
    """Returns the points of panels, with the columns of `reports.charts.scatter_chart` and `panel`."""
    return pd.concat(
        panel.points.assign(panel=quality_title(panel)).rename(columns={"quality": "x", "accuracy": "value"})
        for panel in panels
    )


def quality_plot(panels: Sequence[Panel], colours: Mapping[str, str], paper: bool = False) -> Figure:
    """Draws probe quality against accuracy: a point per checkpoint, a panel per teacher and probe."""
    frame = quality_frame(panels)
    names, columns = list(dict.fromkeys(frame["checkpoint"])), min(3, len(panels))
    with mpl.rc_context(style(paper)):
        grid = sns.relplot(
            frame, x="x", y="value", hue="checkpoint", hue_order=names, palette={name: colours[name] for name in names},
            col="panel", col_wrap=columns, legend=False, s=15 if paper else 30, facet_kws={"sharex": False},
        )  # fmt: skip
        plt.close(grid.figure)
        for title, axes in grid.axes_dict.items():
            rows = frame[frame["panel"] == title]
            axes.vlines(rows["x"], rows["ci_low"], rows["ci_high"], [colours[name] for name in rows["checkpoint"]])
            axes.set_title(title.replace(": ", "\n"))
        grid.set_axis_labels(QUALITY, f"accuracy, {panels[0].name}")
        dots = [Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in names]
        arrange(grid.figure, dots, (-(-len(panels) // columns), columns), paper)
    return grid.figure


@dataclass(frozen=True)
class Chapter:
    """The chapter on benchmarks.

    Attributes:
        runs: runs of `probing bench`.
        panels: panels with a correlation, by benchmark.
        points: all points of the panels; None without.
        sentences: descriptions of the correlations.
        differences: paired differences of accuracy, from `probing compare`.
    """

    runs: Sequence[BenchmarkResults]
    panels: dict[str, list[Panel]]
    points: pd.DataFrame | None
    sentences: list[str]
    differences: pd.DataFrame | None = None

    def template_values(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the variables of the template; `names` are all checkpoints of the page."""
        return {
            "benchmark_runs": self.runs,
            "benchmark_tables": [
                accuracy_table(self.runs, name) | {"differences": answer_differences(self.differences, name)}
                for name in self.panels
            ],
            "benchmark_charts": [
                scatter_chart(quality_frame([panel]), quality_title(panel), names, QUALITY, f"accuracy, {panel.name}")
                for panels in self.panels.values()
                for panel in panels
            ],
            "benchmark_static": self._static(names),
            "benchmark_legend": legend(self.points, names=names) if self.points is not None else [],
            "benchmark_sentences": self.sentences,
        }

    def _static(self, names: Sequence[str]) -> str:
        """Draws the charts for readers without JavaScript."""
        panels = [panel for panels in self.panels.values() for panel in panels]
        return png_data_uri(quality_plot(panels, palette(names))) if panels else ""


def chapter(
    probed: Sequence[Path], benchmarks: Sequence[BenchmarkResults], differences: pd.DataFrame | None = None
) -> Chapter:
    """Joins runs with probes and runs of benchmarks by checkpoint.

    Args:
        probed: runs with probes, and folders of them.
        benchmarks: runs of `probing bench`.
        differences: paired differences of accuracy, from `probing compare`.
    """
    evaluated = [run for path in probed for run in runs_in(path) or [path] if (run / "results.csv").exists()]
    runs = load_runs(evaluated)
    joined = panels(runs, benchmarks)
    sentences = list(dict.fromkeys(panel.sentence for panel in joined)) + (
        comparability_warnings(runs) if joined else []
    )
    if runs and not joined:
        sentences = ["No checkpoint has both probes and answers: no two runs have the same weights."]
    points = [p.points.assign(benchmark=p.benchmark, teacher=p.teacher, probe=p.probe) for p in joined]
    by_benchmark = {
        name: [panel for panel in joined if panel.benchmark == name and panel.correlation is not None]
        for name in dict.fromkeys(run.benchmark for run in benchmarks)
    }
    return Chapter(benchmarks, by_benchmark, pd.concat(points) if points else None, sentences, differences)
