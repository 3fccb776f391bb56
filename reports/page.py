"""Writes a self-contained HTML page, with figures and tables as files next to it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from analysis.evaluation.registry import describe
from probing.runs.directory import is_alignment, is_benchmark, runs_in
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, disk_errors, write_text
from reports import alignment, benchmarks
from reports.answer import answer_table, answers, convergence, pair_table, random_frame
from reports.charts import bundle, chart_group
from reports.curves import (
    PROBES,
    compared_metrics,
    difference_frame,
    differences_from,
    direction,
    layer_frame,
    references,
)
from reports.figures import Style, heat_map, learning_plot, png_data_uri, save_figure, slug, write_group
from reports.pictures import grid_figure, read_grids, viewers
from reports.results import MEASURE, Results, RunResults, load_runs, sort_measures
from reports.tables import decoded_notes, decoded_table, difference_table, headline_rows, is_answer
from reports.theme import REFERENCES, palette, vega_config
from reports.use import sections as use_sections


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
    probed = [path for path in paths if not is_alignment(path) and not is_benchmark(path)]
    answered = benchmarks.load_benchmarks([path for path in paths if is_benchmark(path)])
    runs, aligned = load([path for path in paths if not is_benchmark(path)])
    answer_differences = None
    if differences is not None:
        write_text(out / "differences.csv", differences.to_csv(index=False))
        answer_differences = differences[is_answer(differences)]
        differences = differences[~is_answer(differences)].reset_index(drop=True)
    compared = [] if differences is None else references(differences)
    names = list(dict.fromkeys([*(run.label for run in (*runs, *aligned)), *compared]))
    singles = benchmarks.load_probed(probed) if answered else []
    if panels := benchmarks.panels(singles, answered):
        points = benchmarks.joined_points(panels)
        names = list(dict.fromkeys([*names, *points["checkpoint"]]))  # those in a folder of seeds have no line
        write_text(out / "quality_accuracy.csv", points.to_csv(index=False))
    vqa = benchmarks.chapter(singles, answered, panels, names, answer_differences) if answered else {}
    table = decoded_table(runs)
    if len(table):
        write_text(out / "table8.csv", table.to_csv(index_label="checkpoint"))
    values = page_values(runs, aligned, differences, statements, vqa, names)
    if style:
        _write_figures(values, panels, out, style, palette(names))
    merged = [run.results.assign(checkpoint=run.label) for run in (*runs, *aligned, *answered)]
    write_text(out / "results.csv", pd.concat(merged).to_csv(index=False))
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    templates = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(out / "index.html", templates.get_template("page.html").render(**values))
    return out / "index.html"


def _write_figures(
    values: Mapping[str, Any], panels: Sequence[benchmarks.Panel], out: Path, style: Style, colours: Mapping[str, str]
) -> None:
    """Writes the figures of all charts of the page, and those of runs."""
    runs, paper = values["runs"], style == "paper"
    random = values.get("answer", {}).get("random")
    compared = values.get("compared", {}).get("metrics", [])
    groups = [*values.get("sections", []), *compared, *values.get("use", []), *values["alignment_sections"]]
    for group in groups + [random] * bool(random):
        write_group(**group["figure"], out=out, kind=style, colours=colours)
    shown = [panel for panel in panels if panel.correlation is not None]
    for name in dict.fromkeys(panel.benchmark for panel in shown):
        own = [panel for panel in shown if panel.benchmark == name]
        save_figure(benchmarks.quality_plot(own, colours, paper), out, f"quality_{name}", style)
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{slug(run.label)}"
        for probe in PROBES:
            if figure := heat_map(run, probe, paper):
                save_figure(figure, out, f"heatmap_{probe}{suffix}", style)
        if len(run.curves):
            save_figure(learning_plot(run), out, f"learning{suffix}", style)
        for grid in read_grids(run.path):
            with atomic_file(out / "figures" / f"grid_{grid.teacher}_{grid.probe}{suffix}.png") as file:
                grid_figure(grid).savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)


def load(paths: Sequence[Path]) -> tuple[list[RunResults], list[Results]]:
    """Reads runs with probes and runs of `probing align`; only those of one checkpoint get the same label.

    Raises:
        UserError: a folder is not a run, or has no results.
    """
    runs = load_runs([path for path in paths if not is_alignment(path)])
    unmatched, aligned = list(runs), []
    for one in alignment.load_alignments([path for path in paths if is_alignment(path)]):
        label = one.label
        if match := next((run for run in unmatched if run.identity == one.identity), None):
            unmatched.remove(match)
            label = match.label
        elif label in {run.label for run in runs}:
            label = f"{label} ({one.source.resolve().name})"
        aligned.append(replace(one, label=label))
    return runs, aligned


def page_values(
    runs: Sequence[RunResults],
    aligned: Sequence[Results],
    differences: pd.DataFrame | None,
    statements: Sequence[str],
    vqa: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns the variables of the template.

    `vqa` is from `reports.benchmarks.chapter`, and `names` are all checkpoints with a colour.
    """
    alone = differences is not None and not runs
    return {
        "names": names,
        "themes": {mode: vega_config(names, mode == "dark") for mode in ("light", "dark")},
        "colours_css": colours_css(names),
        "bundle": bundle() if runs or aligned or vqa.get("quality") else "",
        "differences": differences is not None,
        "vqa": vqa,
        "runs": runs,
        "compared_table": difference_table(headline_rows(differences)) if alone else pd.DataFrame(),
        **alignment.chapter(aligned, names),
        **(_probe_values(runs, differences, statements, names, vqa.get("statements", [])) if runs else {}),
    }


def colours_css(names: Sequence[str]) -> Markup:
    """Defines the CSS classes of the checkpoints and references, in the light and dark themes."""
    light, dark = palette(names), palette(names, dark=True)
    pairs = enumerate((light[name], dark[name]) for name in [*names, *REFERENCES])
    return Markup("".join(f".c{rank}{{--c:light-dark({one},{other})}}" for rank, (one, other) in pairs))


def _title(label: str) -> str:
    """Capitalises a label, except names like mIoU."""
    return label if label[1].isupper() else label[0].upper() + label[1:]


def _probe_values(
    runs: Sequence[RunResults],
    differences: pd.DataFrame | None,
    statements: Sequence[str],
    names: Sequence[str],
    answered: Sequence[str],
) -> dict[str, Any]:
    """Returns the variables of the template for runs with probes; `answered` are sentences on benchmarks."""
    answer: dict[str, Any] = {}
    if found := answers(runs):
        measure, minus = found[0].measure, random_frame(found)
        answer = {
            "table": answer_table(found),
            "sentences": [one.sentence for one in found],
            "pairs": pd.DataFrame() if differences is None else pair_table(found, differences),
            "answered": answered,
            "label": _title(describe(*measure).label),
            "paired": all(one.difference is None or one.difference["paired"] for one in found),
        }
        if len(minus):
            ylabel = "trained − random" + direction(measure[0])
            answer["random"] = chart_group(minus, names, "minus_random", ylabel, zero=True, headline=True)
    measures = sorted(
        sort_measures(measure for run in runs for measure in run.measures), key=lambda measure: measure != MEASURE
    )
    sections: list[dict[str, Any]] = []
    for measure in measures:
        frame, label, meaning = layer_frame(runs, *measure), describe(*measure).label, describe(*measure).meaning
        if len(frame):
            name, ylabel = "layers_" + "_".join(measure), label + direction(measure[0])
            sections.append(
                chart_group(frame, names, name, ylabel, headline=not sections, title=_title(label), text=meaning)
            )
    return {
        "answer": answer,
        "sections": sections,
        "decoded": decoded_table(runs),
        "decoded_notes": list(decoded_notes(runs)),
        "compared": {} if differences is None else _comparison(differences, names, statements),
        "use": use_sections(runs, names),
        "viewers": viewers([(run, read_grids(run.path)) for run in runs]),
        "convergence": {run.label: convergence(run) for run in runs},
        "learning": {run.label: png_data_uri(learning_plot(run)) for run in runs if len(run.curves)},
    }


def _comparison(differences: pd.DataFrame, names: Sequence[str], statements: Sequence[str]) -> dict[str, Any]:
    """Builds charts of the differences from every reference, of which the page selects one, and tables of means."""
    chosen = references(differences)
    seen = [differences_from(differences, name).reset_index(drop=True) for name in chosen]
    metrics: list[dict[str, Any]] = []
    for measure in compared_metrics(differences):
        frame, ylabel = difference_frame(pd.concat(seen), *measure), "difference" + direction(measure[0])
        if len(frame):
            name, title = "differences_" + "_".join(measure), _title(describe(*measure).label)
            metrics.append(chart_group(frame, names, name, ylabel, zero=True, headline=not metrics, title=title))
    means = [difference_table(headline_rows(frame)) for frame in seen]
    return {"references": chosen, "metrics": metrics, "means": means, "statements": list(statements)}
