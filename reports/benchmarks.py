"""The chapter on benchmarks: accuracies, and representation quality against accuracy, after Fig. 2 of OLA-VLM."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.benchmarks.compare import answer_statements
from analysis.benchmarks.rank_correlation import FEW, LEAST, RankCorrelation, rank_correlation
from analysis.benchmarks.tasks import BENCHMARKS, part_label, title
from analysis.evaluation.registry import ACCURACY, describe
from probing.runs.directory import runs_in
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json
from reports.charts import legend, scatter_chart
from reports.curves import PROBES, panel_title
from reports.figures import add_legend, draw_panels
from reports.results import (
    MEASURE,
    Results,
    RunResults,
    interval_text,
    load_runs,
    read_run,
    run_name,
    unique_labels,
)
from reports.tables import difference_table
from reports.theme import style

MIDDLE = (0.25, 0.75)
"""Range of layers over which probe quality is averaged, as fractions of the depth."""
QUALITY = f"{describe(*MEASURE).label}, middle layers"


@dataclass(frozen=True)
class BenchmarkResults(Results):
    """One run of `probing bench`; its label is unique within its benchmark."""

    @property
    def benchmark(self) -> str:
        """Returns the name of the benchmark."""
        return str(self.manifest["benchmark"])

    @property
    def accuracy(self) -> pd.Series | None:
        """Returns the row of the overall accuracy; None if there is none."""
        rows = self.rows(metric=ACCURACY, variant="")
        return rows.iloc[0] if len(rows) else None


def load_benchmarks(paths: Sequence[Path]) -> list[BenchmarkResults]:
    """Reads finished runs of `probing bench`, and folders of them.

    Raises:
        UserError: a run has no results.
    """
    loaded = []
    for folder, run in ((path, run) for path in paths for run in runs_in(path) or [path]):
        if not (run / "results.csv").exists():
            raise UserError(f"{run} has no results; repeat its probing bench command")
        values = read_run(run)
        name = f"{folder.resolve().name}, {run.name}" if runs_in(folder) else run_name(run, values[2])
        loaded.append((name, values))
    labels = labels_by_benchmark([(name, values[0], values[2]["benchmark"]) for name, values in loaded])
    return [BenchmarkResults(label, *values) for label, (_, values) in zip(labels, loaded, strict=True)]


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


def accuracy_table(runs: Sequence[BenchmarkResults]) -> pd.DataFrame:
    """Builds the table of one benchmark: a row per part, a column per checkpoint, and a column for chance."""
    accuracies = [run.results[run.results["metric"] == ACCURACY].set_index("variant") for run in runs]
    columns = {
        run.label: pd.Series({part: f"{interval_text(row)}, n = {row['n']}" for part, row in rows.iterrows()})
        for run, rows in zip(runs, accuracies, strict=True)
    }
    chance = pd.concat([rows["chance"].dropna() for rows in accuracies]).groupby(level=0).first()
    table = pd.concat(columns, axis=1).fillna("")
    if len(chance):
        table["chance"] = [f"{chance[part]:.3f}" if part in chance else "" for part in table.index]
    return table.rename(index=part_label).rename_axis("part").reset_index()


def notes(runs: Sequence[BenchmarkResults]) -> list[str]:
    """Lists the caveats of one benchmark's accuracies."""
    published, found = BENCHMARKS[runs[0].benchmark], []
    if {run.manifest["data"]["questions"] for run in runs} != {published.size}:
        title = f"{published.title} as published, which has {published.size} questions"
        found.append(f"Not {title}: the accuracies are not comparable with published ones.")
    for run in runs:
        unparsed, questions = run.manifest["unreadable"], run.manifest["data"]["questions"]
        if skipped := run.manifest.get("skipped"):
            found.append(f"{run.label}: {len(skipped)} questions are skipped because their images cannot be read.")
        if unparsed:
            found.append(f"{run.label}: {unparsed} of {questions} answers could not be parsed and count as wrong.")
    if len({run.manifest["data"]["digest"] for run in runs}) > 1:
        found.append("The checkpoints answered different questions: their accuracies cannot be compared.")
    return found


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
        answers = {run.identity: run for run in reversed(benchmarks) if run.benchmark == benchmark}
        joined = [(run, answers[run.identity]) for run in probed if run.identity in answers]
        for probe, teacher in itertools.product(PROBES, dict.fromkeys(name for run in probed for name in run.teachers)):
            points = []
            for run, answered in joined:
                quality, row = middle_layer_quality(run, teacher, probe), answered.accuracy
                if quality is not None and row is not None:
                    place = {"checkpoint": run.label, "layers": quality[1], "quality": quality[0]}
                    points.append(
                        place | {"accuracy": row["value"], "ci_low": row["ci_low"], "ci_high": row["ci_high"]}
                    )
            if points:
                frame, name = pd.DataFrame(points), _title(benchmarks, benchmark)
                result.append(Panel(benchmark, name, teacher, probe, frame, _correlation(frame)))
    return result


def _correlation(points: pd.DataFrame) -> RankCorrelation | None:
    if len(points) < LEAST or points["quality"].nunique() < 2 or points["accuracy"].nunique() < 2:
        return None
    return rank_correlation(points["quality"].to_numpy(), points["accuracy"].to_numpy())


def comparability_warnings(probed: Sequence[RunResults]) -> list[str]:
    """Explains why probe quality cannot be compared between runs, one sentence per reason."""
    digests = {"held-out images": "eval_digest", "training images": "train_digest"}
    values = {name: {run.manifest["data"][key] for run in probed} for name, key in digests.items()}
    teachers = [{key: teacher["sha256"] for key, teacher in run.manifest["teachers"].items()} for run in probed]
    values["teachers"] = {str(one) for one in teachers}
    text = "The runs with probes differ in their {}: their qualities cannot be compared."
    return [text.format(name) for name, different in values.items() if len(different) > 1]


def quality_title(panel: Panel) -> str:
    """Returns teacher, probe, and the rank correlation if there is one."""
    name = panel_title(panel.teacher, panel.probe)
    if panel.correlation is None:
        return name
    return f"{name}: ρ = {panel.correlation.rho.value:+.2f}, {len(panel.points)} checkpoints"


def quality_plot(panels: Sequence[Panel], colours: Mapping[str, str], paper: bool = False) -> Figure:
    """Draws probe quality against accuracy: a point per checkpoint, a panel per teacher and probe."""
    points = {quality_title(panel).replace(": ", "\n"): panel.points for panel in panels}

    def draw(title: str, axes: Axes) -> None:
        rows = points[title]
        marks = [colours[name] for name in rows["checkpoint"]]
        axes.scatter(rows["quality"], rows["accuracy"], s=15 if paper else 30, c=marks)
        axes.vlines(rows["quality"], rows["ci_low"], rows["ci_high"], marks)

    with mpl.rc_context(style(paper)):
        figure = draw_panels([*points], draw, 3, QUALITY, f"accuracy, {panels[0].name}", paper)
        names = dict.fromkeys(name for rows in points.values() for name in rows["checkpoint"])
        dots = [Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in names]
        add_legend(figure, dots)
    return figure


def load_probed(paths: Sequence[Path]) -> list[RunResults]:
    """Reads runs with probes one by one, those of folders too: a point is one checkpoint."""
    return load_runs([run for path in paths for run in runs_in(path) or [path] if (run / "results.csv").exists()])


def chapter(
    runs: Sequence[RunResults],
    benchmarks: Sequence[BenchmarkResults],
    joined: Sequence[Panel],
    names: Sequence[str],
    differences: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Returns the variables of the template.

    Args:
        runs: runs with probes, from `load_probed`.
        benchmarks: runs of `probing bench`.
        joined: the `panels` of both.
        names: all checkpoints of the page, in the order of their colours.
        differences: paired differences of accuracy, from `probing compare`.

    Returns:
        `labels` of the runs, `tables` by benchmark, `statements` on differences, `quality` (charts), and `sentences` on
        correlations.
    """
    sentences = [*dict.fromkeys(panel.sentence for panel in joined), *(comparability_warnings(runs) if joined else ())]
    if runs and not joined:
        sentences = ["No checkpoint has both probes and answers: no two runs have the same weights."]
    tables = []
    for name in dict.fromkeys(run.benchmark for run in benchmarks):
        selected = [run for run in benchmarks if run.benchmark == name]
        rows = pd.DataFrame() if differences is None else differences[differences["protocol"] == name]
        table = {"title": _title(selected, name), "table": accuracy_table(selected), "notes": notes(selected)}
        tables.append(table | {"differences": difference_table(rows) if len(rows) else None})
    shown = [panel for panel in joined if panel.correlation is not None]
    frames = [panel.points.rename(columns={"quality": "x", "accuracy": "value"}) for panel in shown]
    charts = [
        scatter_chart(frame, quality_title(panel), names, QUALITY, f"accuracy, {panel.name}")
        for frame, panel in zip(frames, shown, strict=True)
    ]
    return {
        "labels": list(dict.fromkeys(run.label for run in benchmarks)),
        "tables": tables,
        "statements": [] if differences is None else answer_statements(differences),
        "quality": {"charts": charts, "legend": legend(pd.concat(frames), names)} if charts else {},
        "sentences": sentences,
    }


def joined_points(panels: Sequence[Panel]) -> pd.DataFrame:
    """Returns the points of all panels, for `quality_accuracy.csv`."""
    return pd.concat(p.points.assign(benchmark=p.benchmark, teacher=p.teacher, probe=p.probe) for p in panels)
