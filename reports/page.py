"""One self-contained HTML page per report, with the figures and the table as files beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis.evaluation.registry import ACCURACY, describe
from probing.runs.directory import is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, disk_errors, write_text
from reports.alignment import AlignmentResults, difference_table, load_alignments
from reports.alignment_chapter import chapter, chapter_plots
from reports.benchmarks import BenchmarkResults, load_benchmarks, quality_figure
from reports.benchmarks import Chapter as Benchmarks
from reports.benchmarks import chapter as benchmark_chapter
from reports.charts import (
    MEAN_LABEL,
    OWN_LABEL,
    PROBES,
    SHOWN,
    Series,
    difference_teachers,
    learning_figure,
    levels,
    panel_title,
    series,
    shown_probes,
    teachers_of,
)
from reports.differences import against, measures_of, references
from reports.figures import Style, having, measures, save, slug, write_curves, write_differences
from reports.grids import grid_figure, read_grids
from reports.images import picture
from reports.plots import Line, figure, layer_plot, legend_entry, marker_definitions, named_plot, svg, table_line, tones
from reports.results import AVERAGE, TITLES, RunResults, layer_rank, load_runs, metric_label, teacher_title
from reports.strips import viewers
from reports.styles import marker, places, tone
from reports.summary import METRIC, PROTOCOL, convergence, random_control, teacher_finding
from reports.tables import decoded_table

COLUMNS = {
    "resampler": ("resampler", "none"),
    "resampler, shuffled pairs": ("resampler", "shuffled"),
    "resampler, random weights": ("resampler", "random"),
    **{f"resampler, {name}": ("resampler", control) for control, (name, _) in SHOWN.items()},
    "ridge": ("ridge", "none"),
    "ridge, random weights": ("ridge", "random"),
    **{f"ridge, {name}": ("ridge", control) for control, (name, _) in SHOWN.items()},
}


def write_report(
    runs: Sequence[Path],
    out: Path,
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    style: Style = "screen",
) -> Path:
    """Writes the page, `figures/` and the merged `results.csv`.

    Args:
        runs: evaluated runs; the first names the teachers, and their order gives the checkpoints their colours.
        out: folder of the report.
        differences: paired differences, from `probing compare`.
        statements: what they say, a sentence each.
        style: of the figures.

    Returns:
        Path of the page.

    Raises:
        UserError: a folder is no run, or has no results yet, or stands there twice, or the page cannot be written.
    """
    require_apart(runs, out)
    with disk_errors(out):
        return _write_report(runs, out, differences, statements, style)


def require_apart(runs: Sequence[Path], out: Path) -> None:
    """Raises UserError where a run is given twice, or the report's files would replace a run's own."""
    with disk_errors(out):
        places = [run.resolve() for run in runs]
        for run, place in zip(runs, places, strict=True):
            if places.count(place) > 1:
                raise UserError(f"{run} is given twice; leave one out")
        if (out / "recipe.yaml").exists() or runs_in(out):
            raise UserError(f"{out} holds runs, and the report would replace their results; choose another --out")


def _write_report(
    paths: Sequence[Path], out: Path, differences: pd.DataFrame | None, statements: Sequence[str], style: Style
) -> Path:
    asked = load_benchmarks([path for path in paths if is_benchmark(path)])
    paths = [path for path in paths if not is_benchmark(path)]
    runs, alignments = load(paths)
    page = out / "index.html"
    answered = None
    if differences is not None:
        write_text(out / "differences.csv", differences.to_csv(index=False))
        of_answers = (differences["metric"] == ACCURACY) & (differences["teacher"] == "") & (differences["layer"] == "")
        answered, differences = differences[of_answers], differences[~of_answers]
    probed = [path for path in paths if not is_alignment(path)]
    benchmarks = benchmark_chapter(probed, asked, answered) if asked else None
    if benchmarks:
        _write_benchmarks(benchmarks, out, style)
    for plot, name in chapter_plots(alignments) if alignments else []:
        save(figure(plot, style == "paper"), out, name, style)
    if runs:
        write_curves(runs, out, style)
        table = decoded_table(runs)
        if table:
            write_text(out / "table8.csv", table.frame().to_csv(index_label="checkpoint"))
        if differences is not None:
            write_differences(differences, _places(runs, differences), out, style)
        for run in (run for run in runs if len(run.curves)):
            save(learning_figure(run), out, "learning" if len(runs) == 1 else f"learning_{run.label}", style)
        _write_grids(runs, out)
    _write_merged([*runs, *alignments, *asked], out)
    write_text(page, render(runs, alignments, differences, statements, benchmarks))
    return page


def _write_benchmarks(benchmarks: Benchmarks, out: Path, style: Style) -> None:
    if benchmarks.points is not None:
        write_text(out / "quality_accuracy.csv", benchmarks.points.to_csv(index=False))
    for name, drawn in benchmarks.panels.items():
        if drawn:
            save(quality_figure(drawn, benchmarks.place, style == "paper"), out, f"quality_{name}", style)


def load(paths: Sequence[Path]) -> tuple[list[RunResults], list[AlignmentResults]]:
    """Reads runs with probes and runs of `probing align`, and numbers their checkpoints.

    Raises:
        UserError: a folder is no run, or has no results yet.
    """
    runs = load_runs([path for path in paths if not is_alignment(path)])
    alignments = load_alignments([path for path in paths if is_alignment(path)])
    hashes = ([one.manifest["checkpoint"]["sha256"] for one in many] for many in (runs, alignments))
    ours, theirs = places(*hashes)
    return (
        [replace(run, place=place) for run, place in zip(runs, ours, strict=True)],
        [replace(run, place=place) for run, place in zip(alignments, theirs, strict=True)],
    )


def render(
    runs: Sequence[RunResults],
    alignments: Sequence[AlignmentResults],
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    benchmarks: Benchmarks | None = None,
) -> str:
    """The page, from what `load` read; see `write_report`."""
    words = chapter(alignments) if alignments else {}
    used = [(line.tone, line.marker) for plot, _ in words.get("alignment_plots", []) for line in plot.lines]
    common = {**words, **(benchmarks.values() if benchmarks else {}), "tones": tones()}
    if not runs:
        told = difference_table(differences) if differences is not None else None
        text = _templates().get_template("alignment_page.html" if alignments else "benchmark_page.html")
        there = differences is not None
        return text.render(**common, markers=marker_definitions(used), told=told, differences=there)
    used += [(line.tone, line.marker) for line in series(runs)]
    compared: dict[str, Any] = {}
    if differences is not None:
        place = _places(runs, differences)
        compared = _compared(differences, place)
        used += [(tone(number), marker(number)) for number in place.values()]
    return _templates().get_template("page.html").render(
        **common,
        markers=marker_definitions(used),
        runs=runs,
        findings=_findings(runs),
        titles=TITLES,
        random={run.label: random_control(run) for run in runs},
        convergence={run.label: convergence(run) for run in runs},
        sections=_sections(runs),
        table=decoded_table(runs),
        metrics=[_explained(*measure) for measure in measures(runs)],
        viewers=viewers([(run, read_grids(run.path)) for run in runs]),
        tone=tone,
        compared=compared,
        statements=list(statements),
        learning=[
            {"run": run.label, "src": picture(learning_figure(run), dpi=130)} for run in runs if len(run.curves)
        ],
    )  # fmt: skip


def _templates() -> jinja2.Environment:
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _write_merged(runs: Sequence[RunResults | AlignmentResults | BenchmarkResults], out: Path) -> None:
    merged = pd.concat([run.results.assign(checkpoint=run.label) for run in runs])
    write_text(out / "results.csv", merged.to_csv(index=False))


def _places(runs: Sequence[RunResults], differences: pd.DataFrame) -> dict[str, int]:
    """The number of every checkpoint that differences name; names that no run has come after those."""
    found = {run.label: run.place for run in runs}
    for name in references(differences):
        found.setdefault(name, len(found))
    return found


def _findings(runs: Sequence[RunResults]) -> list[Any]:
    """Sentences, where the metric that they are about was evaluated in every run."""
    if len(having(runs, METRIC, PROTOCOL)) < len(runs):
        return []
    return [teacher_finding(run, teacher) for run in runs for teacher in run.teachers_of(METRIC, PROTOCOL)]


def _write_grids(runs: Sequence[RunResults], out: Path) -> None:
    """Picture grids as files: some layers, one below the other."""
    folder = out / "figures"
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{slug(run.label)}"
        for grid in read_grids(run.path):
            with atomic_file(folder / f"grid_{grid.teacher}_{grid.probe}{suffix}.png") as file:
                grid_figure(grid).savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)


def _title(label: str) -> str:
    """With a capital, except where the name has its own (mIoU)."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _explained(metric: str, protocol: str) -> tuple[str, str]:
    """Label and meaning of a metric."""
    info = describe(metric, protocol)
    return _title(info.label), info.meaning


def _sections(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    sections = []
    for metric, protocol in measures(runs):
        there = having(runs, metric, protocol)
        lines, teachers = series(there), teachers_of(there, metric, protocol)
        rows = []
        for probe in shown_probes(there):
            plots = [
                svg(layer_plot(lines, teacher, probe, metric, protocol))
                for teacher in teachers
                if any(len(x.run.curve(teacher, probe, x.control, metric, protocol)) for x in lines)
            ]
            rows += [{"probe": PROBES[probe], "plots": plots}] if plots else []
        tables = [_table(run, t, metric, protocol) for run in there for t in run.teachers_of(metric, protocol)]
        own = any(levels(there, teacher, metric, protocol)[1] is not None for teacher in teachers)
        sections.append(
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "legend": _legend(lines, own),
                "rows": rows,
                "tables": tables,
            }
        )
    return sections


def _legend(lines: Sequence[Series], own: bool) -> list[dict[str, Any]]:
    entries = [legend_entry(x.label, x.tone, x.dash, x.marker, x.control != "none") for x in lines]
    entries.append(legend_entry(MEAN_LABEL, "grey", "-.", "", True))
    return [*entries, legend_entry(OWN_LABEL, "ink", "-", "", True)] if own else entries


def _cell(row: pd.Series) -> str:
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if row["n"] else "no finite number"


def _table(run: RunResults, teacher: str, metric: str, protocol: str) -> dict[str, Any]:
    """Layer by layer, every probe and control that was run."""
    columns: dict[str, dict[str, str]] = {}
    layers: list[str] = []
    for title, (probe, control) in COLUMNS.items():
        curve = run.curve(teacher, probe, control, metric, protocol, with_empty=True)
        if len(curve):
            columns[title] = {row["layer"]: _cell(row) for _, row in curve.iterrows()}
            layers = layers or list(curve["layer"])
    rows = [[layer, *(cells.get(layer, "") for cells in columns.values())] for layer in layers]
    return {
        "title": f"{teacher_title(teacher)}, {metric_label(metric, protocol)}",
        "run": run.label,
        "head": ["layer", *columns],
        "rows": rows,
        "mean": run.mean_target(teacher, metric, protocol),
        "own": run.own_feature(teacher, metric, protocol),
    }


def _compared(differences: pd.DataFrame, place: Mapping[str, int]) -> dict[str, Any]:
    """Differences from every checkpoint that one may choose, as plots and as a table of means over the layers."""
    names = references(differences)
    frames = {name: against(differences, name) for name in names}
    return {
        "references": names,
        "metrics": [
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "plots": [_difference_plots(frame, metric, protocol, place) for frame in frames.values()],
            }
            for metric, protocol in measures_of(differences, (METRIC, PROTOCOL))
        ],
        "means": [_means(frame) for frame in frames.values()],
        "entries": [legend_entry(name, tone(place[name]), "-", marker(place[name]), False) for name in names],
    }


def _difference_plots(frame: pd.DataFrame, metric: str, protocol: str, place: Mapping[str, int]) -> list[Any]:
    chosen = frame[(frame["metric"] == metric) & (frame["protocol"] == protocol) & (frame["layer"] != AVERAGE)]
    plots = []
    for probe in PROBES:
        for teacher in difference_teachers(chosen):
            rows = chosen[(chosen["teacher"] == teacher) & (chosen["probe"] == probe)]
            lines: list[tuple[Line, Sequence[str]]] = []
            for checkpoint, part in rows.groupby("checkpoint", sort=False):
                number = place[checkpoint]
                part = part.iloc[part["layer"].map(layer_rank).argsort(kind="stable")]
                line = table_line(checkpoint, tone(number), "-", marker(number), part)
                lines.append((line, list(part["layer"])))
            if lines:
                zero = [("no difference", "ink", "-", 0.0)]
                ylabel = f"difference from {rows['reference'].iloc[0]}"
                plots.append(svg(named_plot(panel_title(teacher, probe), lines, levels=zero, ylabel=ylabel)))
    return plots


def _means(frame: pd.DataFrame) -> list[list[str]]:
    """Rows of the table of mean differences, in the order of the metrics."""
    order = {measure: place for place, measure in enumerate(measures_of(frame, (METRIC, PROTOCOL)))}
    rows = [row for _, row in frame[(frame["layer"] == AVERAGE) & (frame["probe"] != "")].iterrows()]
    return [
        [
            f"{row['checkpoint']} − {row['reference']}",
            teacher_title(row["teacher"]),
            PROBES.get(row["probe"], row["probe"]),
            metric_label(row["metric"], row["protocol"]),
            f"{row['value']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]".replace("-", "−")
            if row["n"]
            else "no finite number",
            str(row["n"]),
        ]
        for row in sorted(rows, key=lambda row: order[row["metric"], row["protocol"]])
    ]
