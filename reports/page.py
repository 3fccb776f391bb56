"""Writes a self-contained HTML page, with figures and tables as files next to it."""

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
from reports.benchmarks import Chapter as Benchmarks
from reports.benchmarks import chapter as benchmark_chapter
from reports.benchmarks import load_benchmarks, quality_figure
from reports.charts import (
    CEILING_LABEL,
    INPUT_CONTROLS,
    MEAN_LABEL,
    PROBES,
    Series,
    difference_plots,
    layer_plot,
    learning_figure,
    levels,
    series,
    shown_probes,
    teachers_of,
)
from reports.differences import compared_metrics, differences_from, references
from reports.figures import (
    Style,
    evaluated_metrics,
    runs_with_metric,
    save_figure,
    slug,
    write_curves,
    write_differences,
)
from reports.grids import grid_figure, read_grids
from reports.images import png_data_uri
from reports.plots import figure, legend_entry, marker_definitions, svg, tones
from reports.results import AVERAGE, TITLES, Results, RunResults, interval_text, load_runs, metric_label, teacher_title
from reports.strips import viewers
from reports.styles import assign_style_indices, marker, tone
from reports.summary import METRIC, PROTOCOL, convergence, random_control, teacher_finding
from reports.tables import decoded_table

COLUMNS = {
    "resampler": ("resampler", "none"),
    "resampler, shuffled pairs": ("resampler", "shuffled"),
    "resampler, random weights": ("resampler", "random"),
    **{f"resampler, {name}": ("resampler", control) for control, (name, _) in INPUT_CONTROLS.items()},
    "ridge": ("ridge", "none"),
    "ridge, random weights": ("ridge", "random"),
    **{f"ridge, {name}": ("ridge", control) for control, (name, _) in INPUT_CONTROLS.items()},
}


def write_report(
    runs: Sequence[Path],
    out: Path,
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    style: Style | None = None,
) -> Path:
    """Writes the page, the merged `results.csv`, and `figures/` if a style is given.

    Args:
        runs: evaluated runs; their order determines the colours of the checkpoints.
        out: folder of the report.
        differences: paired differences, from `probing compare`.
        statements: sentences about the differences.
        style: also write every figure as files of this style.

    Returns:
        Path of the page.

    Raises:
        UserError: a folder is not a run, has no results or is given twice, or the page cannot be written.
    """
    check_report_paths(runs, out)
    with disk_errors(out):
        return _write_report(runs, out, differences, statements, style)


def check_report_paths(runs: Sequence[Path], out: Path) -> None:
    """Raises UserError if a run is given twice, or if the report would overwrite a run."""
    with disk_errors(out):
        paths = [run.resolve() for run in runs]
        for run, path in zip(runs, paths, strict=True):
            if paths.count(path) > 1:
                raise UserError(f"{run} is given twice; remove one")
        if (out / "recipe.yaml").exists() or runs_in(out):
            raise UserError(f"{out} contains runs, and the report would overwrite their results; choose another --out")


def _write_report(
    paths: Sequence[Path], out: Path, differences: pd.DataFrame | None, statements: Sequence[str], style: Style | None
) -> Path:
    benchmark_runs = load_benchmarks([path for path in paths if is_benchmark(path)])
    paths = [path for path in paths if not is_benchmark(path)]
    runs, alignments = load(paths)
    page = out / "index.html"
    answer_differences = None
    if differences is not None:
        write_text(out / "differences.csv", differences.to_csv(index=False))
        is_answer = (differences["metric"] == ACCURACY) & (differences["teacher"] == "") & (differences["layer"] == "")
        answer_differences, differences = differences[is_answer], differences[~is_answer]
    probed = [path for path in paths if not is_alignment(path)]
    benchmarks = benchmark_chapter(probed, benchmark_runs, answer_differences) if benchmark_runs else None
    if benchmarks and benchmarks.points is not None:
        write_text(out / "quality_accuracy.csv", benchmarks.points.to_csv(index=False))
    if table := decoded_table(runs):
        write_text(out / "table8.csv", table.frame().to_csv(index_label="checkpoint"))
    if style:
        for plot, name in chapter_plots(alignments) if alignments else []:
            save_figure(figure(plot, style == "paper"), out, name, style)
        if benchmarks:
            _write_quality(benchmarks, out, style)
        if runs:
            _write_probe_figures(runs, differences, out, style)
    _write_merged([*runs, *alignments, *benchmark_runs], out)
    write_text(page, render(runs, alignments, differences, statements, benchmarks))
    return page


def _write_quality(benchmarks: Benchmarks, out: Path, style: Style) -> None:
    for name, panels in benchmarks.panels.items():
        if panels:
            drawn = quality_figure(panels, benchmarks.style_indices, style == "paper")
            save_figure(drawn, out, f"quality_{name}", style)


def _write_probe_figures(runs: Sequence[RunResults], differences: pd.DataFrame | None, out: Path, style: Style) -> None:
    write_curves(runs, out, style)
    if differences is not None:
        write_differences(differences, _style_indices(runs, differences), out, style)
    for run in (run for run in runs if len(run.curves)):
        save_figure(learning_figure(run), out, "learning" if len(runs) == 1 else f"learning_{run.label}", style)
    _write_grids(runs, out)


def load(paths: Sequence[Path]) -> tuple[list[RunResults], list[AlignmentResults]]:
    """Reads runs with probes and runs of `probing align`, and assigns style indices.

    Raises:
        UserError: a folder is not a run, or has no results.
    """
    runs = load_runs([path for path in paths if not is_alignment(path)])
    alignments = load_alignments([path for path in paths if is_alignment(path)])
    hashes = ([run.manifest["checkpoint"]["sha256"] for run in group] for group in (runs, alignments))
    probed, aligned = assign_style_indices(*hashes)
    return (
        [replace(run, style_index=index) for run, index in zip(runs, probed, strict=True)],
        [replace(run, style_index=index) for run, index in zip(alignments, aligned, strict=True)],
    )


def render(
    runs: Sequence[RunResults],
    alignments: Sequence[AlignmentResults],
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    benchmarks: Benchmarks | None = None,
) -> str:
    """Renders the page from the runs that `load` returns; see `write_report`."""
    alignment = chapter(alignments) if alignments else {}
    markers = [(line.tone, line.marker) for plot, _ in alignment.get("alignment_plots", []) for line in plot.lines]
    common = {**alignment, **(benchmarks.template_values() if benchmarks else {}), "tones": tones()}
    if not runs:
        template = _templates().get_template("alignment_page.html" if alignments else "benchmark_page.html")
        compared = differences is not None
        table = difference_table(differences) if compared else None
        markers_svg = marker_definitions(markers)
        return template.render(**common, markers=markers_svg, difference_table=table, differences=compared)
    markers += [(line.tone, line.marker) for line in series(runs)]
    comparison: dict[str, Any] = {}
    if differences is not None:
        style_indices = _style_indices(runs, differences)
        comparison = _comparison(differences, style_indices)
        markers += [(tone(index), marker(index)) for index in style_indices.values()]
    return _templates().get_template("page.html").render(
        **common,
        markers=marker_definitions(markers),
        runs=runs,
        findings=_findings(runs),
        titles=TITLES,
        random={run.label: random_control(run) for run in runs},
        convergence={run.label: convergence(run) for run in runs},
        sections=_sections(runs),
        table=decoded_table(runs),
        metrics=[_label_and_meaning(*metric) for metric in evaluated_metrics(runs)],
        viewers=viewers([(run, read_grids(run.path)) for run in runs]),
        tone=tone,
        compared=comparison,
        statements=list(statements),
        learning=[
            {"run": run.label, "src": png_data_uri(learning_figure(run), dpi=130)} for run in runs if len(run.curves)
        ],
    )  # fmt: skip


def _templates() -> jinja2.Environment:
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _write_merged(runs: Sequence[Results], out: Path) -> None:
    merged = pd.concat([run.results.assign(checkpoint=run.label) for run in runs])
    write_text(out / "results.csv", merged.to_csv(index=False))


def _style_indices(runs: Sequence[RunResults], differences: pd.DataFrame) -> dict[str, int]:
    """Maps every checkpoint of the differences to its style index; names without a run come last."""
    indices = {run.label: run.style_index for run in runs}
    for name in references(differences):
        indices.setdefault(name, len(indices))
    return indices


def _findings(runs: Sequence[RunResults]) -> list[Any]:
    """Returns the findings if all runs have the headline metric."""
    if len(runs_with_metric(runs, METRIC, PROTOCOL)) < len(runs):
        return []
    return [teacher_finding(run, teacher) for run in runs for teacher in run.teachers_of(METRIC, PROTOCOL)]


def _write_grids(runs: Sequence[RunResults], out: Path) -> None:
    """Writes the grids of decoded images as files."""
    folder = out / "figures"
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{slug(run.label)}"
        for grid in read_grids(run.path):
            with atomic_file(folder / f"grid_{grid.teacher}_{grid.probe}{suffix}.png") as file:
                grid_figure(grid).savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)


def _title(label: str) -> str:
    """Capitalises a label, except names like mIoU."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _label_and_meaning(metric: str, protocol: str) -> tuple[str, str]:
    info = describe(metric, protocol)
    return _title(info.label), info.meaning


def _sections(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    sections = []
    for metric, protocol in evaluated_metrics(runs):
        scored = runs_with_metric(runs, metric, protocol)
        lines, teachers = series(scored), teachers_of(scored, metric, protocol)
        rows = []
        for probe in shown_probes(scored):
            plots = [
                svg(layer_plot(lines, teacher, probe, metric, protocol))
                for teacher in teachers
                if any(len(x.run.curve(teacher, probe, x.control, metric, protocol)) for x in lines)
            ]
            rows += [{"probe": PROBES[probe], "plots": plots}] if plots else []
        tables = [_table(run, t, metric, protocol) for run in scored for t in run.teachers_of(metric, protocol)]
        has_ceiling = any(levels(scored, teacher, metric, protocol)[1] is not None for teacher in teachers)
        sections.append(
            {
                "title": _title(metric_label(metric, protocol)),
                "headline": (metric, protocol) == (METRIC, PROTOCOL),
                "legend": _legend(lines, has_ceiling),
                "rows": rows,
                "tables": tables,
            }
        )
    return sections


def _legend(lines: Sequence[Series], has_ceiling: bool) -> list[dict[str, Any]]:
    entries = [legend_entry(x.label, x.tone, x.dash, x.marker, x.control != "none") for x in lines]
    entries.append(legend_entry(MEAN_LABEL, "grey", "-.", "", True))
    return [*entries, legend_entry(CEILING_LABEL, "ink", "-", "", True)] if has_ceiling else entries


def _table(run: RunResults, teacher: str, metric: str, protocol: str) -> dict[str, Any]:
    """Builds the table of one teacher and metric: a row per layer, a column per probe and control."""
    columns: dict[str, dict[str, str]] = {}
    layers: list[str] = []
    for title, (probe, control) in COLUMNS.items():
        curve = run.curve(teacher, probe, control, metric, protocol, with_empty=True)
        if len(curve):
            columns[title] = {row["layer"]: interval_text(row) for _, row in curve.iterrows()}
            layers = layers or list(curve["layer"])
    rows = [[layer, *(cells.get(layer, "") for cells in columns.values())] for layer in layers]
    return {
        "title": f"{teacher_title(teacher)}, {metric_label(metric, protocol)}",
        "run": run.label,
        "head": ["layer", *columns],
        "rows": rows,
        "mean": run.mean_target_score(teacher, metric, protocol),
        "ceiling": run.teacher_score(teacher, metric, protocol),
    }


def _comparison(differences: pd.DataFrame, style_indices: Mapping[str, int]) -> dict[str, Any]:
    """Builds plots and a table of means over layers of the differences, for every reference."""
    names = references(differences)
    frames = {name: differences_from(differences, name) for name in names}
    return {
        "references": names,
        "metrics": [
            {
                "title": _title(metric_label(*measure)),
                "headline": measure == (METRIC, PROTOCOL),
                "plots": [
                    [
                        svg(plot)
                        for row in difference_plots(frame, *measure, style_indices)
                        for plot in row
                        if plot.lines
                    ]
                    for frame in frames.values()
                ],
            }
            for measure in compared_metrics(differences, (METRIC, PROTOCOL))
        ],
        "means": [_means(frame) for frame in frames.values()],
        "entries": [
            legend_entry(name, tone(style_indices[name]), "-", marker(style_indices[name]), False) for name in names
        ],
    }


def _means(frame: pd.DataFrame) -> list[list[str]]:
    """Builds the rows of the table of mean differences, in the order of the metrics."""
    order = {metric: rank for rank, metric in enumerate(compared_metrics(frame, (METRIC, PROTOCOL)))}
    rows = [row for _, row in frame[(frame["layer"] == AVERAGE) & (frame["probe"] != "")].iterrows()]
    return [
        [
            f"{row['checkpoint']} − {row['reference']}",
            teacher_title(row["teacher"]),
            PROBES.get(row["probe"], row["probe"]),
            metric_label(row["metric"], row["protocol"]),
            interval_text(row, 4, "+").replace("-", "−"),
            str(row["n"]),
        ]
        for row in sorted(rows, key=lambda row: order[row["metric"], row["protocol"]])
    ]
