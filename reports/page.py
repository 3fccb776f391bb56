"""Writes a self-contained HTML page, with figures and tables as files next to it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from analysis.evaluation.registry import ACCURACY, describe
from probing.runs.directory import is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, disk_errors, write_text
from reports import alignment as alignment_chapter
from reports.alignment import AlignmentResults, difference_table, load_alignments
from reports.answer import answer_table, answers, convergence, random_frame
from reports.benchmarks import Chapter as Benchmarks
from reports.benchmarks import chapter as benchmark_chapter
from reports.benchmarks import load_benchmarks, quality_plot
from reports.charts import bundle, legend, panel_charts
from reports.curves import (
    PROBES,
    compared_metrics,
    difference_frame,
    differences_from,
    direction,
    layer_frame,
    references,
)
from reports.figures import (
    Style,
    learning_plot,
    line_plot,
    png_data_uri,
    save_figure,
    slug,
    write_curves,
    write_differences,
)
from reports.grids import grid_figure, read_grids
from reports.results import (
    AVERAGE,
    MEASURE,
    RunResults,
    interval_text,
    load_runs,
    metric_label,
    sort_measures,
    teacher_title,
)
from reports.strips import viewers
from reports.tables import decoded_table
from reports.theme import CONTROLS, REFERENCES, palette, vega_config
from reports.use import sections as use_sections

COLUMNS = {
    f"{probe}, {name}" if control != "none" else probe: (probe, control)
    for probe in PROBES
    for control, name in CONTROLS.items()
}
"""Columns of the tables of values: title → probe and control."""


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
        colours = palette(checkpoint_names(runs, alignments, benchmarks, differences))
        alignment_chapter.write_figures(alignments, out, style, colours)
        for name, panels in benchmarks.panels.items() if benchmarks else ():
            if panels:
                save_figure(quality_plot(panels, colours, style == "paper"), out, f"quality_{name}", style)
        if runs:
            _write_probe_figures(runs, differences, out, style, colours)
    merged = [run.results.assign(checkpoint=run.label) for run in (*runs, *alignments, *benchmark_runs)]
    write_text(out / "results.csv", pd.concat(merged).to_csv(index=False))
    write_text(page, render(runs, alignments, differences, statements, benchmarks))
    return page


def _write_probe_figures(
    runs: Sequence[RunResults], differences: pd.DataFrame | None, out: Path, style: Style, colours: Mapping[str, str]
) -> None:
    write_curves(runs, out, style, colours)
    found = answers(runs)
    minus = random_frame(found)
    if len(minus):
        ylabel = f"trained − random, {metric_label(*found[0].measure)}"
        save_figure(line_plot(minus, ylabel, colours, style == "paper", zero=True), out, "minus_random", style)
    if differences is not None:
        write_differences(differences, out, style, colours)
    for run in (run for run in runs if len(run.curves)):
        save_figure(learning_plot(run), out, "learning" if len(runs) == 1 else f"learning_{run.label}", style)
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{slug(run.label)}"
        for grid in read_grids(run.path):
            with atomic_file(out / "figures" / f"grid_{grid.teacher}_{grid.probe}{suffix}.png") as file:
                grid_figure(grid).savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)


def load(paths: Sequence[Path]) -> tuple[list[RunResults], list[AlignmentResults]]:
    """Reads runs with probes and runs of `probing align`; those of one checkpoint get the same label.

    Raises:
        UserError: a folder is not a run, or has no results.
    """
    runs = load_runs([path for path in paths if not is_alignment(path)])
    unmatched, alignments = list(runs), []
    for aligned in load_alignments([path for path in paths if is_alignment(path)]):
        checkpoint = aligned.manifest["checkpoint"]["sha256"]
        match = next((run for run in unmatched if run.manifest["checkpoint"]["sha256"] == checkpoint), None)
        if match:
            unmatched.remove(match)
        alignments.append(replace(aligned, label=match.label) if match else aligned)
    return runs, alignments


def checkpoint_names(
    runs: Sequence[RunResults],
    alignments: Sequence[AlignmentResults],
    benchmarks: Benchmarks | None,
    differences: pd.DataFrame | None,
) -> list[str]:
    """Returns all checkpoints that charts show, in the order of their colours."""
    names = [run.label for run in (*runs, *alignments)]
    names += references(differences) if differences is not None else []
    names += list(benchmarks.points["checkpoint"]) if benchmarks and benchmarks.points is not None else []
    return list(dict.fromkeys(names))


def render(
    runs: Sequence[RunResults],
    alignments: Sequence[AlignmentResults],
    differences: pd.DataFrame | None = None,
    statements: Sequence[str] = (),
    benchmarks: Benchmarks | None = None,
) -> str:
    """Renders the page from the runs that `load` returns; see `write_report`."""
    names = checkpoint_names(runs, alignments, benchmarks, differences)
    common = {
        **(alignment_chapter.chapter(alignments, names) if alignments else {}),
        **(benchmarks.template_values(names) if benchmarks else {}),
        "names": names,
        "themes": {mode: vega_config(names, mode == "dark") for mode in ("light", "dark")},
        "colours_css": colours_css(names),
        "differences": differences is not None,
    }
    if runs:
        common |= _probe_values(runs, differences, statements, names)
    elif differences is not None:
        common["difference_table"] = difference_table(differences)
    kind = "page" if runs else "alignment_page" if alignments else "benchmark_page"
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    templates = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = any(common.get(key) for key in ("runs", "alignment_sections", "benchmark_charts"))
    return templates.get_template(f"{kind}.html").render(**common, bundle=bundle() if drawn else "")


def colours_css(names: Sequence[str]) -> Markup:
    """Defines the CSS classes of the checkpoints and references, in the light and dark themes."""
    light, dark = (
        ";".join(f"--c{index}:{colours[name]}" for index, name in enumerate([*names, *REFERENCES]))
        for colours in (palette(names), palette(names, dark=True))
    )
    classes = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(len(names) + len(REFERENCES)))
    return Markup(
        f":root{{{light}}}@media screen{{:root[data-theme=dark]{{{dark}}}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}{classes}"
    )


def _probe_values(
    runs: Sequence[RunResults], differences: pd.DataFrame | None, statements: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Returns the variables of the template for runs with probes."""
    found, colours, answer = answers(runs), palette(names), {}
    minus = random_frame(found)
    if found:
        measure = found[0].measure
        paired = all(one.difference is None or one.paired for one in found)
        answer = answer_table(found) | {"label": _title(metric_label(*measure)), "paired": paired}
    ylabel = "trained − random" + (direction(found[0].measure[0], " ↓") if found else "")
    random = {} if minus.empty else {
        "charts": panel_charts(minus, names, ylabel, zero=True),
        "legend": legend(minus, names=names),
        "static": png_data_uri(line_plot(minus, ylabel, colours, zero=True)),
    }  # fmt: skip
    table = decoded_table(runs)
    return {
        "runs": runs,
        "answer": answer,
        "random": random,
        "use": use_sections(runs, names, colours),
        "convergence": {run.label: convergence(run) for run in runs},
        "sections": _sections(runs, names),
        "table": table,
        "metrics": [(_title(info.label), info.meaning) for info in (describe(*measure) for measure in _measures(runs))],
        "viewers": viewers([(run, read_grids(run.path)) for run in runs]),
        "compared": {} if differences is None else _comparison(differences, names),
        "statements": list(statements),
        "learning": [{"run": run.label, "src": png_data_uri(learning_plot(run))} for run in runs if len(run.curves)],
    }


def _measures(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    return sort_measures(measure for run in runs for measure in run.measures)


def _title(label: str) -> str:
    """Capitalises a label, except names like mIoU."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _sections(runs: Sequence[RunResults], names: Sequence[str]) -> list[dict[str, Any]]:
    """Builds charts and tables of every metric, the headline first."""
    sections = []
    for measure in sorted(_measures(runs), key=lambda measure: measure != MEASURE):
        frame, headline = layer_frame(runs, *measure), measure == MEASURE
        ylabel = metric_label(*measure)
        scored = [run for run in runs if measure in run.measures]
        sections.append(
            {
                "title": _title(metric_label(*measure)),
                "headline": headline,
                "legend": legend(frame, names=names),
                "charts": panel_charts(frame, names, ylabel + direction(measure[0], " ↓")),
                "static": png_data_uri(line_plot(frame, ylabel, palette(names))) if headline and len(frame) else "",
                "tables": [_table(run, teacher, *measure) for run in scored for teacher in run.teachers_of(*measure)],
            }
        )
    return sections


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


def _comparison(differences: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Builds charts of the differences from every reference, of which the page selects one, and tables of means."""
    chosen = references(differences)
    seen = [differences_from(differences, name) for name in chosen]
    metrics, frames = [], []
    for measure in compared_metrics(differences, MEASURE):
        frame = difference_frame(pd.concat(seen), *measure)
        first, ylabel = frame[frame["reference"] == chosen[0]], "difference" + direction(measure[0], " ↓")
        headline = measure == MEASURE
        frames.append(frame)
        metrics.append(
            {
                "title": _title(metric_label(*measure)),
                "headline": headline,
                "charts": panel_charts(frame, names, ylabel, zero=True),
                "static": png_data_uri(line_plot(first, ylabel, palette(names), zero=True))
                if headline and len(first)
                else "",
            }
        )
    return {
        "references": chosen,
        "metrics": metrics,
        "means": [_means(frame) for frame in seen],
        "legend": legend(*frames, names=names) if frames else [],
    }


def _means(frame: pd.DataFrame) -> list[list[str]]:
    """Builds the rows of the table of mean differences, in the order of the metrics."""
    order = {metric: rank for rank, metric in enumerate(compared_metrics(frame, MEASURE))}
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
